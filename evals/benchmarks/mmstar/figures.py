"""MMStar (Chen et al. 2024, arXiv:2403.20330): questions with four options, which need the image, on 6 axes.

    accuracy = right answers / answers,  average = mean accuracy of the sub-axes

It measures no hallucination but what a method costs in ability. The official script divides by 250 and 1500 whatever
the number of answers; here the answers that are there are counted, which is the same of all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from vlmfix.errors import DataError

from ...data.source import image_number
from ...stats.bootstrap import FloatArray
from ...stats.figures import Column, Figure, SumStatistic, divide, one, share, stacked
from ...stats.table import Table

LETTERS = "ABCD"

AXES: Mapping[str, tuple[str, ...]] = {
    "coarse perception": ("image scene and topic", "image style & quality", "image emotion"),
    "fine-grained perception": ("object counting", "recognition", "localization"),
    "instance reasoning": (
        "single-instance reasoning",
        "cross-instance attribute reasoning",
        "cross-instance relation reasoning",
    ),
    "logical reasoning": ("code & sequence reasoning", "diagram reasoning", "common reasoning"),
    "science & technology": (
        "biology & chemistry & physics",
        "electronics & energy & mechanical eng.",
        "geography & earth science & agriculture",
    ),
    "math": ("geometry", "numeric commonsense and calculation", "statistical reasoning"),
}
"""Axis -> its sub-axes."""

SUB_AXES = tuple((axis, sub) for axis, subs in AXES.items() for sub in subs)


@dataclass(frozen=True)
class MmstarQuestion:
    """One question about one image.

    Attributes:
        number: Its index, from 0.
        text: The question with its options.
        right: The letter of the right one.
        axis: One of :data:`AXES`.
        sub_axis: One of the axis's.
        path: The image's file; None where only answers are scored.
    """

    number: int
    text: str
    right: str
    axis: str
    sub_axis: str
    path: Path | None = None

    @property
    def picture(self) -> str:
        """The image."""
        return str(self.number)

    unit = picture


def is_right(text: str, right: str) -> bool:
    """Whether the official rule finds the right letter where it looks for it.

    That is the first character, the second behind a bracket, and behind "option " or "the answer is ", case ignored. It
    looks for the right letter only, so that "Do not know" is right where D is.
    """
    text, letter = text.lower().strip().replace("\n", " "), right.lower()
    starts = (letter, f"({letter}", f"option {letter}", f"the answer is {letter}")
    return text.startswith(starts)


def _axes(table: Any) -> FloatArray:
    """Right answers and answers of each sub-axis: float64 [n, 36]."""
    parts = np.asarray(table.sub_axis)
    return stacked(*(part * (parts == i) for i in range(len(SUB_AXES)) for part in (table.correct, one(table))))


def _average(sums: FloatArray) -> FloatArray:
    correct, n = sums[..., 0::2], sums[..., 1::2]
    return divide(divide(correct, n, 0.0).sum(axis=-1), (n > 0).sum(axis=-1).astype(np.float64))


@dataclass(frozen=True, eq=False)
class MmstarTable(Table):
    """One row per question; its splits are the axes.

    Columns, [n]: ``correct`` and ``unparsed`` (right for no letter), bool; ``sub_axis``, the place in
    :data:`SUB_AXES`, int.
    """

    FIGURES: ClassVar[tuple[Figure, ...]] = (
        Figure("accuracy", "accuracy", 1, share("correct"), head_control=True, headline=True, help="right answers"),
        Figure("average", "average", 1, SumStatistic(_axes, _average), help="mean accuracy of the sub-axes"),
    )
    COUNTS: ClassVar[Mapping[str, Column]] = {"n": one, "correct": "correct", "unparsed": "unparsed"}

    def sub_axes(self) -> dict[str, MmstarTable]:
        """The table of each sub-axis that was answered, in the official order."""
        rows = {name: np.flatnonzero(self.sub_axis == i) for i, name in enumerate(SUB_AXES)}
        return {f"{axis}({sub})": self.take(found) for (axis, sub), found in rows.items() if len(found)}


def score_answers(questions: Sequence[MmstarQuestion], answers: Sequence[str]) -> MmstarTable:
    """Score answers by the official rule.

    Args:
        questions: In any order, each once.
        answers: One per question.

    Raises:
        DataError: there is no question, or one stands twice.
    """
    if not questions or len({q.number for q in questions}) != len(questions):
        raise DataError("MMStar needs one answer to each question, and at least one")
    pairs = list(zip(questions, answers, strict=True))
    columns = {
        "correct": np.asarray([is_right(text, q.right) for q, text in pairs], dtype=np.bool_),
        "unparsed": np.asarray(
            [not any(is_right(text, each) for each in LETTERS) for _, text in pairs], dtype=np.bool_
        ),
        "sub_axis": np.asarray([SUB_AXES.index((q.axis, q.sub_axis)) for q in questions], dtype=np.int64),
    }
    return MmstarTable(
        np.asarray([image_number("mmstar", q.picture) for q in questions], dtype=np.int64),
        columns,
        tuple(q.axis for q in questions),
        tuple(q.picture for q in questions),
        tuple(q.right for q in questions),
    )
