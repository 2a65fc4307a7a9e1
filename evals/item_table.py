"""A table of counts whose columns are known by name only, as ``counts.json`` keeps it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

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
