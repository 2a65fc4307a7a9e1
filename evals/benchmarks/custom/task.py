"""Questions of one's own as a task: yes/no ones are scored as POPE's, free ones by the words of the right answer."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ...data.records import read_rows
from ...data.samples import Answers, Sample
from ...data.source import choose, dataset_rows, image_number, is_dataset, row_image
from ...data.write import digest, file_digest
from ...options import EvalOptions
from ...stats.figures import Auc, Figure, share
from ...stats.table import Table
from ..base import Benchmark, distinct, texts, write_lines
from ..choice import RunData
from ..yes_no import is_unparsed, parse_answer, yes_no_columns
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


def _yes(table: Any) -> NDArray[np.bool_]:
    return np.asarray(table.prediction == 1)


@dataclass(frozen=True)
class Custom(Benchmark):
    """Questions of one's own, or those about some of the images.

    Attributes:
        asked: The questions, in file order.
        each: The sample of each.
        samples: The different ones among them.
        prompt: Template with ``{question}``.
        max_new_tokens: Limit of an answer's length.
    """

    name: ClassVar[str] = "custom"
    title: ClassVar[str] = "questions of one's own"
    summary: ClassVar[str] = "questions of one's own from a file, yes/no or free"
    figures = (
        Figure(
            "accuracy",
            "accuracy",
            1,
            share("correct", "questions"),
            control="yes bias",
            head_control=True,
            headline=True,
        ),
        Figure("f1", "F1", 1, share(lambda t: 2 * (_yes(t) & t.label), lambda t: _yes(t).astype(int) + t.label)),
        Figure("yes_ratio", "yes", 0, share(_yes, "questions"), help="answers that say yes"),
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
    matched_on: ClassVar[Mapping[str, str]] = {"yes bias": "yes_ratio"}
    row_by_row: ClassVar[bool] = True

    asked: tuple[CustomQuestion, ...]
    each: tuple[Sample, ...]
    samples: tuple[Sample, ...]
    prompt: str
    max_new_tokens: int

    @classmethod
    def make(cls, options: EvalOptions, data: RunData) -> Custom:
        """Read the questions and choose at most ``--limit`` images; a question without one counts as one."""
        questions = load_questions(data.own(cls.name))
        kept = set(choose((_unit(q) for q in questions), options.limit, options.seed))
        asked = tuple(q for q in questions if _unit(q) in kept)
        prompt, limit = options.prompt_of.get(cls.name, PROMPT), options.max_new_tokens or NEW_TOKENS
        each = tuple(
            Sample(
                cls.name,
                0 if q.path is None else image_number(cls.name, _unit(q)),
                q.path,
                prompt.replace("{question}", q.text),
                limit,
            )
            for q in asked
        )
        return cls(asked, each, distinct(each), prompt, limit)

    def settings(self) -> dict[str, Any]:
        """Prompt, length limit and a digest of questions, images and answers."""
        images = {q.path: file_digest(q.path) for q in self.asked if q.path is not None}
        asked = [[q.path and images[q.path], q.text, q.label, list(q.answers)] for q in self.asked]
        return {"prompt": self.prompt, "max_new_tokens": self.max_new_tokens, "questions": digest(asked)}

    def score(self, answers: Answers) -> Table:
        """One row per question; free questions have no prediction."""
        given = texts(self.each, answers)
        closed = np.asarray([q.label is not None for q in self.asked], dtype=np.bool_)
        read = [None if q.label is None else parse_answer(t) for q, t in zip(self.asked, given, strict=True)]
        unparsed = [q.label is not None and is_unparsed(t) for q, t in zip(self.asked, given, strict=True)]
        columns = yes_no_columns([bool(q.label) for q in self.asked], read, unparsed=unparsed)
        scores = np.asarray([np.nan if (s := answers[each.key].score) is None else s for each in self.each])
        if closed.any() and np.isfinite(scores[closed]).all():  # An AUC needs the score of every row.
            columns["score" if closed.all() else "margin"] = np.where(closed, scores, np.nan)
        columns |= {
            "questions": closed,
            "free": ~closed,
            "exact": np.asarray([is_exact(t, q.answers) for q, t in zip(self.asked, given, strict=True)]),
            "contains": np.asarray([contains(t, q.answers) for q, t in zip(self.asked, given, strict=True)]),
        }
        columns["label"] = columns["label"] & closed
        columns["correct"] = columns["correct"] & closed
        return Table(
            np.asarray([image_number(self.name, _unit(q)) for q in self.asked], dtype=np.int64),
            columns,
            tuple("yes/no" if q.label is not None else "free" for q in self.asked),
            tuple(q.text for q in self.asked),
        )

    def about(self) -> str:
        """Questions, images and how answers are read."""
        closed = sum(q.label is not None for q in self.asked)
        images = len({q.path for q in self.asked if q.path is not None})
        return (
            f"questions of one's own: {closed} yes/no (official POPE parser), {len(self.asked) - closed} free "
            f"(equal to a right answer, or containing one, articles and punctuation aside), on {images} images"
        )

    def counts(self, table: Table) -> dict[str, Any]:
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
