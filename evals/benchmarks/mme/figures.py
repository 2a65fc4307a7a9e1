"""MME, hallucination subset: existence, count, position, color (Fu et al. 2023, arXiv:2306.13394).

Each task asks two yes/no questions about each of 30 images.

    score = 100 * accuracy + 100 * accuracy+,  accuracy+ = images with both answers right / images

so a task gives 200 at most and the subset 800. The two questions of an image are found by the image, not by their
order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from vlmfix.errors import DataError

from ...stats.intervals import FloatArray, columns, divide, one
from .data import OTHER_TASKS, TASKS, MmeAnswer, MmeTask
from .data import TASKS as MME_TASKS

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


@dataclass(frozen=True, eq=False)
class MmeTable:
    """Labels and predictions of one task, one row per image with its two questions.

    Attributes:
        images: Name of each image, [n].
        label: bool [n, 2], whether yes is right.
        prediction: int8 [n, 2], 1 yes, 0 no, -1 other.
    """

    images: tuple[str, ...]
    label: NDArray[np.bool_]
    prediction: NDArray[np.int8]

    @property
    def correct(self) -> NDArray[np.bool_]:
        """Whether the prediction is the label, bool [n, 2]."""
        return np.asarray(self.prediction == self.label)

    def counts(self) -> dict[str, int]:
        """Questions, right answers, images, images with both answers right, answers yes, unparsed answers."""
        return {
            "n": self.label.size,
            "correct": int(self.correct.sum()),
            "images": len(self.images),
            "both_correct": int(self.correct.all(axis=1).sum()),
            "yes": int((self.prediction == 1).sum()),
            "unparsed": int((self.prediction < 0).sum()),
        }

    def summary(self) -> dict[str, float]:
        """``accuracy``, ``accuracy_plus`` and ``yes_ratio`` (0 to 1), and ``score`` (0 to 200)."""
        c = self.counts()
        accuracy, plus = c["correct"] / c["n"], c["both_correct"] / c["images"]
        score = 100 * accuracy + 100 * plus
        return {"accuracy": accuracy, "accuracy_plus": plus, "yes_ratio": c["yes"] / c["n"], "score": score}


def score_answers(
    answers: Iterable[MmeAnswer], *, parser: MmeParser = "official", images: int | None = IMAGES_PER_TASK
) -> dict[MmeTask, MmeTable]:
    """Score the answers to the hallucination subset, or to some of its tasks.

    Args:
        answers: In any order. Other tasks of MME are left out.
        parser: See :func:`parse_answer`.
        images: How many images a task must have; None for any number.

    Returns:
        The tasks that were answered, in the official order.

    Raises:
        DataError: an unknown task, no answer to the subset, an image without exactly two different questions, or a
            task without all its images.
    """
    found: dict[str, dict[str, list[MmeAnswer]]] = {}
    for answer in answers:
        if answer.task in OTHER_TASKS:
            continue
        if answer.task not in TASKS:
            raise DataError(f"MME has no task {answer.task!r}; its hallucination subset is {', '.join(TASKS)}")
        found.setdefault(answer.task, {}).setdefault(answer.image, []).append(answer)
    if not found:
        raise DataError(f"no answer belongs to the hallucination subset of MME ({', '.join(TASKS)})")
    return {task: _table(task, found[task], parser, images) for task in TASKS if task in found}


def total(tables: Mapping[MmeTask, MmeTable]) -> float | None:
    """Sum of the four scores, 0 to 800; None unless all four tasks were answered."""
    return sum(tables[task].summary()["score"] for task in TASKS) if set(tables) == set(TASKS) else None


def _table(task: str, by_image: Mapping[str, list[MmeAnswer]], parser: MmeParser, images: int | None) -> MmeTable:
    for image, pair in by_image.items():
        if len({answer.question for answer in pair}) != 2 or len(pair) != 2:
            raise DataError(
                f"MME {task}, image {image}: expected one answer to each of two questions, found "
                f"{len(pair)} answers to {len({answer.question for answer in pair})}: answer each question once"
            )
    if images is not None and len(by_image) != images:
        raise DataError(
            f"MME {task}: expected answers about {images} images, found {len(by_image)}: answer all of its questions, "
            "or leave the task out"
        )
    pairs = list(by_image.values())
    read = [[parse_answer(answer.answer, parser) for answer in pair] for pair in pairs]
    return MmeTable(
        images=tuple(by_image),
        label=np.asarray([[answer.label for answer in pair] for pair in pairs], dtype=np.bool_),
        prediction=np.asarray([[-1 if r is None else int(r) for r in pair] for pair in read], dtype=np.int8),
    )


def _mme_columns(table: Any) -> FloatArray:
    tasks = np.asarray(table.splits)
    parts = (table.correct, one(table), table.both_correct, table.images)
    return columns(*(part * (tasks == task) for task in MME_TASKS for part in parts))


def _mme_score(sums: FloatArray) -> FloatArray:
    total = np.zeros(sums.shape[:-1])
    for start in range(0, 4 * len(MME_TASKS), 4):
        correct, n, both, images = np.moveaxis(sums[..., start : start + 4], -1, 0)
        total += 100 * divide(correct, n, 0.0) + 100 * divide(both, images, 0.0)
    return total
