"""The plots of a run as PNG, with matplotlib; everything comes from ``results.json``."""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmfix.errors import DataError, VlmfixError

from ..benchmarks.columns import Metric, used_metrics
from ..data.write import write_error
from ..scores.pareto import axes, flat_front, pareto
from ..tables import excludes_zero, line, number, polyline, signed, survives, svg, text, write
from .text import long_heading

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def categories(results: Mapping[str, Any], most: int) -> tuple[list[str], dict[str, dict[str, int]]]:
    """Captions that invent an object, per category, of the baseline and of every method (controls aside).

    Args:
        results: The content of ``results.json``.
        most: Categories to name, those invented most often over all rows.

    Returns:
        The categories, most frequent first, and label -> category -> captions; both empty where nothing was invented
        or the run did not count it.
    """
    counts = {
        row["label"]: dict(row["chair"]["invented"])
        for row in results["methods"]
        if row["role"] != "control" and "invented" in row.get("chair", {})
    }
    total: Counter[str] = Counter()
    for found in counts.values():
        total.update(found)
    names = [name for name, _ in sorted(total.items(), key=lambda item: (-item[1], item[0]))[:most]]
    return names, counts if names else {}


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
    """Find places for names beside points, in pixels, y running down.

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


COLOURS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#ff8ab7", "#a463f2", "#97bbf5", "#9c6b4e", "#9498a0")
"""Of the methods, in their order, the baseline aside; also those of ``report.html``."""


_TEXT = "#222222"


_DPI = 150


_LEADER = 12
"""Points between a mark and its name from which on a line joins them."""


_BARS = 4
"""Rows up to which categories are drawn as bars; more are a table."""


def write_plots(results: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draw every plot that a run has figures for.

    Args:
        results: The content of ``results.json``.
        folder: Where the files go.

    Returns:
        The files: of ``intervals.png``, ``tradeoff.png`` and ``categories.png`` those there is something to draw for.

    Raises:
        VlmfixError: matplotlib is not installed, or a file cannot be written.
        DataError: There is nothing to draw.
    """
    _need_matplotlib()
    drawn: dict[str, Callable[[Mapping[str, Any]], Figure | None]] = {
        "intervals": interval_figure,
        "tradeoff": tradeoff_figure,
        "categories": category_figure,
    }
    written = []
    for name, draw in drawn.items():
        made = draw(results)
        if made is not None:
            written.append(_save(made, folder / f"{name}.png"))
    if not written:
        raise DataError("there is nothing to draw: the run has one row only, and no captions")
    return written


def _category_map(results: Mapping[str, Any], names: Sequence[str], counts: Mapping[str, Mapping[str, int]]) -> Figure:
    """The same as a table of counts, coloured by the difference to the baseline: green fewer, red more."""
    from matplotlib.colors import LinearSegmentedColormap

    labels = list(counts)
    base = counts[labels[0]]
    made, (panel,) = _figure(1.8 + 0.55 * len(labels), 1.5 + 0.27 * len(names))
    change = [[counts[label].get(n, 0) - base.get(n, 0) for label in labels] for n in names]
    colours = LinearSegmentedColormap.from_list("change", ["#2a9d6f", "#ffffff", "#d1495b"])
    most = max((abs(value) for row in change for value in row), default=0) or 1
    panel.imshow(change, cmap=colours, vmin=-1.6 * most, vmax=1.6 * most, aspect="auto")
    for y, name in enumerate(names):
        for x, label in enumerate(labels):
            panel.text(x, y, str(counts[label].get(name, 0)), ha="center", va="center", fontsize=8, color=_TEXT)
    panel.set_xticks(range(len(labels)), labels, rotation=45, ha="left")
    panel.xaxis.tick_top()
    panel.set_yticks(range(len(names)), names)
    panel.tick_params(length=0)
    title = f"Captions that invent an object, by category; green: fewer than {labels[0]}, red: more"
    made.suptitle(f"{title}\n{_subtitle(results)}", fontsize=9)
    _plain(panel, ("top", "right", "left", "bottom"))
    return made


