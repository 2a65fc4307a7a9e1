"""MMStar (Chen et al. 2024, arXiv:2403.20330): questions with four options, which need the image, on 6 axes.

    accuracy = right answers / answers,  average = mean accuracy of the sub-axes

It measures not hallucination but what a method costs in ability. The official script always divides by 250 and 1500.
Here figures are shares of the answers that are there, which is the same if all questions are answered.

``vlmfix score mmstar`` takes the official rows: index, question, answer (the right letter, never read as the model's),
category, l2_category and prediction.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from vlmfix.errors import DataError

from ...data.answers import AnswerFile, FileAnswers
from ...data.matching import Asked, Row
from ...data.samples import Answers, Records
from ...data.source import PREFIX, dataset_rows, image_number, is_dataset, own_image, text_field, whole_number
from ...stats.bootstrap import FloatArray, finite
from ...stats.figures import Column, Figure, SumStatistic, divide, one, share, stacked
from ...stats.table import Table
from ...tables import number, plain_table
from ..base import ScoredFile, write_lines
from ..questions import Questions

QUESTIONS = 1500
"""Questions of the release."""

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
        Figure(
            *("accuracy", "accuracy", 1, share("correct")),
            head_control=True,
            headline=True,
            ability=True,
            help="right answers",
        ),
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


@dataclass(frozen=True)
class Mmstar(Questions):
    """The questions of MMStar, or some of them."""

    name: ClassVar[str] = "mmstar"
    title: ClassVar[str] = "MMStar"
    summary: ClassVar[str] = "questions with four options: what a method costs in ability"
    figures = MmstarTable.FIGURES
    records: ClassVar[Records] = "text"
    row_by_row: ClassVar[bool] = True
    prompt_template: ClassVar[str] = "{question}\nAnswer with the option's letter from the given choices directly."
    identified_by: ClassVar[tuple[str, ...]] = ("number", "text", "right")

    asked: tuple[MmstarQuestion, ...]

    @classmethod
    def load(cls, where: str) -> list[MmstarQuestion]:
        """Read the questions and their images.

        Args:
            where: A data set with index, question, image, answer, category and l2_category
                (``datasets:`` may be left out).

        Raises:
            DataError: The data set cannot be read, or a row lacks a field or its image.
        """
        rows = dataset_rows(where if is_dataset(where) else PREFIX + where)
        return [replace(_question(row, place), path=own_image(row, place)) for place, row in rows]

    def score(self, answers: Answers) -> MmstarTable:
        """One row per question."""
        return score_answers(self.asked, self.texts(answers))

    def about(self) -> str:
        """Questions and the rule."""
        return f"MMStar: {len(self.asked)} questions of {QUESTIONS}, official rule; ability, not hallucination"

    def breakdown(self, table: MmstarTable) -> dict[str, dict[str, float]]:
        """Accuracy per axis."""
        parts = table.by_split()
        return {axis: {"accuracy": 100 * parts[axis].summary()["accuracy"]} for axis in AXES if axis in parts}

    def export(self, folder: Path, answers: Answers) -> None:
        """``mmstar.jsonl``: the official columns, of which the official script reads a workbook."""
        rows = [
            {
                "index": q.number,
                "question": q.text,
                "answer": q.right,
                "category": q.axis,
                "l2_category": q.sub_axis,
                "prediction": text,
            }
            for q, text in zip(self.asked, self.texts(answers), strict=True)
        ]
        write_lines(folder / "mmstar.jsonl", rows)

    @classmethod
    def from_files(cls, path: Path, options: Namespace) -> tuple[Mmstar, FileAnswers]:
        """Read answers with their questions.

        Raises:
            DataError: A row lacks a field, a question has two answers, or one has none and ``--subset`` is not typed.
        """
        file = AnswerFile.of(path, options)
        file.usual = ("prediction",)
        made = [(_question(row.fields, row.where), _labelled(row, file.text_key)) for row in file.rows()]
        questions = list({q.number: q for q, _ in reversed(made)}.values())[::-1]
        asked = [Asked((q.picture,), q.text, truth=frozenset({q.right.lower()})) for q in questions]
        found = file.matched([row for _, row in made], asked, fields=("index",), remedy="")
        if len(found) != QUESTIONS and not file.subset:
            raise DataError(
                f"{path} answers {len(found)} of {QUESTIONS} questions: answer them all, or type --subset to score "
                "what is there"
            )
        file.covers({"questions": (len(found), QUESTIONS)})
        given = file.given(list(found.values()), [asked[i] for i in found])
        return cls.answered(file, [questions[i] for i in found], [each.answer() for each in given])

    def report_file(self, own: ScoredFile, other: ScoredFile | None, seed: int) -> tuple[dict[str, Any], str]:
        """All, the axes and the sub-axes."""
        table: MmstarTable = own.table
        axes, sub_axes = table.by_split(), table.sub_axes()
        parts = {"all": table, **{axis: axes[axis] for axis in AXES if axis in axes}, **sub_axes}
        lines = [["", "n", "accuracy", "unparsed"]]
        for name, part in parts.items():
            counts = part.counts()
            lines.append([name, str(counts["n"]), number(part.summary()["accuracy"]), str(counts["unparsed"])])
        summary = finite(table.summary())
        text = f"MMStar, official rule, {own.path}\n{plain_table(lines)}"
        text += f"\naverage of the sub-axes: {number(summary['average'])}"
        result = {"counts": table.counts(), "summary": summary}
        result |= {"sub_axes": {name: part.counts() for name, part in sub_axes.items()}}
        return result, text


def _question(row: Mapping[str, Any], place: str) -> MmstarQuestion:
    wanted = f"an index from 0 to {QUESTIONS - 1}"
    index = whole_number(text_field(row, ("index",), place), place, wanted, most=QUESTIONS - 1)
    right = text_field(row, ("answer",), place).strip().upper()
    axis = text_field(row, ("category",), place)
    sub_axis = text_field(row, ("l2_category", "l2-category"), place)
    if right not in tuple(LETTERS):
        raise DataError(f"{place}: expected the right letter under 'answer', found {right[:40]!r}")
    if sub_axis not in AXES.get(axis, ()):
        raise DataError(f"{place}: MMStar has no axis {axis!r} with {sub_axis!r}")
    return MmstarQuestion(index, text_field(row, ("question",), place), right, axis, sub_axis)


def _labelled(row: Row, text_key: str | None) -> Row:
    """The row without what is read of it: its ``answer`` is the label."""
    if text_key == "answer":
        raise DataError(
            f"{row.where}: 'answer' is the right letter in MMStar's files; name the model's words otherwise"
        )
    names = {"answer": "label"}
    return Row(row.where, {names.get(k, k): v for k, v in row.fields.items() if k not in ("category", "l2_category")})
