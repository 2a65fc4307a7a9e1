"""Questions of one's own as a task: yes/no ones are scored as POPE's, free ones by the words of the right answer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ...data.records import read_rows
from ...data.samples import Answers, Sample
from ...data.source import choose, dataset_rows, image_number, is_dataset, row_image
from ...data.write import digest, file_digest
from ..base import Scored, ScoredTask, distinct, texts, write_lines, yes_no
from ..yes_no import is_unparsed, parse_answer
from .data import CustomQuestion, read_questions

_PUNCTUATION = re.compile(r"[^\w\s]|_")


_ARTICLES = frozenset({"a", "an", "the"})


def words(text: str) -> list[str]:
    """The words that are compared."""
    return [word for word in _PUNCTUATION.sub(" ", text.lower()).split() if word not in _ARTICLES]


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


PROMPT = "{question}"


NEW_TOKENS = 64


def load_questions(where: str) -> list[CustomQuestion]:
    """Read questions of one's own.

    Args:
        where: A file (see ``data.questions``), or a data set with image, question and answer.

    Raises:
        DataError: See ``data.questions.read_questions``; or an image is missing.
    """
    if is_dataset(where):
        return read_questions((place, row, row_image(row, place)) for place, row in dataset_rows(where))
    path = Path(where)
    return read_questions(
        (place, row, row_image(row, place, path.parent)) for place, row in read_rows(path, what="file of questions")
    )


@dataclass(frozen=True)
class CustomTask(ScoredTask):
    """Questions of one's own, or those about some of the images.

    Attributes:
        asked: The questions, in file order.
        each: The sample of each.
        max_new_tokens: Limit of an answer's length.
    """

    name: ClassVar[str] = "custom"

    asked: tuple[CustomQuestion, ...]
    each: tuple[Sample, ...]
    max_new_tokens: int

    @classmethod
    def make(cls, where: str, *, limit: int | None, seed: int, prompt: str | None, max_new_tokens: int) -> CustomTask:
        """Read the questions and choose at most ``limit`` images; a question without one counts as one."""
        questions = load_questions(where)
        kept = set(choose((_unit(q) for q in questions), limit, seed))
        asked = tuple(q for q in questions if _unit(q) in kept)
        prompt = prompt or PROMPT
        each = tuple(
            Sample(
                cls.name,
                0 if q.path is None else _number(q),
                q.path,
                prompt.replace("{question}", q.text),
                max_new_tokens,
            )
            for q in asked
        )
        return cls(distinct(each), prompt, asked, each, max_new_tokens)

    def settings(self) -> dict[str, Any]:
        """Prompt, length limit and a digest of questions, images and answers."""
        images = {q.path: file_digest(q.path) for q in self.asked if q.path is not None}
        asked = [[q.path and images[q.path], q.text, q.label, list(q.answers)] for q in self.asked]
        return {"prompt": self.prompt, "max_new_tokens": self.max_new_tokens, "questions": digest(asked)}

    def table(self, answers: Answers) -> Scored:
        """One row per question; free questions have no prediction."""
        given = texts(self.each, answers)
        closed = np.asarray([q.label is not None for q in self.asked], dtype=np.bool_)
        read = [None if q.label is None else parse_answer(t) for q, t in zip(self.asked, given, strict=True)]
        columns: dict[str, NDArray[Any]] = yes_no([bool(q.label) for q in self.asked], read)
        given_scores = [answers[sample.key].score for sample in self.each]
        scores = np.asarray([np.nan if s is None else s for s in given_scores], dtype=np.float64)
        if closed.any() and np.isfinite(scores[closed]).all():  # An AUC needs the score of every row.
            columns["score" if closed.all() else "margin"] = np.where(closed, scores, np.nan)
        columns |= {
            "questions": closed,
            "unparsed": np.asarray([is_unparsed(text) for text in given]) & closed,
            "free": ~closed,
            "exact": np.asarray([is_exact(t, q.answers) for q, t in zip(self.asked, given, strict=True)]),
            "contains": np.asarray([contains(t, q.answers) for q, t in zip(self.asked, given, strict=True)]),
        }
        columns["label"] = columns["label"] & closed
        columns["correct"] = columns["correct"] & closed
        return Scored(
            image_ids=np.asarray([image_number(self.name, _unit(q)) for q in self.asked], dtype=np.int64),
            splits=tuple("yes/no" if q.label is not None else "free" for q in self.asked),
            items=tuple(q.text for q in self.asked),
            columns=columns,
            benchmark=self.name,
            native=None,
        )

    def about(self, table: Scored | None) -> str:
        """Questions, images and how answers are read."""
        closed = sum(q.label is not None for q in self.asked)
        images = len({q.path for q in self.asked if q.path is not None})
        return (
            f"questions of one's own: {closed} yes/no (official POPE parser), {len(self.asked) - closed} free "
            f"(equal to a right answer, or containing one, articles and punctuation aside), on {images} images"
        )

    def counts(self, table: Scored) -> dict[str, Any]:
        """Questions of both kinds, right ones, and the confusion matrix of the yes/no questions."""
        closed, yes, label = table.questions, table.prediction == 1, table.label
        return {
            "n": len(table),
            "yes_no": int(closed.sum()),
            "TP": int((yes & label & closed).sum()),
            "FP": int((yes & ~label & closed).sum()),
            "TN": int((~yes & ~label & closed).sum()),
            "FN": int((~yes & label & closed).sum()),
            "free": int(table.free.sum()),
            "exact": int(table.exact.sum()),
            "contains": int(table.contains.sum()),
            "unparsed": int(table.unparsed.sum()),
        }

    def questions(self, table: Scored) -> NDArray[np.int64]:
        """The yes/no questions."""
        return np.flatnonzero(table.questions)

    def export(self, folder: Path, answers: Answers) -> None:
        """``custom.jsonl``: the lines as they were, the right answer under ``label``, the model's as ``answer``."""
        rows = [
            {"image": q.image or None, **q.row, "label": q.row["answer"], "answer": text}
            for q, text in zip(self.asked, texts(self.each, answers), strict=True)
        ]
        write_lines(folder / "custom.jsonl", rows)


def _unit(question: CustomQuestion) -> str:
    """What is chosen and resampled: the image, or a question without one."""
    return f"question {question.text}" if question.path is None else f"image {question.path.name} {question.image}"


def _number(question: CustomQuestion) -> int:
    return image_number("custom", _unit(question))
