"""MME, hallucination subset: existence, count, position, color (Fu et al. 2023, arXiv:2306.13394).

Each task asks two yes/no questions about each of 30 images.

    score = 100 * accuracy + 100 * accuracy+,  accuracy+ = images with both answers right / images

so a task gives 200 at most and the subset 800. The two questions of an image are found by the image, not by their
order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from vlmfix.errors import DataError

from ...data.source import image_number
from ...stats.bootstrap import FloatArray
from ...stats.figures import Auc, Column, Figure, SumStatistic, divide, one, share, stacked
from ...stats.table import Table
from ..base import whole_groups
from ..yes_no import ACCURACY, YES_RATIO, says_yes, yes_no_columns

TASKS = ("existence", "count", "position", "color")


@dataclass(frozen=True)
class MmeQuestion:
    """One question of MME.

    Attributes:
        task: One of :data:`TASKS`.
        image: Name of the image.
        text: The question; MME's ask themselves for yes or no.
        label: Whether yes is right.
        path: The image's file; None where only answers are scored.
    """

    task: str
    image: str
    text: str
    label: bool
    path: Path | None = None

    @property
    def picture(self) -> str:
        """The image, whose name other tasks may use too."""
        return f"{self.task}/{self.image}"

    unit = picture


def _official(text: str) -> bool | None:
    text = text.lower()
    if text in ("yes", "no"):
        return text == "yes"
    start = text[:4]
    return True if "yes" in start else False if "no" in start else None


def _lmms(text: str) -> bool | None:
    text = text.lower().strip().replace(".", "")
    return {"y": True, "n": False}[text] if text in ("y", "n") else _official(text)


PARSERS: Mapping[str, Callable[[str], bool | None]] = {"official": _official, "lmms": _lmms}


def parse_answer(text: str, parser: str = "official") -> bool | None:
    """Read yes (True) or no (False) from an answer; None for anything else, which is wrong.

    Args:
        text: The answer.
        parser: ``official``: yes or no, else "yes" and then "no" in the first four characters, case ignored. ``lmms``
            (lmms-eval): the same after ``strip()`` and without full stops, and "y" and "n" count too.

    Raises:
        DataError: unknown parser.
    """
    if parser not in PARSERS:
        raise DataError(f"unknown MME parser {parser!r}: choose one of {', '.join(PARSERS)}")
    return PARSERS[parser](text)


def _task_columns(table: Any) -> FloatArray:
    """Right answers, questions, images with both answers right and images, of each task: float64 [n, 16]."""
    tasks = np.asarray(table.splits)
    parts = (table.correct, one(table), table.both_correct, table.images)
    return stacked(*(part * (tasks == task) for task in TASKS for part in parts))


def _score(sums: FloatArray) -> FloatArray:
    total = np.zeros(sums.shape[:-1])
    for start in range(0, 4 * len(TASKS), 4):
        correct, n, both, images = np.moveaxis(sums[..., start : start + 4], -1, 0)
        total += 100 * divide(correct, n, 0.0) + 100 * divide(both, images, 0.0)
    return total


@dataclass(frozen=True, eq=False)
class MmeTable(Table):
    """Answers to some tasks, one row per question; the task is the split of its rows.

    Columns: those of yes/no answers (see :mod:`vlmfix.evals.benchmarks.yes_no`); on the first question of each image
    ``images``, and ``both_correct`` if both its answers are right, bool [n].
    """

    FIGURES: ClassVar[tuple[Figure, ...]] = (
        Figure(
            "score",
            "score/800",
            1,
            SumStatistic(_task_columns, _score),
            percent=False,
            head_control=True,
            headline=True,
            help="accuracy plus accuracy+, in points, summed over the tasks",
        ),
        Figure("accuracy", "accuracy", 1, ACCURACY, control="yes bias", help="right answers"),
        Figure("accuracy_plus", "accuracy+", 1, share("both_correct", "images"), help="images with both answers right"),
        Figure("yes_ratio", "yes", 0, YES_RATIO, help="answers that say yes"),
        Figure("auc", "AUC", 1, Auc(), column=False),
    )
    COUNTS: ClassVar[Mapping[str, Column]] = {
        "n": one,
        "correct": "correct",
        "images": "images",
        "both_correct": "both_correct",
        "yes": says_yes,
        "unparsed": "unparsed",
    }

    def tasks(self) -> dict[str, MmeTable]:
        """The table of each task that was answered, in the official order."""
        splits = self.by_split()
        return {task: splits[task] for task in TASKS if task in splits}

    def total(self) -> float | None:
        """Sum of the four scores, 0 to 800; None unless all four tasks were answered."""
        return self.summary()["score"] if set(self.splits) == set(TASKS) else None


def score_answers(
    questions: Sequence[MmeQuestion],
    answers: Sequence[str],
    *,
    parser: str = "official",
    scores: Sequence[float | None] = (),
) -> MmeTable:
    """Score the answers to the hallucination subset, or to some of its tasks.

    Args:
        questions: In any order.
        answers: One per question.
        parser: See :func:`parse_answer`.
        scores: Yes-minus-no logits of the answers, if there are any.

    Raises:
        DataError: no answer, or an image without exactly two different questions.
    """
    if not questions:
        raise DataError(f"no answer belongs to the hallucination subset of MME ({', '.join(TASKS)})")
    pairs: dict[str, list[str]] = {}
    for question in questions:
        pairs.setdefault(question.picture, []).append(question.text)
    for picture, asked in pairs.items():
        if len(set(asked)) != 2 or len(asked) != 2:
            task, _, image = picture.partition("/")
            raise DataError(
                f"MME {task}, image {image}: expected one answer to each of two questions, found "
                f"{len(asked)} answers to {len(set(asked))}: answer each question once"
            )
    columns = yes_no_columns([q.label for q in questions], [parse_answer(text, parser) for text in answers], scores)
    pictures = [question.picture for question in questions]
    images, both_correct = whole_groups(pictures, columns["correct"])
    return MmeTable(
        np.asarray([image_number("mme", picture) for picture in pictures], dtype=np.int64),
        {**columns, "images": images, "both_correct": both_correct},
        tuple(question.task for question in questions),
        tuple(question.text for question in questions),
    )
