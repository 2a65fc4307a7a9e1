"""What the tasks beside CHAIR and POPE have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..quality import paired_answers
from ..samples import Answers, Sample
from ..tables import finite
from .base import Task, effort
from .scored import Scored


@dataclass(frozen=True)
class ScoredTask(Task):
    """A task whose tables are :class:`~vlmfix.evals.benchmarks.scored.Scored`.

    Attributes:
        samples: Everything it asks, each different question once.
        prompt: Template with ``{question}``.
    """

    samples: tuple[Sample, ...]
    prompt: str

    @abstractmethod
    def about(self, table: Scored | None) -> str:
        """One line: what was asked, how the answers were read, and what that means for the figures."""

    @abstractmethod
    def counts(self, table: Scored) -> dict[str, Any]:
        """Integer counts, under the official names where there are any, with ``unparsed`` answers."""

    def breakdown(self, table: Scored) -> dict[str, dict[str, float]]:
        """Row name -> figure name -> value as printed (percentages, points), for a table of its own."""
        return {}

    def questions(self, table: Scored) -> NDArray[np.int64]:
        """The rows that are yes/no questions, each different one once; paired by McNemar's test."""
        return np.arange(len(table)) if table.has("label") else np.arange(0)

    def part(self, label: str, tables: Mapping[str, Any], answers: Mapping[str, Answers], seed: int) -> dict[str, Any]:
        """Counts, summary, breakdown, effort, and yes/no answers paired with the baseline's."""
        table, baseline = tables[label], next(iter(tables))
        part: dict[str, Any] = {
            "about": self.about(table),
            "asked": len(self.samples),
            "truncated": sum(answers[label][sample.key].truncated for sample in self.samples),
            **effort(self, answers[label], answers[baseline]),
            "summary": {},
        }
        if table is None:
            return part
        breakdown = {row: finite(figures) for row, figures in self.breakdown(table).items()}
        part |= {"counts": self.counts(table), "summary": finite(table.summary()), "breakdown": breakdown}
        rows = self.questions(table)
        if label != baseline and len(rows):
            part["paired"] = paired_answers(table.take(rows), tables[baseline].take(rows), range(len(rows)), seed)
        return part
