"""A dictionary that a deep copy of a model gets empty."""

from __future__ import annotations

from typing import Any, TypeVar

K = TypeVar("K")
V = TypeVar("V")


class Uncopied(dict[K, V]):
    """What belongs to running threads, or to one model alone: a deep copy begins without it.

    Threads may go on writing to it while another one copies the model.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> Uncopied[K, V]:
        return type(self)()
