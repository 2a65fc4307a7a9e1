"""ScienceQA (Lu et al. 2022, arXiv:2209.09513): school questions with two to five choices, about half with an image.

It measures no hallucination but what a method costs in ability. Answers are read as LLaVA's script does: a letter
alone, a letter with ". " behind it, or one "The answer is X." in the text; anything else is wrong. A letter without a
choice of its own is wrong too, but is read.

``vlmfix score scienceqa`` takes LLaVA's rows (question_id, prompt, text) with ``--questions problems.json``.
"""

from __future__ import annotations

import json
import re
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from vlmfix.errors import DataError

from ...data.answers import AnswerFile, FileAnswers
from ...data.matching import Asked
from ...data.samples import Answers, Records
from ...data.source import PREFIX, dataset_rows, image_number, is_dataset, row_image, text_field, whole_number
from ...stats.figures import Column, Figure, one, share
from ...stats.table import Table
from ..base import write_lines
from ..questions import Questions, add_question_file

LETTERS = "ABCDE"

_ANSWER = re.compile(r"The answer is ([A-Z]).")
"""As in the official script: any character may stand behind the letter, but one must."""


@dataclass(frozen=True)
class ScienceQuestion:
    """One question.

    Attributes:
        id: Its id among the problems, or its place in a data set.
        question: The question, without its hint and choices.
        hint: What is said before it; often empty.
        choices: The possible answers.
        right: The place of the right one.
        has_image: Whether it is about an image.
        path: The image's file; None without an image, and where only answers are scored.
    """

    id: str
    question: str
    hint: str
    choices: tuple[str, ...]
    right: int
    has_image: bool
    path: Path | None = None

    @property
    def text(self) -> str:
        """Hint, question and choices, as lmms-eval asks them."""
        listed = (f"{letter}. {choice}" for letter, choice in zip(LETTERS, self.choices, strict=False))
        return "\n".join([*([f"Context: {self.hint}"] if self.hint else []), self.question, *listed])

    @property
    def picture(self) -> str:
        """The image."""
        return self.id

    unit = picture


def read_letter(text: str) -> str | None:
    """The letter that the official rule reads; None if it finds none, or several."""
    if text in tuple(LETTERS):
        return text
    if text[:1] in tuple(LETTERS) and text[1:3] == ". ":
        return text[0]
    found = _ANSWER.findall(text)
    return str(found[0]) if len(found) == 1 else None


@dataclass(frozen=True, eq=False)
class ScienceTable(Table):
    """One row per question; its splits are "image" and "text".

    Columns, [n]: ``correct``, ``unparsed`` and ``with_image``, bool.
    """

    FIGURES: ClassVar[tuple[Figure, ...]] = (
        Figure(
            *("image_accuracy", "IMG accuracy", 1, share(lambda t: t.correct & t.with_image, "with_image")),
            headline=True,
            ability=True,
            help="right answers to questions with an image",
        ),
        Figure("accuracy", "accuracy", 1, share("correct"), help="right answers"),
    )
    COUNTS: ClassVar[Mapping[str, Column]] = {
        "n": one,
        "correct": "correct",
        "with_image": "with_image",
        "correct_with_image": lambda t: t.correct & t.with_image,
        "unparsed": "unparsed",
    }


def score_answers(questions: Sequence[ScienceQuestion], answers: Sequence[str]) -> ScienceTable:
    """Score answers by the official rule.

    Args:
        questions: In any order, each once.
        answers: One per question.

    Raises:
        DataError: There is no question, or one stands twice.
    """
    if not questions or len({q.id for q in questions}) != len(questions):
        raise DataError("ScienceQA needs one answer to each question, and at least one")
    letters = [read_letter(text) for text in answers]
    right = [letter == LETTERS[q.right] for q, letter in zip(questions, letters, strict=True)]
    columns = {
        "correct": np.asarray(right, dtype=np.bool_),
        "unparsed": np.asarray([letter is None for letter in letters], dtype=np.bool_),
        "with_image": np.asarray([q.has_image for q in questions], dtype=np.bool_),
    }
    return ScienceTable(
        np.asarray([image_number("scienceqa", q.id) for q in questions], dtype=np.int64),
        columns,
        tuple("image" if q.has_image else "text" for q in questions),
        tuple(q.id for q in questions),
        tuple(LETTERS[q.right] for q in questions),
    )


