"""Your own questions as a task: yes/no ones are scored as POPE's, free ones by the words of the right answer.

They are JSON lines (or one JSON list) of image, question and answer::

    {"image": "kitchen.jpg", "question": "Is there a dog in the image?", "answer": "no"}
    {"image": "kitchen.jpg", "question": "What is on the table?", "answer": ["a cup", "a mug"]}

``image`` is a file, relative to the file of questions; without it (or with null) the question is asked alone. An
``answer`` of yes or no makes a yes/no question, anything else a free one; a list holds answers that are all right. A
``kind`` (count, colour, ...) groups questions in the report.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from vlmfix.errors import DataError

from ...data.records import read_rows
from ...data.samples import Answers
from ...data.signs import without_signs
from ...data.source import dataset_rows, image_number, is_dataset, row_image
from ...data.write import file_digest
from ...stats.figures import Auc, Column, Figure, one, share
from ...stats.table import Table
from ..base import write_lines
from ..questions import Questions
from ..yes_no import CELLS, is_unparsed, parse_answer, says_yes, yes_no_columns

_PUNCTUATION = re.compile(r"[^\w\s]|_")

_ARTICLES = frozenset({"a", "an", "the"})


def words(text: str) -> list[str]:
    """The words that are compared."""
    text = without_signs(text).lower()
    return [word for word in _PUNCTUATION.sub(" ", text).split() if word not in _ARTICLES]


def is_exact(answer: str, right: Sequence[str]) -> bool:
    """Whether the answer is one of the right ones."""
    given = words(answer)
    return any(given == words(each) for each in right)


def contains(answer: str, right: Sequence[str]) -> bool:
    """Whether the words of a right answer stand in the answer, one behind the other."""
    given = words(answer)
    wanted = [found for each in right if (found := words(each))]
    return any(
        given[start : start + len(each)] == each for each in wanted for start in range(len(given) - len(each) + 1)
    )


@dataclass(frozen=True)
class CustomQuestion:
    """One question.

    Attributes:
        image: As the file names it; empty without one.
        path: The image's file, or None.
        text: The question.
        label: Whether yes is right; None for a free question.
        answers: The right answers of a free question; empty for a yes/no question.
        row: The line it was read from, without the image's bytes.
    """

    image: str
    path: Path | None
    text: str
    label: bool | None
    answers: tuple[str, ...]
    row: Mapping[str, Any]

    @property
    def unit(self) -> str:
        """What is chosen and resampled: the image, or a question without one."""
        return f"question {self.text}" if self.path is None else f"image {self.path.name} {self.image}"

    picture = unit

    @property
    def image_digest(self) -> str | None:
        """Digest of the image's file."""
        return None if self.path is None else file_digest(self.path)


def read_questions(rows: Iterable[tuple[str, Mapping[str, Any], Path | None]]) -> list[CustomQuestion]:
    """Read questions.

    Args:
        rows: Place for messages, fields, and the image's file.

    Raises:
        DataError: A row has no question or no answer, or a question about an image occurs twice; or there is no row.
    """
    found: list[CustomQuestion] = []
    seen: dict[tuple[Path | None, str], str] = {}
    for where, row, path in rows:
        text = row.get("question")
        if not isinstance(text, str) or not text.strip():
            raise DataError(f"{where}: expected 'question' with a text, found {text!r}")
        first = seen.setdefault((path, text), where)
        if first != where:
            raise DataError(f"{where}: the same question about the same image as {first}; ask it once")
        right = _answers(row.get("answer"), where)
        said = {each.strip().strip(".").lower() for each in right}
        label = "yes" in said if len(said) == 1 and said <= {"yes", "no"} else None
        image = row.get("image")
        name = image if isinstance(image, str) else "" if path is None else path.name
        kept = {name: value for name, value in row.items() if name != "image"}
        found.append(CustomQuestion(name, path, text, label, right if label is None else (), kept))
    if not found:
        raise DataError("there are no questions; expected lines with image, question and answer")
    return found


def _answers(value: Any, where: str) -> tuple[str, ...]:
    if isinstance(value, bool):
        return ("yes" if value else "no",)
    given = value if isinstance(value, (list, tuple)) else [value]
    right = tuple(str(each) for each in given if each is not None and str(each).strip())
    if not right:
        raise DataError(f"{where}: expected 'answer' (yes, no, a text, or a list of texts), found {value!r}")
    return right


