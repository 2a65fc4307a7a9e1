"""Where the names of points go in a plot: close to their points, covering neither points nor each other."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

Box = tuple[float, float, float, float]
"""Left, top, right, bottom; y runs down."""


_DIRECTIONS = ((1, 0), (-1, 0), (0, -1), (0, 1), (1, -1), (-1, -1), (1, 1), (-1, 1))


_DISTANCES = (9.0, 18.0, 30.0, 44.0, 60.0, 80.0)


def place_labels(
    points: Sequence[tuple[float, float]], widths: Sequence[float], height: float, frame: Box, radius: float = 7.0
) -> list[Box]:
    """Find places for names beside points; y runs down.

    Every name takes the nearest place that covers no point and no name before it and lies in the frame; where there is
    none, the one that covers least.

    Args:
        points: Of the names, [n].
        widths: Of the names, [n].
        height: Of a line of text.
        frame: What the names must stay in.
        radius: Of the points' marks.

    Returns:
        What each name covers.
    """
    taken: list[Box] = [(x - radius, y - radius, x + radius, y + radius) for x, y in points]
    placed: list[Box] = []
    for (x, y), width in zip(points, widths, strict=True):
        best, least = None, math.inf
        for box in _candidates(x, y, width, height):
            outside = width * height - _overlap(box, frame)
            covered = sum(_overlap(box, other) for other in taken) + 10 * outside
            if covered < least - 1e-9:
                best, least = box, covered
            if least == 0:
                break
        assert best is not None
        taken.append(best)
        placed.append(best)
    return placed


def _candidates(x: float, y: float, width: float, height: float) -> Iterator[Box]:
    """The places for a name around a point, the nearest first."""
    for distance in _DISTANCES:
        for right, down in _DIRECTIONS:
            left = x + right * distance + width * (min(right, 0) if right else -0.5)
            middle = y + down * distance + (0 if right else down * height / 2)
            yield left, middle - height / 2, left + width, middle + height / 2


def _overlap(a: Box, b: Box) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