def _need_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise VlmfixError("plots need matplotlib; type: pip install 'vlmfix[plot]'") from error


def _save(made: Figure, path: Path) -> Path:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        made.savefig(path, facecolor="white")
    except OSError as error:
        raise write_error(path, error) from error
    return path


def _figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """An empty figure in inches that no window manager ever sees."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = Figure(figsize=(width, height), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(made)
    found = made.subplots(rows, columns, squeeze=False)
    return made, [each for row in found for each in row]


def _colours(results: Mapping[str, Any]) -> dict[str, str]:
    labels = [row["label"] for row in results["methods"]]
    return {label: _TEXT if i == 0 else COLOURS[(i - 1) % len(COLOURS)] for i, label in enumerate(labels)}


def _plain(axes_: Axes, sides: Sequence[str] = ("top", "right")) -> None:
    for side in sides:
        axes_.spines[side].set_visible(False)
    axes_.tick_params(colors=_TEXT, labelsize=8)


def _subtitle(results: Mapping[str, Any]) -> str:
    return f"{results['model']} on {results['data']}"


def interval_figure(results: Mapping[str, Any]) -> Figure | None:
    """Every method's paired differences with their 95 % intervals, one panel per figure that has a better side.

    Hollow: the difference does not survive the correction for several methods. None with nothing to compare.
    """
    rows = [row for row in results["methods"] if row.get("differences")]
    shown = [metric for metric in used_metrics(results) if metric.percent and metric.better]
    if not rows or not shown:
        return None
    across = min(3, len(shown))
    down = -(-len(shown) // across)
    made, panels = _figure(1.9 + 2.9 * across, down * (0.9 + 0.22 * len(rows)) + 0.5, down, across)
    colours = _colours(results)
    for index, (metric, panel) in enumerate(zip(shown, panels, strict=False)):
        _interval_panel(panel, metric, rows, colours, named=index % across == 0)
    for panel in panels[len(shown) :]:
        panel.set_visible(False)
    reference = results.get("reference", "none")
    made.suptitle(
        f"Differences to {reference} in points, 95 % intervals; filled: survives the correction\n{_subtitle(results)}",
        fontsize=10,
    )
    return made


def _interval_panel(
    panel: Axes, metric: Metric, rows: Sequence[Mapping[str, Any]], colours: Mapping[str, str], *, named: bool
) -> None:
    for place, row in enumerate(rows):
        found = row["differences"].get(metric.key)
        if found is None or found["low"] is None:
            continue
        low, middle, high = (100 * found[end] for end in ("low", "estimate", "high"))
        colour = colours[row["label"]]
        sure = (low > 0 or high < 0) and (found.get("p_holm") is None or found["p_holm"] < 0.05)
        panel.plot([low, high], [place, place], color=colour, linewidth=2.2, solid_capstyle="butt")
        panel.plot([middle], [place], "o", color=colour, markersize=5.5, markerfacecolor=colour if sure else "white")
    panel.axvline(0, color="#888888", linewidth=0.8, zorder=0)
    panel.set_ylim(len(rows) - 0.4, -0.6)
    panel.set_yticks(range(len(rows)), [row["label"] for row in rows] if named else [])
    panel.tick_params(axis="y", length=0)
    panel.margins(x=0.08)
    panel.locator_params(axis="x", nbins=5)
    side = "left" if metric.better < 0 else "right"
    panel.set_title(f"{long_heading(metric)}\nbetter: {side}", fontsize=8.5, color=_TEXT)
    _plain(panel, ("top", "right", "left"))


def tradeoff_figure(results: Mapping[str, Any]) -> Figure | None:
    """Hallucination against recall: methods, their head controls, the front and the early-stop curve.

    The cross through a method is the 95 % interval of its paired difference to the baseline. None where no benchmark
    has both figures.
    """
    chosen, points = axes(results), pareto(results)
    if chosen is None or not points:
        return None
    made, (panel,) = _figure(7.6, 5.0)
    roles = {row["label"]: row for row in results["methods"]}
    colours = _colours(results)
    base = [100 * points[0][name] for name in ("recall", "hallucination")]
    _early_stop_line(panel, results, points, chosen)
    front = flat_front([(p["recall"], p["hallucination"]) for p in points])
    if len(front) > 1:
        drawn = zip(*[(100 * x, 100 * y) for x, y in front], strict=True)
        panel.plot(*drawn, color="#22aa88", linewidth=1.2, zorder=1, label="front in these two")
    for point in points:
        row = roles[point["label"]]
        x, y, colour = 100 * point["recall"], 100 * point["hallucination"], colours[point["label"]]
        for metric, horizontal in ((chosen[1], True), (chosen[0], False)):
            found = row.get("differences", {}).get(metric.key)
            if found is not None and found["low"] is not None:
                ends = [base[0 if horizontal else 1] + 100 * found[end] for end in ("low", "high")]
                line_x, line_y = (ends, [y, y]) if horizontal else ([x, x], ends)
                panel.plot(line_x, line_y, color=colour, alpha=0.3, linewidth=1.2, zorder=2)
        hollow = row["role"] == "control"
        panel.plot([x], [y], "o", color=colour, markerfacecolor="white" if hollow else colour, markersize=7, zorder=3)
    panel.set_xlabel(f"{chosen[1].title}, %  (better: right)", fontsize=9)
    panel.set_ylabel(f"{chosen[0].title}, %  (better: down)", fontsize=9)
    panel.set_title(f"Hallucination against recall; hollow: controls\n{_subtitle(results)}", fontsize=10)
    _plain(panel)
    _name_points(made, panel, points)
    if panel.get_legend_handles_labels()[0]:
        panel.legend(fontsize=8, frameon=False, loc="upper left")
    return made


def _early_stop_line(
    panel: Axes, results: Mapping[str, Any], points: Sequence[Mapping[str, Any]], chosen: tuple[Metric, Metric]
) -> None:
    """The baseline's captions, ended ever earlier, as far left as the methods go."""
    lowest = min(point["recall"] for point in points)
    curve = [
        (100 * p["recall"], 100 * p["chair_i"])
        for p in results.get("early_stop_curve", ())
        if p["chair_i"] is not None and p["recall"] >= lowest - 0.02
    ]
    if chosen[0].benchmark == "chair" and len(curve) > 1:
        panel.plot(
            *zip(*curve, strict=True), "--", color="#888888", linewidth=1.1, zorder=1, label="early stop of none"
        )


