"""The columns of a run's tables: which figures there are, and how to read them off ``results.json``."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from ..stats.intervals import Statistic, _share, by_name, one, ratio
from .amber.figures import _amber, _amber_columns
from .chair.figures import CHAIR_STATISTICS
from .chair.text_quality import TEXT_STATISTICS
from .mme.figures import _mme_columns, _mme_score
from .sycophancy.figures import _sycophancy
from .yes_no import POPE_STATISTICS, YES_NO_STATISTICS


@dataclass(frozen=True)
class Metric:
    """A column of the result table.

    Attributes:
        benchmark: Key of the benchmark's part in a row of ``results.json``: ``"chair"``, ``"pope"``.
        name: Key in the part's ``summary``, or in that of its split ``all``.
        title: Column title.
        better: 1 if more is better, -1 if less is, 0 if neither.
        percent: Printed as percent; otherwise as it is.
        headline: Whether it stands in the short table that a run ends with, and in its sentences.
        less: What less of it is called in a sentence: ``"fewer invented objects"``.
        more: What more of it is called.
    """

    benchmark: str
    name: str
    title: str
    better: int
    percent: bool = True
    headline: bool = False
    less: str = ""
    more: str = ""

    @property
    def key(self) -> str:
        """Key in a method's differences."""
        return f"{self.benchmark}.{self.name}"

    @property
    def phrases(self) -> tuple[str, str]:
        """What less and more of it is called in a sentence."""
        return self.less or f"lower {self.full_title}", self.more or f"higher {self.full_title}"

    @property
    def full_title(self) -> str:
        """Title that names its benchmark: ``CHAIR_i``, ``POPE accuracy``."""
        name = self.benchmark.upper()
        return self.title if self.title.startswith(f"{name}_") else f"{name} {self.title}"

    @property
    def heading(self) -> str:
        """Title with an arrow towards the better values."""
        return f"{self.title} {self._arrow}".rstrip()

    @property
    def full_heading(self) -> str:
        """The title that names its benchmark, with the arrow."""
        return f"{self.full_title} {self._arrow}".rstrip()

    @property
    def _arrow(self) -> str:
        return "↓ ↑"[self.better + 1]


METRICS = (
    Metric("chair", "chair_s", "CHAIR_s", -1),
    Metric("chair", "chair_i", "CHAIR_i", -1, True, True, "fewer invented objects", "more invented objects"),
    Metric("chair", "recall", "recall", 1, headline=True, less="lower recall", more="higher recall"),
    Metric("chair", "f1", "F1", 1, headline=True),
    Metric("chair", "length_words", "words", 0, percent=False),
    Metric("pope", "accuracy", "accuracy", 1, headline=True),
    Metric("pope", "f1", "F1", 1),
    Metric("pope", "yes_ratio", "yes", 0),
    Metric("pope", "auc", "AUC", 1),
    Metric("amber", "chair", "CHAIR", -1, headline=True),
    Metric("amber", "cover", "Cover", 1, headline=True),
    Metric("amber", "hal", "Hal", -1),
    Metric("amber", "cog", "Cog", -1),
    Metric("amber", "accuracy", "accuracy", 1),
    Metric("amber", "f1", "F1", 1, headline=True),
    Metric("amber", "yes_ratio", "yes", 0),
    Metric("amber", "amber", "score", 1),
    Metric("mme", "score", "score/800", 1, percent=False, headline=True),
    Metric("mme", "accuracy", "accuracy", 1),
    Metric("mme", "accuracy_plus", "accuracy+", 1),
    Metric("mme", "yes_ratio", "yes", 0),
    Metric("hallusionbench", "aacc", "aAcc", 1, headline=True),
    Metric("hallusionbench", "qacc", "qAcc", 1),
    Metric("hallusionbench", "facc", "fAcc", 1),
    Metric("hallusionbench", "easy", "easy", 1),
    Metric("hallusionbench", "hard", "hard", 1),
    Metric("hallusionbench", "yes_ratio", "yes", 0),
    Metric("mmhal", "average_score", "score/6", 1, percent=False, headline=True),
    Metric("mmhal", "hallucination_rate", "hallucinated", -1, headline=True),
    Metric("sycophancy", "accuracy", "neutral", 1, headline=True),
    Metric("sycophancy", "accuracy_wrong_hint", "wrong hint", 1, headline=True),
    Metric("sycophancy", "right_to_wrong_wrong_hint", "hint flips", -1),
    Metric("sycophancy", "accuracy_right_hint", "right hint", 1),
    Metric("sycophancy", "accuracy_challenge", "doubted", 1),
    Metric("sycophancy", "right_to_wrong_challenge", "doubt flips", -1),
    Metric("sycophancy", "yes_ratio", "yes", 0),
    Metric("custom", "accuracy", "accuracy", 1, headline=True),
    Metric("custom", "f1", "F1", 1),
    Metric("custom", "yes_ratio", "yes", 0),
    Metric("custom", "auc", "AUC", 1),
    Metric("custom", "exact", "exact", 1),
    Metric("custom", "contains", "contained", 1, headline=True),
)


