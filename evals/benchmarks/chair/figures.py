"""CHAIR: which objects a caption names that are not in the image (Rohrbach et al. 2018, arXiv:1809.02156).

A caption becomes a list of mentions, each mapped to one of the 80 COCO objects. With GT(i) the objects of image i
(instance annotations united with the objects its reference captions name), M_i the mentions (a list, repeats count) and
D_i their set:

    CHAIR_s   = |{i : some m in M_i is not in GT(i)}| / captions
    CHAIR_i   = sum_i |{m in M_i : m not in GT(i)}| / sum_i |M_i|
    recall    = sum_i |D_i & GT(i)| / sum_i |GT(i)|
    precision = sum_i |D_i & GT(i)| / sum_i |D_i|,     F1 = 2 * precision * recall / (precision + recall)

The two official word normalisations (:class:`ChairMatcher` modes) differ by up to three points of CHAIR_s on the same
captions: the mode belongs to every figure, and two modes never go into one table.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from vlmfix.errors import DataError

from ...stats.intervals import Statistic, by_name, one, ratio
from .matcher import ChairMatcher
from .words import ChairMode

IntArray = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class MentionTable:
    """CHAIR's counts of mentioned objects, one row per caption; every figure is a ratio of their sums.

    Attributes:
        image_ids: int64 [n], sorted.
        mentions: int64 [n], object mentions, repeats counted.
        hallucinated: int64 [n], mentions of objects not in the ground truth.
        distinct: int64 [n], different objects mentioned.
        recalled: int64 [n], different objects mentioned that are in the ground truth.
        gt_objects: int64 [n], objects in the ground truth.
    """

    image_ids: IntArray
    mentions: IntArray
    hallucinated: IntArray
    distinct: IntArray
    recalled: IntArray
    gt_objects: IntArray

    def __len__(self) -> int:
        return len(self.image_ids)

    def counts(self) -> dict[str, int]:
        """Corpus sums."""
        return {
            "captions": len(self),
            "hallucinated_captions": int((self.hallucinated > 0).sum()),
            "mentions": int(self.mentions.sum()),
            "hallucinated_mentions": int(self.hallucinated.sum()),
            "gt_objects": int(self.gt_objects.sum()),
            "recalled_gt_objects": int(self.recalled.sum()),
            "generated_distinct": int(self.distinct.sum()),
        }


def count_mentions(
    image_ids: Sequence[int], nodes: Sequence[Sequence[str]], ground_truth: Mapping[int, Collection[str]]
) -> MentionTable:
    """Count the objects that captions mention.

    Args:
        image_ids: The images, sorted.
        nodes: The objects each caption mentions, in order, repeats included.
        ground_truth: Image id -> objects in the image.
    """
    truth = [frozenset(ground_truth[i]) for i in image_ids]

    def column(values: Iterable[int]) -> IntArray:
        return np.fromiter(values, dtype=np.int64, count=len(image_ids))

    return MentionTable(
        image_ids=column(image_ids),
        mentions=column(len(names) for names in nodes),
        hallucinated=column(sum(n not in gt for n in names) for names, gt in zip(nodes, truth, strict=True)),
        distinct=column(len(set(names)) for names in nodes),
        recalled=column(len(gt.intersection(names)) for names, gt in zip(nodes, truth, strict=True)),
        gt_objects=column(len(gt) for gt in truth),
    )


@dataclass(frozen=True, eq=False)
class ChairTable(MentionTable):
    """Everything CHAIR counts of whole captions.

    Attributes:
        words: int64 [n], pieces when the caption is split at single spaces (length as in the POPE paper); 0 for an
            empty caption.
        tokens: int64 [n], tokens after merging two-word names (length as in OPERA's script), or None: only the punkt
            tokenizer counts them exactly.
        nodes: The objects each caption mentions, in order.
        hallucinated_nodes: Those of them that are not in the ground truth.
        hallucinated_words: The same as the caption words them ("table" for "dining table").
        mode: Mode of the captions' matcher.
        ground_truth_mode: Mode the ground truth was made with.
    """

    words: IntArray
    tokens: IntArray | None
    nodes: tuple[tuple[str, ...], ...] = field(repr=False)
    hallucinated_nodes: tuple[tuple[str, ...], ...] = field(repr=False)
    hallucinated_words: tuple[tuple[str, ...], ...] = field(repr=False)
    mode: ChairMode
    ground_truth_mode: ChairMode

    def counts(self) -> dict[str, int]:
        """Corpus sums; ``tokens_after_double_words`` is present only if the tokenizer counts them exactly."""
        counts = super().counts()
        if self.tokens is not None:
            counts["tokens_after_double_words"] = int(self.tokens.sum())
        return counts

    def summary(self) -> dict[str, float]:
        """The figures as fractions (0 to 1) and the mean lengths per caption.

        NaN stands for a zero denominator and for a length in tokens that is not known exactly (regex tokenizer).
        """
        c = self.counts()
        recall = _ratio(c["recalled_gt_objects"], c["gt_objects"])
        precision = _ratio(c["recalled_gt_objects"], c["generated_distinct"])
        return {
            "chair_s": _ratio(c["hallucinated_captions"], c["captions"]),
            "chair_i": _ratio(c["hallucinated_mentions"], c["mentions"]),
            "recall": recall,
            "precision": precision,
            # = 2PR/(P+R), written so that it stays defined when nothing is recalled
            "f1": _ratio(2 * c["recalled_gt_objects"], c["gt_objects"] + c["generated_distinct"]),
            "length_words": _ratio(int(self.words.sum()), len(self)),
            "length_tokens": math.nan if self.tokens is None else _ratio(int(self.tokens.sum()), len(self)),
        }


def score_captions(
    captions: Mapping[int, str],
    ground_truth: Mapping[int, Collection[str]],
    matcher: ChairMatcher,
    *,
    ground_truth_mode: ChairMode | None = None,
) -> ChairTable:
    """Count mentions and hallucinations of one caption per image.

    Args:
        captions: Image id -> caption.
        ground_truth: Image id -> objects in the image, from :func:`ground_truth`; other images in it are ignored.
        matcher: Finds the mentions.
        ground_truth_mode: The mode ``ground_truth`` was made with, if it is not the matcher's.

    Raises:
        DataError: no captions, or a caption of an image that has no ground truth.
    """
    if not captions:
        raise DataError("CHAIR got no captions to score: generate at least one")
    missing = sorted(set(captions) - set(ground_truth))
    if missing:
        raise DataError(
            f"{len(missing)} captions belong to images without ground truth (first: image {missing[0]}): "
            "build it for these ids too"
        )
    image_ids = sorted(captions)
    matches = [matcher.match(captions[i]) for i in image_ids]
    truth = [frozenset(ground_truth[i]) for i in image_ids]
    wrong = [
        [(word, node) for word, node in zip(match.words, match.nodes, strict=True) if node not in gt]
        for match, gt in zip(matches, truth, strict=True)
    ]

    table = count_mentions(image_ids, [match.nodes for match in matches], ground_truth)
    return ChairTable(
        **vars(table),
        words=np.array([len(captions[i].split(" ")) if captions[i] else 0 for i in image_ids], dtype=np.int64),
        tokens=np.array([len(m.tokens) for m in matches], dtype=np.int64) if matcher.exact_tokens else None,
        nodes=tuple(match.nodes for match in matches),
        hallucinated_nodes=tuple(tuple(node for _, node in pairs) for pairs in wrong),
        hallucinated_words=tuple(tuple(word for word, _ in pairs) for pairs in wrong),
        mode=matcher.mode,
        ground_truth_mode=ground_truth_mode or matcher.mode,
    )


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else math.nan


def invented_by_category(table: ChairTable) -> dict[str, int]:
    """Category -> captions that name it where it is not."""
    return dict(sorted(Counter(name for names in table.hallucinated_nodes for name in set(names)).items()))


CHAIR_STATISTICS: Mapping[str, Statistic] = by_name(
    ratio("chair_s", lambda t: t.hallucinated > 0, one),
    ratio("chair_i", lambda t: t.hallucinated, lambda t: t.mentions),
    ratio("recall", lambda t: t.recalled, lambda t: t.gt_objects),
    ratio("precision", lambda t: t.recalled, lambda t: t.distinct),
    ratio("f1", lambda t: 2 * t.recalled, lambda t: t.gt_objects + t.distinct),
    ratio("length_words", lambda t: t.words, one),
)
"""Statistics of a ``ChairTable``, named as in its ``summary()``."""
