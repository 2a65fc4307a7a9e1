"""What the baseline's descriptions give at another length, by regression: how much of a difference length explains."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..stats.figures import SumStatistic, share, stacked
from ..stats.table import Table

WORDS = share("words")
"""Words per description."""


SUPPORT = 0.1
"""Share of the descriptions that must be as short, or as long: beyond their lengths a regression says nothing."""


def at_length(table: Table, matched: SumStatistic, statistics: Sequence[SumStatistic], words: float) -> list[float]:
    """Figures of descriptions of so many words, about the same images.

    The sums behind a figure are regressed on a description's words and on what there is to name in its image (least
    squares), and read off at the wanted length and the images' mean. At the table's own length this gives its figures.

    Args:
        table: The baseline's, one row per description, with a column ``words``.
        matched: Recall: the last of its columns counts what there is to name.
        statistics: The figures.
        words: Mean length.

    Returns:
        The figures; NaN at lengths that hardly any description of an average image has, and where a count would be
        negative.
    """
    there = matched.columns(table)[:, -1]
    image = stacked(np.ones(len(table)), there)
    usual = image @ np.linalg.lstsq(image, table.words, rcond=None)[0]
    shortest, longest = table.words.mean() + np.quantile(table.words - usual, [SUPPORT, 1 - SUPPORT])
    if not shortest <= words <= longest and not np.isclose(words, table.words.mean()):
        return [np.nan] * len(statistics)
    design = stacked(image, table.words)
    wanted = np.asarray([1.0, there.mean(), words])
    sums = [wanted @ np.linalg.lstsq(design, s.columns(table), rcond=None)[0] for s in statistics]
    return [float(s.value(each)) if min(each) >= 0 else np.nan for s, each in zip(statistics, sums, strict=True)]
