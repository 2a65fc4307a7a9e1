"""What every benchmark of a run has to offer."""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ..data.samples import Answer, Answers, Sample
from ..data.write import write_text
from ..stats.intervals import finite
from .columns import BENCHMARK_STATISTICS
from .yes_no import auc, paired_answers

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


_SCORE_NOISE = 1e-3


Key = tuple[int, str, str]
"""Image, split and item of a row."""


@dataclass(frozen=True, eq=False)
class ItemTable:
    """One method's table as ``counts.json`` keeps it; its columns are attributes.

    Attributes:
        image_ids: int64 [n], the image of each row.
        splits: The part of the benchmark each row belongs to, ``""`` where there are no parts.
        items: What each row is about beside its image (a question), ``""`` for a caption.
        columns: Name -> bool, int64 or float64 [n].
    """

    image_ids: NDArray[np.int64]
    splits: tuple[str, ...]
    items: tuple[str, ...]
    columns: Mapping[str, NDArray[Any]] = field(repr=False)

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getattr__(self, name: str) -> NDArray[Any]:
        try:
            return self.__dict__["columns"][name]  # type: ignore[no-any-return]
        except KeyError:
            raise AttributeError(f"a stored table has no column {name!r}") from None

    @property
    def keys(self) -> list[Key]:
        """What identifies each row: image, split and item."""
        return list(zip(self.image_ids.tolist(), self.splits, self.items, strict=True))

    @property
    def question_ids(self) -> tuple[str, ...]:
        """A name of each row, for pairing."""
        return tuple(f"{split}:{item}" for split, item in zip(self.splits, self.items, strict=True))

    def take(self, rows: Sequence[int] | NDArray[np.int64]) -> ItemTable:
        """The table of some of the rows, in the order of ``rows``, int [k]."""
        index = np.asarray(rows, dtype=np.int64)
        return ItemTable(
            self.image_ids[index],
            tuple(self.splits[i] for i in index),
            tuple(self.items[i] for i in index),
            {name: values[index] for name, values in self.columns.items()},
        )

    def differs(self, other: ItemTable) -> bool:
        """Whether any column that both have differs between them; rows must be in the same order.

        Scores may differ by what another batch does to their last digits.
        """
        shared = self.columns.keys() & other.columns.keys()
        return any(_differ(self.columns[name], other.columns[name]) for name in shared)


def _differ(a: NDArray[Any], b: NDArray[Any]) -> bool:
    if "f" in (a.dtype.kind, b.dtype.kind):
        return not np.allclose(a, b, rtol=0, atol=_SCORE_NOISE, equal_nan=True)
    return not np.array_equal(a, b)


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


@dataclass(frozen=True)
class ScoredTask(Task):
    """A task whose tables are :class:`~vlmfix.evals.benchmarks.base.Scored`.

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
