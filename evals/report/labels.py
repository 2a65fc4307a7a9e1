"""Where the names of points go in a plot: close to their points, covering neither points nor each other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

Box = tuple[float, float, float, float]
"""Left, top, right, bottom; y runs down."""


_DIRECTIONS = ((1, 0), (-1, 0), (0, -1), (0, 1), (1, -1), (-1, -1), (1, 1), (-1, 1))


_DISTANCES = (9.0, 18.0, 30.0, 44.0, 60.0, 80.0)


@dataclass(frozen=True)
class Label:
    """Where a name goes.

    Attributes:
        x: Left end of the name.
        y: Middle of the name.
        distance: From the point to the name.
        box: What it covers.
    """

    x: float
    y: float
    distance: float
    box: Box


def place_labels(
    points: Sequence[tuple[float, float]], widths: Sequence[float], height: float, frame: Box, radius: float = 7.0
) -> list[Label]:
    """Find places for names beside points; y runs down.

    Every name takes the nearest place that covers no point and no name before it and lies in the frame; where there is
    none, the one that covers least.

    Args:
        points: Of the names, [n].
        widths: Of the names, [n].
        height: Of a line of text.
        frame: What the names must stay in.
        radius: Of the points' marks.
    """
    marks = [(x - radius, y - radius, x + radius, y + radius) for x, y in points]
    taken: list[Box] = []
    labels: list[Label] = []
    for (x, y), width in zip(points, widths, strict=True):
        best, least = None, math.inf
        for distance in _DISTANCES:
            for dx, dy in _DIRECTIONS:
                label = _candidate(x, y, width, height, dx * distance, dy * distance, distance)
                covered = sum(_overlap(label.box, other) for other in (*marks, *taken)) + 10 * _outside(
                    label.box, frame
                )
                if covered < least - 1e-9:
                    best, least = label, covered
            if least == 0:
                break
        assert best is not None
        taken.append(best.box)
        labels.append(best)
    return labels


def _candidate(x: float, y: float, width: float, height: float, dx: float, dy: float, distance: float) -> Label:
    left = x + dx if dx > 0 else x + dx - width if dx < 0 else x - width / 2
    middle = y + dy + math.copysign(height / 2, dy) * (dx == 0 and dy != 0)
    return Label(left, middle, distance, (left, middle - height / 2, left + width, middle + height / 2))


def _overlap(a: Box, b: Box) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def _outside(box: Box, frame: Box) -> float:
    whole = (box[2] - box[0]) * (box[3] - box[1])
    return whole - _overlap(box, frame)