def _name_points(made: Figure, panel: Axes, points: Sequence[Mapping[str, Any]]) -> None:
    made.draw_without_rendering()  # fixes the layout, so that pixels mean something
    made.set_layout_engine("none")
    width, height = made.bbox.width, made.bbox.height
    scale = made.dpi / 72
    pixels = [panel.transData.transform((100 * p["recall"], 100 * p["hallucination"])) for p in points]
    box = panel.get_window_extent()
    placed = place_labels(
        [(float(x), float(height - y)) for x, y in pixels],
        [4.6 * scale * len(p["label"]) for p in points],
        10 * scale,
        (box.x0, height - box.y1, width, height - box.y0),
        5 * scale,
    )
    for point, (x, y), label in zip(points, pixels, placed, strict=True):
        at = (label.x, height - label.y)
        panel.annotate(
            point["label"], at, xycoords="figure pixels", fontsize=8, va="center", color=_TEXT, annotation_clip=False
        )
        if label.distance > _LEADER * scale:
            end = label.x if label.x > x else label.box[2]
            panel.annotate(
                "", (x, y), (end, at[1]), "figure pixels", "figure pixels",
                arrowprops={"arrowstyle": "-", "color": "#aaaaaa", "linewidth": 0.6}, zorder=2,
            )  # fmt: skip


