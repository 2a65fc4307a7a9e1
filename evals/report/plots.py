"""The plots of a run, made from ``results.json`` alone: PNG files for ``vlmfix plot``, SVG for ``report.html``."""

from __future__ import annotations

import argparse
import io
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmfix.errors import DataError

from ..benchmarks.columns import Metric, used_metrics
from ..data.write import write_error
from ..scores.pareto import axes, flat_front, pareto
from ..tables import excludes_zero, interval_cell, number, signed, survives
from .labels import place_labels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDE, NARROW = 7.6, 4.2
"""Inches: of a file or a page, and of a page on a telephone."""


COLOURS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#ff8ab7", "#a463f2", "#97bbf5", "#9c6b4e", "#9498a0")
"""Of the methods, in their order, the baseline aside."""


_INK, _PAPER, _FAINT = "#222222", "#ffffff", "#888888"  # a page puts its own colours in place of the first two
_DPI = 150


def write_plots(results: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draw every plot that a run has figures for.

    Args:
        results: The content of ``results.json``.
        folder: Where the files go.

    Returns:
        The files: of ``intervals.png``, ``tradeoff.png`` and ``categories.png`` those there is something to draw for.

    Raises:
        VlmfixError: A file cannot be written.
        DataError: There is nothing to draw.
    """
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


def _save(made: Figure, path: Path) -> Path:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        made.savefig(path, facecolor=_PAPER)
    except OSError as error:
        raise write_error(path, error) from error
    return path


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
    return drawing.replace(_INK, "currentColor").replace(_PAPER, "var(--paper)")


def _figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """An empty figure in inches that no window manager ever sees."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = Figure(figsize=(width, height), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(made)
    found = made.subplots(rows, columns, squeeze=False)
    return made, [each for row in found for each in row]


def _title(made: Figure, results: Mapping[str, Any], title: str) -> None:
    """Say what a file shows; a page says it in its own words."""
    made.suptitle(f"{title}\n{results['model']} on {results['data']}", fontsize=10, color=_INK)


def _colours(results: Mapping[str, Any]) -> dict[str, str]:
    """Every row's colour, the same in every plot."""
    labels = [row["label"] for row in results["methods"]]
    return {label: _INK if i == 0 else COLOURS[(i - 1) % len(COLOURS)] for i, label in enumerate(labels)}


def _plain(panel: Axes, sides: Sequence[str]) -> None:
    for side in sides:
        panel.spines[side].set_visible(False)
    panel.spines[:].set_color(_FAINT)
    panel.tick_params(colors=_INK, labelsize=8)


def _dot(panel: Axes, x: float, y: float, colour: str, *, filled: bool, size: float, tooltip: str) -> None:
    (mark,) = panel.plot([x], [y], "o", color=colour, markerfacecolor=colour if filled else _PAPER, markersize=size)
    mark.set(zorder=3, gid=f"title:{tooltip}")


def interval_columns(results: Mapping[str, Any]) -> list[Metric]:
    """The figures whose differences are drawn: those in percent that have a better side."""
    compared = any(row.get("differences") for row in results["methods"])
    return [metric for metric in used_metrics(results) if metric.percent and metric.better] if compared else []


def interval_figure(
    results: Mapping[str, Any], shown: Sequence[Metric] | None = None, *, titled: bool = True
) -> Figure | None:
    """Every method's paired differences with their 95 % intervals, one panel per figure.

    Hollow: the difference does not survive the correction for several methods.

    Args:
        results: The content of ``results.json``.
        shown: The figures; by default all of :func:`interval_columns`.
        titled: Whether the figure says what it shows.

    Returns:
        None with nothing to compare.
    """
    rows = [row for row in results["methods"] if row.get("differences")]
    shown = interval_columns(results) if shown is None else shown
    if not rows or not shown:
        return None
    across = min(3, len(shown))
    down = -(-len(shown) // across)
    made, panels = _figure(0.6 + 2.4 * across, down * (0.8 + 0.21 * len(rows)) + 0.45 * titled, down, across)
    for index, (metric, panel) in enumerate(zip(shown, panels, strict=False)):
        _interval_panel(panel, metric, rows, _colours(results), named=index % across == 0)
    for panel in panels[len(shown) :]:
        panel.set_visible(False)
    if titled:
        reference = results.get("reference", "none")
        _title(made, results, f"Differences to {reference} in points, 95 % intervals; filled: survives the correction")
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
        panel.plot([low, high], [place, place], color=colour, linewidth=2.2, solid_capstyle="butt")
        told = f"{row['label']} {signed(found['estimate'])} [{interval_cell(found).replace(',', ', ')}]"
        sure = excludes_zero(found) and survives(found)
        _dot(panel, middle, place, colour, filled=sure, size=5.5, tooltip=told)
    panel.axvline(0, color=_FAINT, linewidth=0.8, zorder=0)
    panel.set_ylim(len(rows) - 0.4, -0.6)
    panel.set_yticks(range(len(rows)), [row["label"] for row in rows] if named else [])
    panel.tick_params(axis="y", length=0)
    panel.margins(x=0.08)
    panel.locator_params(axis="x", nbins=5)
    side = "left" if metric.better < 0 else "right"
    panel.set_title(f"{metric.full_heading}\nbetter: {side}", fontsize=8.5, color=_INK)
    _plain(panel, ("top", "right", "left"))


def tradeoff_figure(results: Mapping[str, Any], width: float = WIDE, *, titled: bool = True) -> Figure | None:
    """Hallucination against recall: methods, their head controls, the front and the early-stop curve.

    The cross through a method is the 95 % interval of its paired difference to the baseline.

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
    made, (panel,) = _figure(width, 0.45 * width + 1.4)
    if titled:
        _title(made, results, "Hallucination against recall; hollow: controls")
    rows = {row["label"]: row for row in results["methods"]}
    colours = _colours(results)
    base = [100 * points[0][name] for name in ("recall", "hallucination")]
    curve = _early_stop_curve(results, chosen, lowest=min(point["recall"] for point in points) - 0.02)
    if len(curve) > 1:
        panel.plot(*zip(*curve, strict=True), "--", color=_FAINT, linewidth=1.1, zorder=1, label="early stop of none")
    front = flat_front([(p["recall"], p["hallucination"]) for p in points])
    if len(front) > 1:
        drawn = zip(*[(100 * x, 100 * y) for x, y in front], strict=True)
        panel.plot(*drawn, color="#22aa88", linewidth=1.2, zorder=1, label="front in these two")
    for point in points:
        row = rows[point["label"]]
        x, y, colour = 100 * point["recall"], 100 * point["hallucination"], colours[point["label"]]
        for metric, horizontal in ((chosen[1], True), (chosen[0], False)):
            found = row.get("differences", {}).get(metric.key)
            if found is not None and found["low"] is not None:
                ends = [base[0 if horizontal else 1] + 100 * found[end] for end in ("low", "high")]
                line_x, line_y = (ends, [y, y]) if horizontal else ([x, x], ends)
                panel.plot(line_x, line_y, color=colour, alpha=0.3, linewidth=1.2, zorder=2)
        told = f"{point['label']}: {number(point['hallucination'])} % at recall {number(point['recall'])} %"
        _dot(panel, x, y, colour, filled=row["role"] != "control", size=7, tooltip=told)
    panel.set_xlabel(f"{chosen[1].title}, %  (better: right)", fontsize=9, color=_INK)
    panel.set_ylabel(f"{chosen[0].title}, %  (better: down)", fontsize=9, color=_INK)
    _plain(panel, ("top", "right"))
    if panel.get_legend_handles_labels()[0]:
        made.legend(fontsize=8, frameon=False, loc="outside upper left", ncols=2, labelcolor=_INK)
    _name_points(made, panel, points)
    return made


def _early_stop_curve(
    results: Mapping[str, Any], chosen: tuple[Metric, Metric], lowest: float
) -> list[tuple[float, float]]:
    """Recall and hallucination of the baseline's captions, ended ever earlier, down to a recall."""
    if chosen[0].benchmark != "chair":
        return []
    curve = [p for p in results.get("early_stop_curve", ()) if p["chair_i"] is not None and p["recall"] >= lowest]
    return [(100 * p["recall"], 100 * p["chair_i"]) for p in curve]


_LEADER = 12  # points between a mark and its name from which on a line joins them


def _name_points(made: Figure, panel: Axes, points: Sequence[Mapping[str, Any]]) -> None:
    """Write the names beside the points, in points of the figure: the same at every resolution."""
    made.draw_without_rendering()  # fixes the layout, so that places mean something
    made.set_layout_engine("none")
    scale = made.dpi / 72
    width, height = made.bbox.width / scale, made.bbox.height / scale
    places = [panel.transData.transform((100 * p["recall"], 100 * p["hallucination"])) / scale for p in points]
    box = panel.get_window_extent()
    placed = place_labels(
        [(float(x), float(height - y)) for x, y in places],
        [4.6 * len(p["label"]) for p in points],
        10,
        (box.x0 / scale, height - box.y1 / scale, width, height - box.y0 / scale),
        5,
    )
    for point, (x, y), label in zip(points, places, placed, strict=True):
        at = (label.x, height - label.y)
        panel.annotate(
            point["label"], at, xycoords="figure points", fontsize=8, va="center", color=_INK, annotation_clip=False
        )
        if label.distance > _LEADER:
            end = label.x if label.x > x else label.box[2]
            panel.annotate(
                "", (x, y), (end, at[1]), "figure points", "figure points",
                arrowprops={"arrowstyle": "-", "color": _FAINT, "linewidth": 0.6}, zorder=2,
            )  # fmt: skip


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


def category_figure(results: Mapping[str, Any], width: float = WIDE, *, titled: bool = True) -> Figure | None:
    """How many captions invent an object, a row per method and a column per category, coloured by the change.

    Args:
        results: The content of ``results.json``.
        width: In inches; a narrow figure shows fewer categories, those invented most often.
        titled: Whether the figure says what it shows.

    Returns:
        None where nothing was invented, or the run kept no categories.
    """
    names, counts = categories(results, int(1.8 * width))
    if not names:
        return None
    from matplotlib.colors import LinearSegmentedColormap

    labels = list(counts)
    base = counts[labels[0]]
    made, (panel,) = _figure(width, 1.2 + 0.27 * len(labels))
    if titled:
        _title(made, results, f"Captions that invent an object; green: fewer than {labels[0]}, red: more")
    change = [[counts[label].get(n, 0) - base.get(n, 0) for n in names] for label in labels]
    shades = [(0.0, "#2a9d6fb0"), (0.5, "#2a9d6f00"), (0.5, "#d1495b00"), (1.0, "#d1495bb0")]
    colours = LinearSegmentedColormap.from_list("change", shades)
    most = max((abs(value) for row in change for value in row), default=0) or 1
    panel.pcolormesh(range(len(names) + 1), range(len(labels) + 1), change, cmap=colours, vmin=-most, vmax=most)
    for y, label in enumerate(labels):
        for x, name in enumerate(names):
            count = str(counts[label].get(name, 0))
            panel.text(x + 0.5, y + 0.5, count, ha="center", va="center", fontsize=8, color=_INK)
    panel.invert_yaxis()
    panel.set_xticks([x + 0.5 for x in range(len(names))], names, rotation=45, ha="left")
    panel.xaxis.tick_top()
    panel.set_yticks([y + 0.5 for y in range(len(labels))], labels)
    panel.tick_params(length=0)
    _plain(panel, ("top", "right", "left", "bottom"))
    return made


def add_plot(verbs: Any) -> argparse.ArgumentParser:
    """Add ``vlmfix plot`` to the command line; the caller sets what runs it (see :func:`run`)."""
    parser: argparse.ArgumentParser = verbs.add_parser(
        "plot",
        allow_abbrev=False,
        help="the plots of a run as PNG",
        description="Draw a run's plots: differences with their intervals, hallucination against recall, and invented "
        "objects by category.",
    )
    parser.add_argument("folder", type=Path, metavar="RUN", help="run folder")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the files go (default: the run folder)")
    return parser


def run(options: argparse.Namespace) -> str:
    """Draw the plots and say where they are.

    Raises:
        VlmfixError: No such run, or nothing to draw.
    """
    from ..scores.counts import load_results

    written = write_plots(load_results(options.folder), options.out or options.folder)
    return f"written: {' '.join(map(str, written))}"