@dataclass(frozen=True)
class ScienceQa(Questions):
    """The questions of ScienceQA, or some of them."""

    name: ClassVar[str] = "scienceqa"
    title: ClassVar[str] = "ScienceQA"
    summary: ClassVar[str] = "school questions with choices: what a method costs in ability"
    figures = ScienceTable.FIGURES
    records: ClassVar[Records] = "text"
    row_by_row: ClassVar[bool] = True
    prompt_template: ClassVar[str] = "{question}\nAnswer with the option's letter from the given choices directly."
    identified_by: ClassVar[tuple[str, ...]] = ("id", "text", "right")

    asked: tuple[ScienceQuestion, ...]

    @classmethod
    def load(cls, where: str) -> list[ScienceQuestion]:
        """Read the questions and their images.

        Args:
            where: A data set with question, choices, answer, hint and image, such as lmms-lab/ScienceQA
                (``datasets:`` may be left out).

        Raises:
            DataError: The data set cannot be read, or a row lacks a field.
        """
        found = []
        for number, (place, row) in enumerate(dataset_rows(where if is_dataset(where) else PREFIX + where)):
            path = row_image(row, place)
            found.append(replace(_question(str(number), row, place), has_image=path is not None, path=path))
        return found

    def score(self, answers: Answers) -> ScienceTable:
        """One row per question."""
        return score_answers(self.asked, self.texts(answers))

    def about(self) -> str:
        """Questions and the rule."""
        images = sum(q.has_image for q in self.asked)
        asked = f"{len(self.asked)} questions, {images} with an image"
        return f"ScienceQA: {asked}, LLaVA's rule; ability, not hallucination"

    def export(self, folder: Path, answers: Answers) -> None:
        """``scienceqa.jsonl`` in LLaVA's form, and ``problems.json``, of which its script reads the right answers."""
        pairs = list(zip(self.asked, self.texts(answers), strict=True))
        rows = [{"question_id": q.id, "prompt": "<image>\n" * q.has_image + q.text, "text": text} for q, text in pairs]
        write_lines(folder / "scienceqa.jsonl", rows)
        problems = {
            q.id: {"question": q.question, "choices": q.choices, "answer": q.right, "hint": q.hint}
            | {"image": "image.png" if q.has_image else None, "split": "test"}
            for q in self.asked
        }
        (folder / "problems.json").write_text(json.dumps(problems, ensure_ascii=False), encoding="utf-8")

    @classmethod
    def add_score_arguments(cls, parser: ArgumentParser) -> None:
        """Add what scoring needs to know beside the answers."""
        add_question_file(parser, "problems.json, of which the split test is scored")

    @classmethod
    def from_files(cls, path: Path, options: Namespace) -> tuple[ScienceQa, FileAnswers]:
        """Read answers, and the problems that they are to.

        Raises:
            DataError: A question has two answers, or one has none and ``--subset`` is not typed; or a file is broken.
        """
        file = AnswerFile.of(path, options)
        file.usual = ("text",)
        questions = read_problems(options.questions)
        asked = [Asked((q.id,), q.question, truth=frozenset({LETTERS[q.right].lower()})) for q in questions]
        found = file.matched(file.rows(), asked, source=str(options.questions))
        given = file.given(list(found.values()), [asked[i] for i in found])
        return cls.answered(file, [questions[i] for i in found], [each.answer() for each in given])


def read_problems(path: Path) -> list[ScienceQuestion]:
    """The problems of the split test.

    Raises:
        DataError: The file is missing, no JSON object of problems, or has none of the split.
    """
    try:
        problems = json.loads(path.read_text(encoding="utf-8"))
        rows = {number: row for number, row in problems.items() if row.get("split", "test") == "test"}
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(
            f"{path}: expected problems.json of ScienceQA, an object of problems by id ({error})"
        ) from error
    if not rows:
        raise DataError(f"{path} holds no problem of the split test")
    return [_question(number, row, f"{path}, problem {number}") for number, row in rows.items()]


def _question(number: str, row: Mapping[str, Any], place: str) -> ScienceQuestion:
    choices = row.get("choices")
    if not isinstance(choices, list | tuple) or not 2 <= len(choices) <= len(LETTERS):
        raise DataError(f"{place}: expected two to five choices, found {str(choices)[:40]!r}")
    wanted = f"the place of the right choice, from 0 to {len(choices) - 1}, under 'answer'"
    right = whole_number(row.get("answer"), place, wanted, most=len(choices) - 1)
    hint, text = str(row.get("hint") or ""), text_field(row, ("question",), place)
    return ScienceQuestion(number, text, hint.strip(), tuple(map(str, choices)), right, bool(row.get("image")))