def category_figure(results: Mapping[str, Any], most: int = 12) -> Figure | None:
    """How many captions invent an object, per category, with the baseline and with every method.

    Args:
        results: The content of ``results.json``.
        most: Categories shown, those invented most often.

    Returns:
        None where nothing was invented, or the run kept no categories.
    """
    names, counts = categories(results, most)
    if not names:
        return None
    labels = list(counts)
    if len(labels) > _BARS:
        return _category_map(results, names, counts)
    bar = 0.8 / len(labels)
    made, (panel,) = _figure(7.6, 1.0 + len(names) * max(0.3, 0.11 * len(labels)))
    colours = _colours(results)
    for place, label in enumerate(labels):
        at = [i + (place - (len(labels) - 1) / 2) * bar for i in range(len(names))]
        panel.barh(at, [counts[label].get(n, 0) for n in names], bar * 0.9, color=colours[label], label=label)
    panel.set_yticks(range(len(names)), names)
    panel.set_ylim(len(names) - 0.4, -0.6)
    panel.tick_params(axis="y", length=0)
    panel.set_xlabel("captions that name it where it is not", fontsize=9)
    panel.set_title(f"Objects invented, by category\n{_subtitle(results)}", fontsize=10)
    panel.locator_params(axis="x", integer=True)
    panel.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    _plain(panel, ("top", "right", "left"))
    return made


BARS = 4
"""Rows up to which invented objects are drawn as bars; more are a table."""


TOP = 16.0
"""Room above the scatter, in pixels."""


CATEGORIES = 12
"""Categories of invented objects shown."""


def colours(results: Mapping[str, Any]) -> dict[str, str]:
    """Every row's colour, the same in every drawing."""
    labels = [row["label"] for row in results["methods"]]
    return {label: "currentColor" if i == 0 else COLOURS[(i - 1) % len(COLOURS)] for i, label in enumerate(labels)}


def intervals(results: Mapping[str, Any]) -> str:
    """The paired differences with their intervals, one panel per figure with a better side."""
    shown = [metric for metric in used_metrics(results) if metric.percent and metric.better]
    rows = [row for row in results["methods"] if row.get("differences")]
    found = colours(results)
    return f'<div class="panels">{"".join(_panel(metric, rows, found) for metric in shown)}</div>'


def _panel(metric: Metric, rows: Sequence[Mapping[str, Any]], found: Mapping[str, str]) -> str:
    left, width, step, top = 104, 206, 20, 40
    known = [(row, row["differences"].get(metric.key)) for row in rows]
    values = [100 * d[end] for _, d in known if d for end in ("low", "high", "estimate") if d[end] is not None]
    low, high = min([*values, 0.0]), max([*values, 0.0])
    spread = (high - low) or 1.0

    def at(value: float) -> float:
        return float(left + 6 + (100 * value - low) / spread * (width - 12))

    side = "left" if metric.better < 0 else "right"
    bottom = top + step * len(rows)
    marks = [write(left, 14, long_heading(metric), bold=True), write(left, 29, f"better: {side}")]
    marks.append(line(at(0), top - 6, at(0), bottom - 4, "currentColor", 0.45))
    ends = ((low, left + 6, "start"), (high, left + width - 6, "end")) if high > low else ((low, left + 6, "middle"),)
    marks += [write(x, bottom + 12, f"{end:+.1f}" if end else "0", anchor=anchor) for end, x, anchor in ends]
    for place, (row, interval) in enumerate(known):
        y = top + step * place + 4
        marks.append(write(left - 6, y + 4, row["label"], anchor="end"))
        if interval is None or interval["low"] is None:
            continue
        colour = found[row["label"]]
        fill = colour if excludes_zero(interval) and survives(interval) else "var(--page)"
        told = f"{signed(interval['estimate'])} [{signed(interval['low'])}, {signed(interval['high'])}]"
        marks.append(line(at(interval["low"]), y, at(interval["high"]), y, colour, 1.0, 3))
        marks.append(
            f'<circle cx="{at(interval["estimate"]):.1f}" cy="{y}" r="4.5" stroke="{colour}" stroke-width="2" '
            f'fill="{fill}"><title>{text(row["label"])} {text(told)}</title></circle>'
        )
    return svg(left + width, bottom + 18, marks, f"{metric.title}: differences to the baseline")


