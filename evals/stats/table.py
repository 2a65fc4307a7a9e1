"""One method's answers as numbers: a row per caption or question, and columns that every figure is a function of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, TypeVar

import numpy as np
from numpy.typing import NDArray

from vlmfix.errors import DataError

from .bootstrap import interval_dict
from .figures import Column, Figure, one, read_column

T = TypeVar("T", bound="Table")

Key = tuple[int, str, str]
"""Image, split and item of a row."""

_SCORE_NOISE = 1e-3
"""What another batch does to the last digits of a logit."""


@dataclass(frozen=True, eq=False)
class Table:
    """One method's answers to a benchmark; its columns are attributes.

    A benchmark may derive a class that names its columns and counts as its official script does. ``counts.json`` keeps
    the columns, so that figures can be computed again without the answers.

    Attributes:
        FIGURES: The figures that :meth:`summary` gives.
        COUNTS: Official name -> the column that :meth:`counts` sums.
        image_ids: int64 [n], the image of each row: what is resampled.
        columns: Name -> bool, int or float array [n].
        splits: The part of the benchmark each row belongs to; empty for no parts.
        items: What each row is about beside its image, such as a question; empty for captions.
        truth: A short name of each row's ground truth. Empty: yes or no, as the column ``label`` says, if there is one.
    """

    FIGURES: ClassVar[tuple[Figure, ...]] = ()
    COUNTS: ClassVar[Mapping[str, Column]] = {"n": one}
    PER_ROW: ClassVar[tuple[str, ...]] = ("splits", "items", "truth")

    image_ids: NDArray[np.int64]
    columns: Mapping[str, NDArray[Any]] = field(repr=False)
    splits: tuple[str, ...] = ()
    items: tuple[str, ...] = ()
    truth: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Fill in what is empty."""
        for name in ("splits", "items"):
            if not getattr(self, name):
                object.__setattr__(self, name, ("",) * len(self))
        if not self.truth:
            label = self.columns.get("label")
            told = ("",) * len(self) if label is None else tuple("yes" if yes else "no" for yes in label.tolist())
            object.__setattr__(self, "truth", told)

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getattr__(self, name: str) -> NDArray[Any]:
        try:
            return self.__dict__["columns"][name]  # type: ignore[no-any-return]
        except KeyError:
            raise AttributeError(f"this table has no column {name!r}") from None

    @property
    def keys(self) -> list[Key]:
        """What identifies each row: image, split and item."""
        return list(zip(self.image_ids.tolist(), self.splits, self.items, strict=True))

    @property
    def question_ids(self) -> tuple[str, ...]:
        """A name of each row, for pairing."""
        return tuple(f"{split}:{item}" for split, item in zip(self.splits, self.items, strict=True))

    def summary(self) -> dict[str, float]:
        """The figures of the table's class, NaN where one is undefined; without those it has no columns for."""
        return summary(self, self.FIGURES)

    def counts(self) -> dict[str, Any]:
        """Integer sums under their official names."""
        return self.sums(self.COUNTS)

    def sums(self, columns: Mapping[str, Column]) -> dict[str, int]:
        """The sums of columns, without those that the table does not have."""
        there = {name: column for name, column in columns.items() if callable(column) or column in self.columns}
        return {name: int(np.asarray(read_column(column)(self)).sum()) for name, column in there.items()}

    def by_split(self: T) -> dict[str, T]:
        """The table of each split, in the order of the rows."""
        splits = np.asarray(self.splits)
        return {split: self.take(np.flatnonzero(splits == split)) for split in dict.fromkeys(self.splits)}

    def take(self: T, rows: Sequence[int] | NDArray[np.int64]) -> T:
        """The table of some of the rows, in the order of ``rows``, int [k]."""
        index = np.asarray(rows, dtype=np.int64)
        columns = {name: values[index] for name, values in self.columns.items()}
        told: dict[str, Any] = {name: tuple(getattr(self, name)[i] for i in index) for name in self.PER_ROW}
        return replace(self, image_ids=self.image_ids[index], columns=columns, **told)

    def differs(self, other: Table) -> bool:
        """Whether any column that both have differs between them; rows must be in the same order.

        Scores may differ by what another batch does to their last digits.
        """
        shared = self.columns.keys() & other.columns.keys()
        return any(_differ(self.columns[name], other.columns[name]) for name in shared)


def summary(table: Table, figures: Sequence[Figure]) -> dict[str, float]:
    """Every figure that the table has the columns for: name -> value, NaN where it is undefined."""
    return {figure.name: figure.statistic.of(table) for figure in figures if figure.statistic.is_defined(table)}


def differences(figures: Iterable[Figure], table: Any, other: Any, seed: int) -> dict[str, dict[str, Any]]:
    """Paired difference of two tables in every figure that both have: name -> interval for JSON.

    Args:
        figures: The figures.
        table: The method's table.
        other: What it is compared with, about the same images.
        seed: Seed of the bootstrap.
    """
    return {
        figure.name: interval_dict(figure.statistic.difference(table, other, seed=seed))
        for figure in figures
        if all(figure.statistic.is_defined(each) for each in (table, other))
    }


def check_columns(benchmark: str, questions: int, **columns: Sequence[object] | None) -> None:
    """Refuse nothing to score, and columns of another length than the questions.

    Args:
        benchmark: Its name for messages.
        questions: How many there are.
        columns: By their names; None for one that is not given.

    Raises:
        DataError: There are no questions, or a column does not fit.
    """
    if not questions:
        raise DataError(f"{benchmark} got no questions to score: give at least one")
    for name, column in columns.items():
        if column is not None and len(column) != questions:
            raise DataError(
                f"{benchmark} got {questions} questions but {len(column)} {name.replace('_', ' ')}: give one per "
                "question, in the same order"
            )


def _differ(a: NDArray[Any], b: NDArray[Any]) -> bool:
    if "f" in (a.dtype.kind, b.dtype.kind):
        return not np.allclose(a, b, rtol=0, atol=_SCORE_NOISE, equal_nan=True)
    return not np.array_equal(a, b)
