"""CHAIR: which objects a caption names that are not in the image (Rohrbach et al. 2018, arXiv:1809.02156).

A caption becomes a list of mentions, each mapped to one of the 80 COCO objects. With GT(i) the objects of image i
(instance annotations united with the objects its reference captions name), M_i the mentions (a list, repeats count) and
D_i their set:

    CHAIR_s   = |{i : some m in M_i is not in GT(i)}| / captions
    CHAIR_i   = sum_i |{m in M_i : m not in GT(i)}| / sum_i |M_i|
    recall    = sum_i |D_i & GT(i)| / sum_i |GT(i)|
    precision = sum_i |D_i & GT(i)| / sum_i |D_i|,     F1 = 2 * precision * recall / (precision + recall)

The two official word normalisations (modes of :class:`~vlmfix.evals.benchmarks.coco_objects.ChairMatcher`) differ by up
to three points of CHAIR_s on the same
captions: the mode belongs to every figure, and two modes never go into one table.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from vlmfix.errors import DataError

from ...data.write import digest
from ...stats.figures import Column, Figure, one, share
from ...stats.table import Table
from ..coco_objects import ChairMatcher, ChairMode

CHAIR_I = share("hallucinated", "mentions")
CHAIR_S = share(lambda t: t.hallucinated > 0)


def count_mentions(
    image_ids: Sequence[int], nodes: Sequence[Sequence[str]], ground_truth: Mapping[int, Collection[str]]
) -> dict[str, NDArray[np.int64]]:
    """Count the objects that captions mention.

    Args:
        image_ids: The image of each caption, [n].
        nodes: The objects each caption mentions, in order, repeats included.
        ground_truth: Image id -> objects in the image.

    Returns:
        int64 [n] each: ``mentions`` (repeats counted), ``hallucinated`` (mentions of objects not in the ground truth),
        ``distinct`` (different objects mentioned), ``recalled`` (those of them in the ground truth) and ``gt_objects``
        (objects in the ground truth).
    """
    truth = [frozenset(ground_truth[i]) for i in image_ids]

    def column(values: Iterable[int]) -> NDArray[np.int64]:
        return np.fromiter(values, dtype=np.int64, count=len(image_ids))

    return {
        "mentions": column(len(names) for names in nodes),
        "hallucinated": column(sum(n not in gt for n in names) for names, gt in zip(nodes, truth, strict=True)),
        "distinct": column(len(set(names)) for names in nodes),
        "recalled": column(len(gt.intersection(names)) for names, gt in zip(nodes, truth, strict=True)),
        "gt_objects": column(len(gt) for gt in truth),
    }


MENTION_COUNTS: Mapping[str, Column] = {
    "captions": one,
    "hallucinated_captions": lambda table: table.hallucinated > 0,
    "mentions": "mentions",
    "hallucinated_mentions": "hallucinated",
    "gt_objects": "gt_objects",
    "recalled_gt_objects": "recalled",
    "generated_distinct": "distinct",
}
"""Official name -> column of :func:`count_mentions`."""


@dataclass(frozen=True, eq=False)
class ChairTable(Table):
    """What CHAIR counts, one row per caption, by image id.

    Columns: those of :func:`count_mentions`; ``words`` int64 [n], pieces when the caption is split at single spaces
    (length as in the POPE paper), 0 for an empty caption; ``tokens`` int64 [n], tokens after merging two-word names
    (length as in OPERA's script), present only with the punkt tokenizer, which alone counts them exactly.

    Attributes:
        nodes: The objects each caption mentions, in order.
        hallucinated_nodes: Those of them that are not in the ground truth.
        hallucinated_words: The same as the caption words them ("table" for "dining table").
        mode: Mode of the captions' matcher.
        ground_truth_mode: Mode the ground truth was made with.
    """

    FIGURES: ClassVar[tuple[Figure, ...]] = (
        Figure("chair_s", "CHAIR_s", -1, CHAIR_S, control="early stop", help="captions that name an object not there"),
        Figure(
            "chair_i",
            "CHAIR_i",
            -1,
            CHAIR_I,
            control="early stop",
            head_control=True,
            headline=True,
            less="fewer invented objects",
            more="more invented objects",
            help="mentions of objects that are not there",
        ),
        Figure(
            "recall",
            "recall",
            1,
            share("recalled", "gt_objects"),
            headline=True,
            less="lower recall",
            more="higher recall",
            help="objects of the image that are named",
        ),
        Figure("precision", "precision", 1, share("recalled", "distinct"), column=False),
        Figure(
            "f1",
            "F1",
            1,
            # = 2PR/(P+R), written so that it stays defined when nothing is recalled
            share(lambda t: 2 * t.recalled, lambda t: t.gt_objects + t.distinct),
            head_control=True,
            headline=True,
            help="harmonic mean of precision and recall of objects",
        ),
        Figure("length_words", "words", 0, share("words"), percent=False, help="words per caption"),
        Figure("length_tokens", "tokens", 0, share(lambda t: t.columns.get("tokens", np.nan * t.words)), column=False),
    )
    COUNTS: ClassVar[Mapping[str, Column]] = {**MENTION_COUNTS, "tokens_after_double_words": "tokens"}
    PER_ROW: ClassVar[tuple[str, ...]] = (*Table.PER_ROW, "nodes", "hallucinated_nodes", "hallucinated_words")

    nodes: tuple[tuple[str, ...], ...] = field(default=(), repr=False)
    hallucinated_nodes: tuple[tuple[str, ...], ...] = field(default=(), repr=False)
    hallucinated_words: tuple[tuple[str, ...], ...] = field(default=(), repr=False)
    mode: ChairMode = "original"
    ground_truth_mode: ChairMode = "original"


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
        ground_truth: Image id -> objects in the image, from :func:`~vlmfix.evals.benchmarks.coco_objects.ground_truth`;
            other images in it are ignored.
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
    columns = count_mentions(image_ids, [match.nodes for match in matches], ground_truth)
    columns["words"] = np.array([len(captions[i].split(" ")) if captions[i] else 0 for i in image_ids], dtype=np.int64)
    if matcher.exact_tokens:
        columns["tokens"] = np.array([len(match.tokens) for match in matches], dtype=np.int64)
    return ChairTable(
        np.array(image_ids, dtype=np.int64),
        columns,
        truth=tuple(digest(sorted(gt))[:8] for gt in truth),
        nodes=tuple(match.nodes for match in matches),
        hallucinated_nodes=tuple(tuple(node for _, node in pairs) for pairs in wrong),
        hallucinated_words=tuple(tuple(word for word, _ in pairs) for pairs in wrong),
        mode=matcher.mode,
        ground_truth_mode=ground_truth_mode or matcher.mode,
    )


def invented_by_category(table: ChairTable) -> dict[str, int]:
    """Category -> captions that name it where it is not."""
    return dict(sorted(Counter(name for names in table.hallucinated_nodes for name in set(names)).items()))