def scatter(results: Mapping[str, Any]) -> str:
    """Hallucination against recall: a method is worth something if it goes down without going left."""
    chosen, points = axes(results), pareto(results)
    if chosen is None or not points:
        return "<p>No figures.</p>"
    width, height, margin = 760.0, 420.0, 60.0
    places = [(100 * p["recall"], 100 * p["hallucination"]) for p in points]
    curve = _early_stop(results, chosen, min(x for x, _ in places))
    (x_low, x_high), (y_low, y_high) = (_range([*each]) for each in zip(*places, *curve, strict=True))

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            margin + (x - x_low) / (x_high - x_low) * (width - 2 * margin),
            height - margin - (y - y_low) / (y_high - y_low) * (height - margin - TOP),
        )

    marks = _axes(width, height, margin, (x_low, x_high), (y_low, y_high), chosen)
    if len(curve) > 1:
        marks.append(polyline([place(*point) for point in curve], "currentColor", dashes="5 4", opacity=0.55))
    front = flat_front(places)
    if len(front) > 1:
        marks.append(polyline([place(*point) for point in front], "#22aa88"))
    marks += _points(results, points, [place(*each) for each in places], (margin, 10.0, width, height - margin))
    key = (
        '<p class="key"><span style="color:#2a8">―</span> front in these two &nbsp; <span>┄</span> early stop of none, '
        "which needs no method &nbsp; ○ control</p>"
    )
    return f'<div class="wide">{svg(width, height, marks, "hallucination against recall")}</div>{key}'


def _early_stop(results: Mapping[str, Any], chosen: tuple[Metric, Metric], lowest: float) -> list[tuple[float, float]]:
    """The baseline's captions, ended ever earlier, as far left as the methods go."""
    if chosen[0].benchmark != "chair":
        return []
    curve = [p for p in results.get("early_stop_curve", ()) if p["chair_i"] is not None]
    return [(100 * p["recall"], 100 * p["chair_i"]) for p in curve if 100 * p["recall"] >= lowest - 2]


def _axes(
    width: float,
    height: float,
    margin: float,
    x_range: tuple[float, float],
    y_range: tuple[float, float],
    chosen: tuple[Metric, Metric],
) -> list[str]:
    right, bottom, top = width - margin, height - margin, TOP
    marks = [
        line(margin, bottom, right, bottom, "currentColor", 0.4),
        line(margin, top, margin, bottom, "currentColor", 0.4),
    ]
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        x, y = margin + share * (right - margin), bottom - share * (bottom - top)
        marks.append(line(x, bottom, x, bottom + 4, "currentColor", 0.4))
        marks.append(line(margin - 4, y, margin, y, "currentColor", 0.4))
        marks.append(write(x, bottom + 18, f"{x_range[0] + share * (x_range[1] - x_range[0]):.1f}", anchor="middle"))
        marks.append(write(margin - 8, y + 4, f"{y_range[0] + share * (y_range[1] - y_range[0]):.1f}", anchor="end"))
    marks.append(write(width / 2, height - 14, f"{chosen[1].title} of objects, % (better: right)", anchor="middle"))
    marks.append(
        f'<text transform="translate(14 {height / 2:.0f}) rotate(-90)" text-anchor="middle">'
        f"{text(chosen[0].title)}, % (better: down)</text>"
    )
    return marks


def _points(
    results: Mapping[str, Any],
    points: Sequence[Mapping[str, Any]],
    pixels: Sequence[tuple[float, float]],
    frame: tuple[float, float, float, float],
) -> list[str]:
    rows = {row["label"]: row for row in results["methods"]}
    found = colours(results)
    labels = place_labels(pixels, [6.4 * len(p["label"]) for p in points], 13.0, frame)
    marks = []
    for point, (x, y), label in zip(points, pixels, labels, strict=True):
        colour = found[point["label"]]
        fill = "var(--page)" if rows[point["label"]]["role"] == "control" else colour
        told = f"{point['label']}: {number(point['hallucination'])} % at recall {number(point['recall'])} %"
        if label.distance > 12:
            end = label.x if label.x > x else label.box[2]
            marks.append(line(x, y, end, label.y, "currentColor", 0.35))
        marks.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="6" stroke="{colour}" stroke-width="2" fill="{fill}">'
            f"<title>{text(told)}</title></circle>"
        )
        marks.append(write(label.x, label.y + 4, point["label"]))
    return marks


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    margin = max(0.1 * (high - low), 0.5)
    return low - margin, high + margin


