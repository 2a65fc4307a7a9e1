"""What the baseline's descriptions give at another length, by regression: how much of a difference length explains."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..stats.figures import SumStatistic, share, stacked
from ..stats.table import Table

WORDS = share("words")
"""Words per description."""


def at_length(table: Table, matched: SumStatistic, statistics: Sequence[SumStatistic], words: float) -> list[float]:
    """Figures of descriptions of so many words, about the same images.

    The sums behind a figure are regressed on a description's words and on what there is to name in its image (least
    squares), and read off at the wanted length and the images' mean. At the table's own length this gives its figures.

    Args:
        table: The baseline's, one row per description, with a column ``words``.
        matched: Recall: the last of its columns counts what there is to name.
        statistics: The figures.
        words: Mean length.
    """
    there = matched.columns(table)[:, -1]
    design = stacked(np.ones(len(table)), table.words, there)
    wanted = np.asarray([1.0, words, there.mean()])
    return [float(s.value(wanted @ np.linalg.lstsq(design, s.columns(table), rcond=None)[0])) for s in statistics]