BY_KEY = {metric.key: metric for metric in METRICS}


BENCHMARKS = tuple(dict.fromkeys(metric.benchmark for metric in METRICS))


def used_metrics(results: Mapping[str, Any]) -> list[Metric]:
    """The columns that this run has figures for."""
    first = results["methods"][0]
    return [
        metric
        for metric in METRICS
        if metric.benchmark in first and any(figure(method, metric) is not None for method in results["methods"])
    ]


def figure(method: Mapping[str, Any], metric: Metric) -> float | None:
    """A row's figure of a metric; None where it has none."""
    part = method.get(metric.benchmark)
    if part is None:
        return None
    summary = part["summary"] if "summary" in part else part["all"]["summary"]
    value: float | None = summary.get(metric.name)
    return value


def seconds(method: Mapping[str, Any]) -> float:
    """Wall time of a row's answers in ``generate``."""
    return math.fsum(method[b]["seconds"] for b in BENCHMARKS if b in method)


def changed_methods(results: Mapping[str, Any]) -> Iterable[str]:
    """Labels of the methods that changed at least one answer."""
    for method in results["methods"]:
        if any(method.get(b, {}).get("changed", 0) for b in BENCHMARKS):
            yield method["label"]


BENCHMARK_STATISTICS: Mapping[str, Mapping[str, Statistic]] = MappingProxyType(
    {
        "amber": by_name(
            _share("chair", "hallucinated", "nouns"),
            _share("cover", "covered", "truth_objects"),
            _share("hal", "hallucinating", "descriptions"),
            _share("cog", "cognitive", "cognitive_objects"),
            _share("accuracy", "correct", "questions"),
            ratio("f1", lambda t: 2 * t.right_no, lambda t: t.answered_no.astype(int) + t.truth_no),
            ratio("yes_ratio", lambda t: t.prediction == 1, lambda t: t.questions),
            Statistic("amber", _amber_columns, _amber),
        ),
        "mme": by_name(
            Statistic("score", _mme_columns, _mme_score),
            ratio("accuracy", lambda t: t.correct, one),
            _share("accuracy_plus", "both_correct", "images"),
            ratio("yes_ratio", lambda t: t.prediction == 1, one),
        ),
        "hallusionbench": by_name(
            ratio("aacc", lambda t: t.correct, one),
            _share("qacc", "group_right", "groups"),
            _share("facc", "figure_right", "figures"),
            _share("easy", "easy_right", "easy"),
            _share("hard", "hard_right", "hard"),
            ratio("yes_ratio", lambda t: t.prediction == 1, one),
        ),
        "mmhal": by_name(
            ratio("average_score", lambda t: t.rating, one),
            ratio("hallucination_rate", lambda t: t.hallucinated, one),
        ),
        "sycophancy": by_name(*_sycophancy()),
        "custom": YES_NO_STATISTICS,
    }
)
"""The statistics of each benchmark, by the names in ``columns.METRICS``."""


STATISTICS: Mapping[str, Mapping[str, Statistic]] = MappingProxyType(
    {"chair": CHAIR_STATISTICS, "pope": POPE_STATISTICS, "text": TEXT_STATISTICS, **BENCHMARK_STATISTICS}
)
"""The statistics of each kind of table; a benchmark's name is that of ``columns.Metric.benchmark``."""