def invented(results: Mapping[str, Any]) -> str:
    """How many captions invent an object, per category, with the baseline and with every method."""
    names, counts = categories(results, CATEGORIES)
    if not names:
        return "<p>No caption names an object that is not there.</p>"
    return _bars(results, names, counts) if len(counts) <= BARS else _map(names, counts)


def _bars(results: Mapping[str, Any], names: Sequence[str], counts: Mapping[str, Mapping[str, int]]) -> str:
    labels, found = list(counts), colours(results)
    bar, group, left = 12, 12 * len(labels) + 12, 120
    top = max(counts[label].get(name, 0) for label in labels for name in names)
    marks = []
    for number_, name in enumerate(names):
        y = number_ * group + 6
        marks.append(write(left - 8, y + bar * len(labels) / 2 + 3, name, anchor="end"))
        for place, label in enumerate(labels):
            count = counts[label].get(name, 0)
            length, at = 560 * count / top, y + place * bar
            marks.append(
                f'<rect x="{left}" y="{at}" width="{length:.1f}" height="{bar - 2}" fill="{found[label]}" '
                f'opacity=".8"/>'
                f'<text x="{left + length + 5:.1f}" y="{at + 9}" style="font-size:10px">{count}</text>'
            )
    key = " · ".join(f'<span style="color:{found[label]}">■</span> {text(label)}' for label in labels)
    drawing = svg(720, len(names) * group + 10, marks, "invented objects by category")
    return f'<p class="key">{key}</p><div class="wide">{drawing}</div>'


def _map(names: Sequence[str], counts: Mapping[str, Mapping[str, int]]) -> str:
    """A table of counts, coloured by the difference to the baseline."""
    labels = list(counts)
    base = counts[labels[0]]
    most = max((abs(counts[label].get(n, 0) - base.get(n, 0)) for label in labels for n in names), default=0) or 1
    head = "".join(f'<th class="up"><span>{text(label)}</span></th>' for label in labels)
    body = []
    for name in names:
        cells = []
        for label in labels:
            change = counts[label].get(name, 0) - base.get(name, 0)
            colour = "221, 51, 51" if change > 0 else "34, 170, 136"
            shade = f"rgba({colour}, {0.5 * abs(change) / most:.2f})"
            cells.append(f'<td style="background:{shade}">{counts[label].get(name, 0)}</td>')
        body.append(f'<tr><td class="word">{text(name)}</td>{"".join(cells)}</tr>')
    return (
        f'<p class="key">Captions that name it where it is not; green: fewer than {text(labels[0])}, red: more.</p>'
        f'<div class="wide"><table class="map"><thead><tr><th></th>{head}</tr></thead><tbody>{"".join(body)}</tbody>'
        "</table></div>"
    )


def add_plot(verbs: Any) -> argparse.ArgumentParser:
    """Add ``vlmfix plot`` to the command line; the caller sets what runs it (see :func:`run`)."""
    parser: argparse.ArgumentParser = verbs.add_parser(
        "plot",
        allow_abbrev=False,
        help="the plots of a run as PNG",
        description="Draw a run's plots: differences with their intervals, hallucination against recall, and invented "
        "objects by category. Needs matplotlib (pip install 'vlmfix[plot]').",
    )
    parser.add_argument("folder", type=Path, metavar="RUN", help="run folder")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the files go (default: the run folder)")
    return parser


def run(options: argparse.Namespace) -> str:
    """Draw the plots and say where they are.

    Raises:
        VlmfixError: No such run, nothing to draw, or matplotlib is not installed.
    """
    from ..scores.counts import load_results

    written = write_plots(load_results(options.folder), options.out or options.folder)
    return f"written: {' '.join(map(str, written))}"
