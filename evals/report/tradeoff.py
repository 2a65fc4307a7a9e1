"""The plot of hallucination against recall: a run's methods among what needs no method."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..benchmarks.base import EARLY_STOP, SELF_VERIFICATION
from ..scores.pareto import CURVES, axes, curve_of, flat_front, pareto
from ..stats.figures import Figure
from ..tables import number
from .drawing import (
    FAINT,
    INK,
    PAPER,
    WIDE,
    draw_dot,
    empty_figure,
    hide_spines,
    place_labels,
    row_colours,
    write_title,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Drawing


def tradeoff_figure(results: Mapping[str, Any], width: float = WIDE, *, titled: bool = True) -> Drawing | None:
    """Hallucination against recall: methods, their head controls, the front, and what needs no method.

    The cross through a method is the 95 % interval of its paired difference to the baseline. The staircase is early
    stop, with dots at several lengths in words; beside it stand what the baseline gives at these lengths by regression,
    as far as it has such descriptions (what invents less is shorter, so that this is no choice one has), and
    self-verification.

    Args:
        results: The content of ``results.json``.
        width: In inches.
        titled: Whether the figure says what it shows.

    Returns:
        None where no benchmark has both figures.
    """
    chosen, points = axes(results), pareto(results)
    if chosen is None or not points:
        return None
    made, (panel,) = empty_figure(width, 0.45 * width + 1.4)
    if titled:
        write_title(
            made, results, "Hallucination against recall; bold: not dominated, seconds included; hollow: controls"
        )
    rows = {row["label"]: row for row in results["methods"]}
    colours = row_colours(results)
    base = [100 * points[0][name] for name in ("recall", "hallucination")]
    lengths = _draw_baselines(panel, results, chosen, lowest=min(point["recall"] for point in points) - 0.02)
    front = flat_front([(p["recall"], p["hallucination"]) for p in points])
    if len(front) > 1:
        drawn = zip(*[(100 * x, 100 * y) for x, y in front], strict=True)
        panel.plot(*drawn, color="#22aa88", linewidth=1.2, zorder=1, label="front in these two")
    for point in points:
        row = rows[point["label"]]
        x, y, colour = 100 * point["recall"], 100 * point["hallucination"], colours[point["label"]]
        for figure, horizontal in ((chosen[1], True), (chosen[0], False)):
            found = row.get("differences", {}).get(figure.key)
            if found is not None and found["low"] is not None:
                ends = [base[0 if horizontal else 1] + 100 * found[end] for end in ("low", "high")]
                line_x, line_y = (ends, [y, y]) if horizontal else ([x, x], ends)
                panel.plot(line_x, line_y, color=colour, alpha=0.3, linewidth=1.2, zorder=2)
        told = f"{point['label']}: {number(point['hallucination'])} % at recall {number(point['recall'])} %"
        told += f", {point['relative_seconds']:.2f} times the seconds"
        draw_dot(panel, x, y, colour, filled=row["role"] != "control", size=7, tooltip=told)
    panel.set_xlabel(f"{chosen[1].title}, %  (better: right)", fontsize=9, color=INK)
    panel.set_ylabel(f"{chosen[0].title}, %  (better: down)", fontsize=9, color=INK)
    hide_spines(panel, ("top", "right"))
    if panel.get_legend_handles_labels()[0]:
        made.legend(fontsize=7.5, frameon=False, loc="outside lower left", ncols=2, labelcolor=INK)
    names = [(str(p["label"]), 100 * p["recall"], 100 * p["hallucination"]) for p in points]
    _name_points(made, panel, names, lengths, bold={str(p["label"]) for p in points if p["front"]})
    return made


_ROUND = (1, 2, 5, 10, 20, 50, 100)

_STAIRS = 6


def _draw_baselines(
    panel: Axes, results: Mapping[str, Any], chosen: tuple[Figure, Figure], lowest: float
) -> list[tuple[str, float, float]]:
    """Draw what needs no method, down to a recall.

    Returns:
        The lengths on the staircase: name, recall and hallucination, in percent.
    """
    for control, style in ((EARLY_STOP, "-"), (SELF_VERIFICATION, "-.")):
        curve = [(100 * x, 100 * y) for _, x, y in curve_of(results, control, chosen) if x >= lowest]
        if len(curve) > 1:
            panel.plot(
                *zip(*curve, strict=True), style, color=FAINT, linewidth=1.1, drawstyle="steps-post", zorder=1,
                label=f"{control} of none",
            )  # fmt: skip
    shown, matched = (figure.name for figure in chosen)
    curve = results.get(CURVES[EARLY_STOP], ())
    stairs = _stairs([p for p in curve if _is_known(p, ("words", shown, matched)) and p[matched] >= lowest])
    if len(stairs) < 2:
        return []
    steps, regressed = (
        [(100 * p[matched], 100 * p[shown]) for p in found if _is_known(p, (shown, matched))]
        for found in (stairs, [p.get("of_length", {}) for p in stairs])
    )
    panel.plot(*zip(*steps[1:], strict=True), "o", color=FAINT, markersize=3.5, zorder=2)
    if len(regressed) > 1:
        panel.plot(
            *zip(*regressed, strict=True), "x:", color=FAINT, markersize=4, linewidth=0.8, zorder=1,
            label="captions of none that came out so short, by regression",
        )  # fmt: skip
    return [(f"{p['words']:.0f} words", x, y) for p, (x, y) in zip(stairs[1:], steps[1:], strict=True)]


def _is_known(point: Mapping[str, Any], names: Sequence[str]) -> bool:
    """Whether a point of an early-stop curve has these figures."""
    return None not in map(point.get, names)


def _stairs(curve: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The whole descriptions, and the points of an early-stop curve that are nearest to round numbers of words."""
    if not curve:
        return []
    lengths = [p["words"] for p in curve]
    longest, shortest = lengths[0], min(lengths)
    step = next((each for each in _ROUND if (longest - shortest) / each <= _STAIRS), _ROUND[-1])
    wanted = range(step * int(longest // step), int(shortest), -step)
    found = [curve[0], *(min(curve, key=lambda p: abs(p["words"] - words)) for words in wanted)]
    return list({point["words"]: point for point in found}.values())


_LEADER = 12  # points between a mark and its name from which on a line joins them


def _name_points(
    made: Drawing,
    panel: Axes,
    rows: Sequence[tuple[str, float, float]],
    lengths: Sequence[tuple[str, float, float]],
    bold: Collection[str],
) -> None:
    """Write the names beside the points, in points of the figure: the same at every resolution.

    Args:
        made: The figure.
        panel: Where the points are.
        rows: Of the rows: name and place.
        lengths: Of the staircase, written smaller.
        bold: Names of rows that are written so.
    """
    points = [*rows, *lengths]
    made.draw_without_rendering()  # fixes the layout, so that places mean something
    made.set_layout_engine("none")
    scale = made.dpi / 72
    width, height = made.bbox.width / scale, made.bbox.height / scale
    places = [panel.transData.transform((x, y)) / scale for _, x, y in points]
    box = panel.get_window_extent()
    placed = place_labels(
        [(float(x), float(height - y)) for x, y in places],
        [(4.9 if index < len(rows) else 3.6) * len(name) for index, (name, *_) in enumerate(points)],
        10,
        (box.x0 / scale, height - box.y1 / scale, width, height - box.y0 / scale),
        5,
    )
    for index, ((name, *_), (x, y), (left, top, right, bottom)) in enumerate(zip(points, places, placed, strict=True)):
        at = (left, height - (top + bottom) / 2)
        size, colour = (8, INK) if index < len(rows) else (6.5, FAINT)
        panel.annotate(
            name, at, xycoords="figure points", fontsize=size, va="center", color=colour, annotation_clip=False,
            fontweight="bold" if name in bold else "normal",
            bbox={"boxstyle": "square,pad=0.08", "facecolor": PAPER, "edgecolor": "none", "alpha": 0.8},
        )  # fmt: skip
        if max(left - x, x - right, top - (height - y), height - y - bottom) > _LEADER:
            panel.annotate(
                "", (x, y), (left if left > x else right, at[1]), "figure points", "figure points",
                arrowprops={"arrowstyle": "-", "color": FAINT, "linewidth": 0.6}, zorder=2,
            )  # fmt: skip
