"""MME, hallucination subset: existence, count, position, color (Fu et al. 2023, arXiv:2306.13394).

Each task asks two yes/no questions about each of 30 images.

    score = 100 * accuracy + 100 * accuracy+,  accuracy+ = images with both answers right / images

so a task gives 200 at most and the subset 800. The two questions of an image are found by the image, not by their
order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import numpy as np

from vlmfix.errors import DataError

from ...data.source import image_number
from ...stats.figures import Auc, Figure, SumStatistic, divide, one, share, stacked
from ...stats.intervals import FloatArray
from ...stats.table import Table
from ..base import all_of, first_of
from ..yes_no import ACCURACY, YES_RATIO, yes_no_columns
from .data import OTHER_TASKS, TASKS, MmeAnswer, MmeTask

MmeParser = Literal["official", "lmms"]


PARSERS: tuple[MmeParser, ...] = get_args(MmeParser)


IMAGES_PER_TASK = 30


def _official(text: str) -> bool | None:
    text = text.lower()
    if text in ("yes", "no"):
        return text == "yes"
    start = text[:4]
    return True if "yes" in start else False if "no" in start else None


def _lmms(text: str) -> bool | None:
    text = text.lower().strip().replace(".", "")
    return {"y": True, "n": False}[text] if text in ("y", "n") else _official(text)


_RULES: Mapping[str, Callable[[str], bool | None]] = {"official": _official, "lmms": _lmms}


def parse_answer(text: str, parser: MmeParser = "official") -> bool | None:
    """Read yes (True) or no (False) from an answer; None for anything else, which is wrong.

    Args:
        text: The answer.
        parser: ``official``: yes or no, else "yes" and then "no" in the first four characters, case ignored. ``lmms``
            (lmms-eval): the same after ``strip()`` and without full stops, and "y" and "n" count too.

    Raises:
        DataError: unknown parser.
    """
    if parser not in _RULES:
        raise DataError(f"unknown MME parser {parser!r}: choose one of {', '.join(PARSERS)}")
    return _RULES[parser](text)


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

    def tasks(self) -> dict[MmeTask, MmeTable]:
        """The table of each task that was answered, in the official order."""
        splits = np.asarray(self.splits)
        return {task: self.take(np.flatnonzero(splits == task)) for task in TASKS if task in self.splits}

    def counts(self) -> dict[str, int]:
        """Questions, right answers, images, images with both answers right, answers yes, unparsed answers."""
        return {
            "n": len(self),
            "correct": int(self.correct.sum()),
            "images": int(self.images.sum()),
            "both_correct": int(self.both_correct.sum()),
            "yes": int((self.prediction == 1).sum()),
            "unparsed": int(self.unparsed.sum()),
        }

    def total(self) -> float | None:
        """Sum of the four scores, 0 to 800; None unless all four tasks were answered."""
        return self.summary()["score"] if set(self.splits) == set(TASKS) else None


def score_answers(
    answers: Iterable[MmeAnswer],
    *,
    parser: MmeParser = "official",
    images: int | None = IMAGES_PER_TASK,
    scores: Sequence[float | None] = (),
) -> MmeTable:
    """Score the answers to the hallucination subset, or to some of its tasks.

    Args:
        answers: In any order. Other tasks of MME are left out.
        parser: See :func:`parse_answer`.
        images: How many images a task must have; None for any number.
        scores: Yes-minus-no logits of the answers, if there are any.

    Raises:
        DataError: an unknown task, no answer to the subset, an image without exactly two different questions, or a
            task without all its images.
    """
    kept: list[MmeAnswer] = []
    pairs: dict[tuple[str, str], list[str]] = {}
    for answer in answers:
        if answer.task in OTHER_TASKS:
            continue
        if answer.task not in TASKS:
            raise DataError(f"MME has no task {answer.task!r}; its hallucination subset is {', '.join(TASKS)}")
        kept.append(answer)
        pairs.setdefault((answer.task, answer.image), []).append(answer.question)
    if not kept:
        raise DataError(f"no answer belongs to the hallucination subset of MME ({', '.join(TASKS)})")
    _check_pairs(pairs, images)
    columns = yes_no_columns([a.label for a in kept], [parse_answer(a.answer, parser) for a in kept], scores)
    keys = [(answer.task, answer.image) for answer in kept]
    first = first_of(keys)
    return MmeTable(
        np.asarray([image_number("mme", f"{task}/{image}") for task, image in keys], dtype=np.int64),
        {**columns, "images": first, "both_correct": first & all_of(keys, columns["correct"])},
        tuple(answer.task for answer in kept),
        tuple(answer.question for answer in kept),
    )


def _check_pairs(pairs: Mapping[tuple[str, str], Sequence[str]], images: int | None) -> None:
    for (task, image), asked in pairs.items():
        if len(set(asked)) != 2 or len(asked) != 2:
            raise DataError(
                f"MME {task}, image {image}: expected one answer to each of two questions, found "
                f"{len(asked)} answers to {len(set(asked))}: answer each question once"
            )
    for task in dict.fromkeys(task for task, _ in pairs):
        found = sum(each == task for each, _ in pairs)
        if images is not None and found != images:
            raise DataError(
                f"MME {task}: expected answers about {images} images, found {found}: answer all of its questions, "
                "or leave the task out"
            )
