"""What CHAIR does not see: captions that repeat themselves, stop at the token limit, or only became shorter.

With w the words of a caption (maximal runs of letters and digits, inner apostrophes and hyphens included, lower-cased)
and G the list of its len(w) - 3 runs of four neighbouring words:

    repetition of a caption = 1 - |set(G)| / |G|         (0 with fewer than four words)
    repetition rate         = mean over captions         (rep-4 of Welleck et al. 2020, arXiv:1908.04319)
    looping rate            = captions with repetition > 1/2 / captions
    truncation rate         = captions that reached the token limit without an end token / captions
    unfinished rate         = captions that do not end in final punctuation / captions

Truncation has to be recorded while generating. Where it was not (captions from a file), the unfinished rate stands
beside it under its own name: a caption can end in mid-sentence by itself, or at the limit on a full stop.

**Length-matched CHAIR** compares two captions of an image at equal length, so that saying less is no merit:

- *by words*: both are cut behind the first min(a, b) pieces at white space, a and b being their lengths. What remains
  is matched anew, as if the model had stopped there (a two-word name can be cut in half).
- *by mentions*: of both, the first min(a, b) object mentions count, a and b being their numbers of mentions.

A method whose captions are beginnings of the baseline's gets a difference of exactly zero by words; by mentions too,
but for the rare words that the matcher reads differently because of what follows them ("seat ... toilet", tags).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from vlmfix.errors import DataError

from ...stats.bootstrap import finite, interval_dict
from ...stats.figures import Column, Figure, Statistic, one, share
from ...stats.table import Table, differences
from ..coco_objects import ChairMatcher
from .figures import CHAIR_I, CHAIR_S, MENTION_COUNTS, ChairTable, count_mentions

_WORD = re.compile(r"\w+(?:['’-]\w+)*")

_PIECE = re.compile(r"\S+")

_FINISHED = re.compile(r"[.!?…。！？][\"'”’)\]*\s]*\Z")

_LOOPING = 0.5

BROKEN_BY = 0.05
"""How far a method's rate of repetition, loops or truncation may rise above the baseline's before its text counts as
broken. Fixed on calibration scenes of the embedded models; see :func:`broken_text`."""


def repeated_four_grams(text: str) -> tuple[int, int]:
    """How many runs of four words a caption has, and how many of them are repeats of an earlier one."""
    words = _WORD.findall(text.lower())
    grams = list(zip(words, words[1:], words[2:], words[3:], strict=False))
    return len(grams), len(grams) - len(set(grams))


def is_finished(text: str) -> bool:
    """Whether a caption ends in final punctuation, closing quotes and brackets behind it allowed."""
    return _FINISHED.search(text) is not None


def first_words(text: str, count: int) -> str:
    """The text up to its ``count``-th piece at white space; all of it, unchanged, if it has no more."""
    ends = [found.end() for found in _PIECE.finditer(text)]
    return text if count >= len(ends) else text[: ends[count - 1]] if count > 0 else ""


@dataclass(frozen=True, eq=False)
class TextTable(Table):
    """Counts of text quality, one row per caption, by image id.

    Columns: ``four_grams`` int64 [n], runs of four words; ``repeated`` int64 [n], those that repeat an earlier one;
    ``repetition`` float64 [n], their share; ``looping`` bool [n], whether it is more than half; ``unfinished`` bool
    [n], no final punctuation; ``truncated`` bool [n], the token limit came before an end token, present only if that
    was recorded.
    """

    FIGURES: ClassVar[tuple[Figure, ...]] = (
        Figure("repetition", "rep-4", -1, share("repetition")),
        Figure("looping", "loops", -1, share("looping")),
        Figure("unfinished", "unfinished", -1, share("unfinished")),
        Figure("truncation", "cut off", -1, share("truncated")),
    )

    COUNTS: ClassVar[Mapping[str, Column]] = {
        "captions": one,
        "four_grams": "four_grams",
        "repeated_four_grams": "repeated",
        "looping_captions": "looping",
        "unfinished_captions": "unfinished",
        "truncated_captions": "truncated",
    }


def score_texts(captions: Mapping[int, str], truncated: Mapping[int, bool] | None = None) -> TextTable:
    """Count repetitions and ends of one caption per image.

    Args:
        captions: Image id -> caption.
        truncated: Image id -> whether the token limit ended the caption; None if nobody recorded it.

    Raises:
        DataError: No captions, or a caption about whose end ``truncated`` says nothing.
    """
    if not captions:
        raise DataError("there are no captions to score: generate at least one")
    image_ids = sorted(captions)
    missing = [] if truncated is None else [i for i in image_ids if i not in truncated]
    if missing:
        raise DataError(f"expected for every caption whether it was truncated, found nothing for image {missing[0]}")
    pairs = np.array([repeated_four_grams(captions[i]) for i in image_ids], dtype=np.int64)
    repetition = pairs[:, 1] / np.maximum(pairs[:, 0], 1)
    columns = {
        "four_grams": pairs[:, 0],
        "repeated": pairs[:, 1],
        "repetition": repetition,
        "looping": repetition > _LOOPING,
        "unfinished": np.array([not is_finished(captions[i]) for i in image_ids], dtype=np.bool_),
    }
    if truncated is not None:
        columns["truncated"] = np.array([truncated[i] for i in image_ids], dtype=np.bool_)
    return TextTable(np.array(image_ids, dtype=np.int64), columns)


def match_by_words(
    captions_a: Mapping[int, str],
    captions_b: Mapping[int, str],
    table_a: ChairTable,
    table_b: ChairTable,
    ground_truth: Mapping[int, Collection[str]],
    matcher: ChairMatcher,
) -> tuple[Table, Table]:
    """CHAIR of both captions of every image, cut to the shorter one's number of words.

    Args:
        captions_a: Image id -> caption of the method.
        captions_b: Image id -> caption of the baseline.
        table_a: ``score_captions(captions_a, ground_truth, matcher)``; only captions that are cut are matched again.
        table_b: The same of ``captions_b``.
        ground_truth: Image id -> objects in the image.
        matcher: The matcher of both tables.

    Raises:
        DataError: The captions or tables are not about the same images.
    """
    ids = _common_images(table_a, table_b)
    if ids != sorted(captions_a) or ids != sorted(captions_b):
        raise DataError("the captions are not those of the tables: score both methods on the same ids")
    nodes: tuple[list[Sequence[str]], list[Sequence[str]]] = ([], [])
    for row, image_id in enumerate(ids):
        texts = (captions_a[image_id], captions_b[image_id])
        shorter = min(len(_PIECE.findall(text)) for text in texts)
        for text, table, chosen in zip(texts, (table_a, table_b), nodes, strict=True):
            cut = first_words(text, shorter)
            chosen.append(table.nodes[row] if cut == text else matcher.match(cut).nodes)
    return _mentions(ids, nodes[0], ground_truth), _mentions(ids, nodes[1], ground_truth)


def _mentions(ids: Sequence[int], nodes: Sequence[Sequence[str]], truth: Mapping[int, Collection[str]]) -> Table:
    return Table(np.asarray(ids, dtype=np.int64), count_mentions(ids, nodes, truth))


def match_by_mentions(
    table_a: ChairTable, table_b: ChairTable, ground_truth: Mapping[int, Collection[str]]
) -> tuple[Table, Table]:
    """CHAIR of the first mentions of both captions of every image, as many as the one with fewer has.

    Args:
        table_a: Table of the method.
        table_b: Table of the baseline.
        ground_truth: Image id -> objects in the image.

    Raises:
        DataError: The tables are not about the same images.
    """
    ids = _common_images(table_a, table_b)
    fewer = [min(len(a), len(b)) for a, b in zip(table_a.nodes, table_b.nodes, strict=True)]
    a, b = (
        _mentions(ids, [nodes[:count] for nodes, count in zip(table.nodes, fewer, strict=True)], ground_truth)
        for table in (table_a, table_b)
    )
    return a, b


def _common_images(table_a: ChairTable, table_b: ChairTable) -> list[int]:
    if not np.array_equal(table_a.image_ids, table_b.image_ids):
        raise DataError("the two tables are not about the same images: score both methods on the same ids")
    return [int(i) for i in table_a.image_ids]


def text_differences(table: Table, baseline: Table, seed: int) -> dict[str, Any]:
    """Paired differences of a method's rates of repetition, loops and truncated captions to the baseline's."""
    figures = [figure for figure in TextTable.FIGURES if figure.name != "unfinished"]
    return differences(figures, table, baseline, seed)


def broken_text(rises: Mapping[str, float | None]) -> list[str]:
    """Name what breaks a method's text: each rate that rises by more than :data:`BROKEN_BY`, with its rise in points.

    Args:
        rises: Rate (``repetition``, ``looping``, ``truncation``) to the method's minus the baseline's; others are not
            looked at.
    """
    titles = {figure.name: figure.title for figure in TextTable.FIGURES if figure.name != "unfinished"}
    found = {title: rise for name, title in titles.items() if (rise := rises.get(name)) is not None}
    return [f"{title} +{100 * rise:.1f}" for title, rise in found.items() if rise > BROKEN_BY]


def length_matched(
    captions: tuple[Mapping[int, str], Mapping[int, str]],
    tables: tuple[ChairTable, ChairTable],
    truth: Mapping[int, Collection[str]],
    matcher: ChairMatcher,
    seed: int,
) -> dict[str, Any]:
    """CHAIR at equal words and at equal mentions, with the paired difference.

    Args:
        captions: Of the method and of the baseline, image id -> caption.
        tables: Their CHAIR tables.
        truth: Image id -> objects in the image.
        matcher: The matcher of both tables.
        seed: Seed of the bootstrap.
    """
    found = {
        "words": match_by_words(*captions, *tables, truth, matcher),
        "mentions": match_by_mentions(*tables, truth),
    }
    return {
        name: {
            "counts": {"method": own.sums(MENTION_COUNTS), "baseline": other.sums(MENTION_COUNTS)},
            "chair_i": _compared(CHAIR_I, own, other, seed),
            "chair_s": _compared(CHAIR_S, own, other, seed),
        }
        for name, (own, other) in found.items()
    }


def _compared(statistic: Statistic, own: Any, other: Any, seed: int) -> dict[str, Any]:
    return {
        **finite({"method_value": statistic.of(own), "baseline_value": statistic.of(other)}),
        "difference": interval_dict(statistic.difference(own, other, seed=seed)),
    }
