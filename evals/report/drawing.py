"""What every plot is drawn with: empty figures, colours, marks with tooltips, places for names, elements of a page."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#ff8ab7", "#a463f2", "#97bbf5", "#9c6b4e", "#9498a0")
"""Of the methods, in their order, the baseline aside."""


WIDE, NARROW = 7.6, 4.2
"""Inches: of a file or a page, and of a page on a telephone."""

INK, PAPER, FAINT = "#222222", "#ffffff", "#888888"  # a page puts its own colours in place of the first two
_DPI = 150

Box = tuple[float, float, float, float]
"""Left, top, right, bottom; y runs down."""

_DIRECTIONS = ((1, 0), (-1, 0), (0, -1), (0, 1), (1, -1), (-1, -1), (1, 1), (-1, 1))


_DISTANCES = (9.0, 18.0, 30.0, 44.0, 60.0, 80.0)


def empty_figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """An empty figure in inches that no window manager ever sees."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = Figure(figsize=(width, height), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(made)
    found = made.subplots(rows, columns, squeeze=False)
    return made, [each for row in found for each in row]


def write_title(made: Figure, results: Mapping[str, Any], title: str) -> None:
    """Say what a file shows; a page says it in its own words."""
    made.suptitle(f"{title}\n{results['model']} on {results['data']}", fontsize=10, color=INK)


def row_colours(results: Mapping[str, Any]) -> dict[str, str]:
    """Every row's colour, the same in every plot."""
    labels = [row["label"] for row in results["methods"]]
    return {label: INK if i == 0 else COLOURS[(i - 1) % len(COLOURS)] for i, label in enumerate(labels)}


def hide_spines(panel: Axes, sides: Sequence[str]) -> None:
    """Leave out some sides of the frame, and draw the others as lightly as the text allows."""
    for side in sides:
        panel.spines[side].set_visible(False)
    panel.spines[:].set_color(FAINT)
    panel.tick_params(colors=INK, labelsize=8)


def draw_dot(panel: Axes, x: float, y: float, colour: str, *, filled: bool, size: float, tooltip: str) -> None:
    """Draw a point, hollow or filled, that says in a page what it stands for."""
    (mark,) = panel.plot([x], [y], "o", color=colour, markerfacecolor=colour if filled else PAPER, markersize=size)
    mark.set(zorder=3, gid=f"title:{tooltip}")


def svg(made: Figure, name: str) -> str:
    """A figure as an element of a page: its text stays text, and its colours follow the page.

    Args:
        made: The figure, drawn without a title.
        name: What it shows, for those who cannot see it; no two figures of a page share one.
    """
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        made.savefig(
            buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
        )
    drawing = buffer.getvalue()
    drawing = drawing[drawing.index("<svg") :].replace("<svg", f'<svg role="img" aria-label="{escape(name)}"', 1)
    # Groups with an id of ours carry a tooltip; the other ids would stand twice in a page of several figures.
    drawing = re.sub(r'<g id="title:([^"]*)">', r"<g><title>\1</title>", drawing)
    drawing = re.sub(r'<g id="[^"]*"(/?)>', r"<g\1>", drawing)
    return drawing.replace(INK, "currentColor").replace(PAPER, "var(--paper)")


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
