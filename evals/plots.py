"""The plots of a run as PNG, with matplotlib; everything comes from ``results.json``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmfix.errors import DataError, VlmfixError

from .cache import write_error
from .columns import Metric, used_metrics
from .invented import categories
from .labels import place_labels
from .pareto import axes, flat_front, pareto
from .report_tables import long_heading

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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
