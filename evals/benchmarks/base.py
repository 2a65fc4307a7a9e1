"""What every benchmark of a run has to offer."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from ..samples import Answer, Answers, Sample

#: Recall to match -> the bias on the end token, and the table of the baseline's texts under it.
Stopper = Callable[[float], tuple[float, Any]]


class Task(ABC):
    """One benchmark of a run: what it asks, how its answers become figures, and the file format they are exchanged in.

    A task's part of ``results.json`` holds its integer counts, ``summary`` (figure name -> value, see ``columns``),
    ``changed`` (answers that differ from the baseline's) and ``seconds``. What it prints beside its columns:

    - ``about``: one line on what was asked and how it was read;
    - ``breakdown``: row name -> figure name -> value, a table per method;
    - ``paired``: ``mcnemar`` of a method's yes/no answers against the baseline's.

    Attributes:
        name: Its name on the command line, and in ``results.json``.
        scoring: Names of settings that decide how answers are scored, not what they are: a judge, a word similarity.
        samples: Everything it asks, each different question once.
    """

    name: ClassVar[str]
    scoring: ClassVar[tuple[str, ...]] = ()
    samples: tuple[Sample, ...]

    def stopper(self, answers: Answers, decode: Callable[[list[int]], str]) -> Stopper | None:
        """The early-stop control of descriptions that are no captions of CHAIR's; None without any.

        Args:
            answers: The baseline's, with tokens and stop margins.
            decode: Token ids to text.
        """
        return None

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """What identifies its questions and images, for ``config.json``."""

    @abstractmethod
    def table(self, answers: Answers) -> Any:
        """Score one method's answers: a table with ``image_ids``, or None if they cannot be scored here."""

    @abstractmethod
    def part(self, label: str, tables: Mapping[str, Any], answers: Mapping[str, Answers], seed: int) -> dict[str, Any]:
        """A method's part of ``results.json``.

        Args:
            label: The method.
            tables: Label to table, the baseline first.
            answers: Label to answers.
            seed: Of the bootstrap.
        """

    @abstractmethod
    def export(self, folder: Path, answers: Answers) -> None:
        """Write one method's answers in the benchmark's own format, for its official scripts.

        Args:
            folder: The method's folder; it exists.
            answers: Its answers.
        """


def effort(task: Task, answers: Answers, baseline: Answers) -> dict[str, Any]:
    """``changed``, ``seconds`` and ``pace`` of a method's answers."""
    keys = [sample.key for sample in task.samples]
    return {
        "changed": sum(_said(answers[key]) != _said(baseline[key]) for key in keys),
        "seconds": round(sum(answers[key].seconds for key in keys), 3),
        "pace": pace([(answers[key].seconds, baseline[key].seconds) for key in keys]),
    }


def pace(pairs: Sequence[tuple[float, float]]) -> dict[str, Any] | None:
    """How long a method takes as a multiple of the baseline: the ratio of a batch's times, over batches.

    A batch is answered by all methods in turn, so that what else the machine does cancels, and a median does not mind
    the batches where it does not. Answers of one batch have equal times.

    Args:
        pairs: Of each answer, the method's seconds and the baseline's.

    Returns:
        ``median``, ``quartiles`` and the number of ``batches``; None without times.
    """
    ratios = [own / other for own, other in dict.fromkeys(pairs) if other > 0]
    if not ratios:
        return None
    low, middle, high = (round(float(q), 4) for q in np.quantile(ratios, [0.25, 0.5, 0.75]))
    return {"median": middle, "quartiles": [low, high], "batches": len(ratios)}


def _said(answer: Answer) -> tuple[Any, ...]:
    return answer.tokens, answer.text, answer.score


def safe_name(label: str) -> str:
    """A method's label as the name of a folder."""
    return re.sub(r"[^\w.+-]", "-", label)
