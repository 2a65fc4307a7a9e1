"""What a method's parameters may be searched over by ``vlmfix tune``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Range:
    """Numbers between two bounds, both included.

    Attributes:
        low: The smallest; near where the method does nothing, so that a search can find out that less is better.
        high: The largest worth trying: beyond it, published runs break the text.
        log: Whether orders of magnitude matter rather than differences.
    """

    low: float
    high: float
    log: bool = False


@dataclass(frozen=True)
class Choice:
    """A few values.

    Attributes:
        values: JSON values, the default first.
    """

    values: tuple[Any, ...]


Space = Mapping[str, Range | Choice]
"""Parameters to search, by name."""
