"""Tables of the benchmarks beside CHAIR and POPE: one row per description or question, columns of counts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..benchmark_stats import BENCHMARK_STATISTICS
from ..cache import write_text
from ..item_table import ItemTable
from ..metrics.pope import auc
from ..samples import Answers, Sample

Columns = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, eq=False)
class Scored(ItemTable):
    """One method's answers to a benchmark.

    Attributes:
        benchmark: Its name.
        native: The table of the benchmark's own scorer, with the official counts.
    """

    benchmark: str = ""
    native: Any = None

    def summary(self) -> dict[str, float]:
        """Every figure of the benchmark, by the names in ``columns.METRICS``; NaN where nothing was asked."""
        found = {name: statistic.of(self) for name, statistic in BENCHMARK_STATISTICS[self.benchmark].items()}
        if self.has("score"):
            found["auc"] = auc(self.score, self.label)
        return found

    def has(self, name: str) -> bool:
        """Whether there is a column."""
        return name in self.columns


def yes_no(
    labels: Sequence[bool], predictions: Sequence[bool | None], scores: Sequence[float | None] = ()
) -> dict[str, NDArray[Any]]:
    """The columns of yes/no answers.

    Args:
        labels: Whether yes is right, [n].
        predictions: What was read from the answers, None for neither, [n].
        scores: Yes-minus-no logits, [n]; a column only if all are there.
    """
    label = np.asarray(labels, dtype=np.bool_)
    prediction = np.asarray([-1 if p is None else int(p) for p in predictions], dtype=np.int8)
    columns = {"label": label, "prediction": prediction, "correct": prediction == label, "unparsed": prediction < 0}
    given = [score for score in scores if score is not None]
    return {**columns, "score": np.asarray(given)} if given and len(given) == len(labels) else columns


def first_of(keys: Sequence[Any]) -> NDArray[np.bool_]:
    """Whether each entry is the first of its key, [n]."""
    seen: set[Any] = set()
    return np.asarray([not (key in seen or seen.add(key)) for key in keys], dtype=np.bool_)  # type: ignore[func-returns-value]


def all_of(keys: Sequence[Any], right: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Whether every entry with the same key is right, [n]."""
    wrong = {key for key, ok in zip(keys, right.tolist(), strict=True) if not ok}
    return np.asarray([key not in wrong for key in keys], dtype=np.bool_)


def distinct(samples: Sequence[Sample]) -> tuple[Sample, ...]:
    """Each different sample once, in order."""
    return tuple({sample.key: sample for sample in samples}.values())


def texts(samples: Sequence[Sample], answers: Answers) -> list[str]:
    """The answers' texts, in the order of the samples."""
    return [answers[sample.key].text for sample in samples]


def write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write JSON lines."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_list(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write one JSON list."""
    write_text(path, json.dumps(list(rows), indent=1, ensure_ascii=False) + "\n")
