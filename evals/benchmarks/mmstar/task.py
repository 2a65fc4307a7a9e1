"""MMStar as a task: does a method that lowers hallucination cost ability?

``vlmfix score mmstar`` takes the official rows: index, question, answer (the right letter, never read as the model's),
category, l2_category and prediction.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from vlmfix.errors import DataError

from ...data.answers import AnswerFile, FileAnswers
from ...data.matching import Asked, Row
from ...data.samples import Answers, Records
from ...data.source import PREFIX, dataset_rows, is_dataset, own_image, text_field, whole_number
from ...stats.bootstrap import finite
from ...tables import number, plain_table
from ..base import ScoredFile, write_lines
from ..questions import Questions
from .figures import AXES, LETTERS, MmstarQuestion, MmstarTable, score_answers

QUESTIONS = 1500
"""Questions of the release."""


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