@dataclass(frozen=True, eq=False)
class CustomTable(Table):
    """One row per question; the kind is the split.

    Columns: those of yes/no answers (see :mod:`vlmfix.evals.benchmarks.yes_no`), where free questions have neither
    label nor prediction; ``free``, ``exact`` and ``contains`` bool [n], the latter two false on yes/no questions.
    """

    FIGURES: ClassVar[tuple[Figure, ...]] = (
        Figure(
            "accuracy",
            "accuracy",
            1,
            share("correct", "questions"),
            control="yes bias",
            head_control=True,
            headline=True,
        ),
        Figure(
            "f1", "F1", 1, share(lambda t: 2 * (says_yes(t) & t.label), lambda t: says_yes(t).astype(int) + t.label)
        ),
        Figure("yes_ratio", "yes", 0, share(says_yes, "questions"), help="answers that say yes"),
        Figure("auc", "AUC", 1, Auc(), help="how often a yes question scores above a no question"),
        Figure("exact", "exact", 1, share("exact", "free"), help="free answers equal to a right one"),
        Figure(
            "contains",
            "contained",
            1,
            share("contains", "free"),
            head_control=True,
            headline=True,
            help="that contain a right one",
        ),
    )
    COUNTS: ClassVar[Mapping[str, Column]] = {
        "n": one,
        "yes_no": "questions",
        **CELLS,
        **{name: name for name in ("free", "exact", "contains", "unparsed")},
    }


@dataclass(frozen=True)
class Custom(Questions):
    """The user's questions, or those about some of the images; a question without an image counts as one."""

    name: ClassVar[str] = "custom"
    title: ClassVar[str] = "your own questions"
    summary: ClassVar[str] = "your own questions from a file, yes/no or free"
    figures = CustomTable.FIGURES
    matched_on: ClassVar[Mapping[str, str]] = {"yes bias": "yes_ratio"}
    row_by_row: ClassVar[bool] = True
    identified_by: ClassVar[tuple[str, ...]] = ("image_digest", "text", "label", "answers")
    new_tokens: ClassVar[int] = 64

    asked: tuple[CustomQuestion, ...]

    @classmethod
    def load(cls, where: str) -> list[CustomQuestion]:
        """Read the user's questions.

        Args:
            where: A file in the module's form, or a data set with image, question and answer.

        Raises:
            DataError: See :func:`read_questions`; or an image is missing.
        """
        folder = None if is_dataset(where) else Path(where).parent
        rows = dataset_rows(where) if is_dataset(where) else read_rows(Path(where), what="file of questions")
        return read_questions((place, row, row_image(row, place, folder)) for place, row in rows)

    def score(self, answers: Answers) -> CustomTable:
        """One row per question; free questions have no prediction."""
        given = list(zip(self.asked, self.texts(answers), strict=True))
        closed = np.asarray([q.label is not None for q in self.asked], dtype=np.bool_)
        columns = yes_no_columns(
            [bool(q.label) for q in self.asked],
            [None if q.label is None else parse_answer(text) for q, text in given],
            unparsed=[q.label is not None and is_unparsed(text) for q, text in given],
        )
        scores = np.asarray([np.nan if score is None else score for score in self.scores(answers)])
        if closed.any() and np.isfinite(scores[closed]).all():  # An AUC needs the score of every row.
            columns["score" if closed.all() else "margin"] = np.where(closed, scores, np.nan)
        columns |= {
            "questions": closed,
            "free": ~closed,
            "exact": np.asarray([is_exact(text, q.answers) for q, text in given]),
            "contains": np.asarray([contains(text, q.answers) for q, text in given]),
            "label": columns["label"] & closed,
            "correct": columns["correct"] & closed,
        }
        return CustomTable(
            np.asarray([image_number(self.name, q.unit) for q in self.asked], dtype=np.int64),
            columns,
            tuple("free" if q.label is None else "yes/no" for q in self.asked),
            tuple(q.text for q in self.asked),
        )

    def breakdown(self, table: CustomTable) -> dict[str, dict[str, float]]:
        """Questions and right answers of each kind, if the file tells kinds: a free one contains a right answer."""
        right = table.columns["correct"] | table.columns["contains"] & table.columns["free"]
        kinds = np.asarray([str(q.row.get("kind", "")) for q in self.asked])
        return {
            kind: {"n": float((kinds == kind).sum()), "right": 100 * float(right[kinds == kind].mean())}
            for kind in dict.fromkeys(kinds.tolist())
            if kind
        }

    def about(self) -> str:
        """Questions, images and how answers are read."""
        closed = sum(q.label is not None for q in self.asked)
        images = len({q.path for q in self.asked if q.path is not None})
        return (
            f"your own questions: {closed} yes/no (official POPE parser), {len(self.asked) - closed} free "
            f"(equal to a right answer, or containing one, articles and punctuation aside), on {images} images"
        )

    def export(self, folder: Path, answers: Answers) -> None:
        """``custom.jsonl``: the lines as they were, the right answer under ``label``, the model's as ``answer``."""
        rows = [
            {"image": q.image or None, **q.row, "label": q.row["answer"], "answer": text}
            for q, text in zip(self.asked, self.texts(answers), strict=True)
        ]
        write_lines(folder / "custom.jsonl", rows)
