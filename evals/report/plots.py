"""The plots of a run, made from ``results.json`` alone: PNG files for ``vlmfix plot``, SVG for ``report.html``."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmfix.errors import DataError

from ..benchmarks.columns import used_figures
from ..data.write import write_error
from ..flags import verb_parser
from ..stats.figures import Figure
from ..tables import excludes_zero, interval_cell, signed, survives
from .drawing import FAINT, INK, PAPER, WIDE, draw_dot, empty_figure, hide_spines, row_colours, write_title
from .tradeoff import tradeoff_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Drawing


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
    drawn: dict[str, Callable[[Mapping[str, Any]], Drawing | None]] = {
        "intervals": interval_figure,
        "tradeoff": tradeoff_figure,
        "categories": category_figure,
    }
    written = []
    for name, draw in drawn.items():
        made = draw(results)
        if made is not None:
            path = folder / f"{name}.png"
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                made.savefig(path, facecolor=PAPER)
            except OSError as error:
                raise write_error(path, error) from error
            written.append(path)
    if not written:
        raise DataError("there is nothing to draw: the run has one row only, and no captions")
    return written


def interval_columns(results: Mapping[str, Any]) -> list[Figure]:
    """The figures whose differences are drawn: those in percent that have a better side."""
    compared = any(row.get("differences") for row in results["methods"])
    return [figure for figure in used_figures(results) if figure.percent and figure.better] if compared else []


def interval_figure(
    results: Mapping[str, Any], shown: Sequence[Figure] | None = None, *, titled: bool = True
) -> Drawing | None:
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
    made, panels = empty_figure(0.6 + 2.4 * across, down * (0.8 + 0.21 * len(rows)) + 0.45 * titled, down, across)
    for index, (figure, panel) in enumerate(zip(shown, panels, strict=False)):
        _interval_panel(panel, figure, rows, row_colours(results), named=index % across == 0)
    for panel in panels[len(shown) :]:
        panel.set_visible(False)
    if titled:
        reference = results.get("reference", "none")
        write_title(
            made, results, f"Differences to {reference} in points, 95 % intervals; filled: survives the correction"
        )
    return made


def _interval_panel(
    panel: Axes, figure: Figure, rows: Sequence[Mapping[str, Any]], colours: Mapping[str, str], *, named: bool
) -> None:
    for place, row in enumerate(rows):
        found = row["differences"].get(figure.key)
        if found is None or found["low"] is None:
            continue
        low, middle, high = (100 * found[end] for end in ("low", "estimate", "high"))
        colour = colours[row["label"]]
        panel.plot([low, high], [place, place], color=colour, linewidth=2.2, solid_capstyle="butt")
        told = f"{row['label']} {signed(found['estimate'])} [{interval_cell(found).replace(',', ', ')}]"
        sure = excludes_zero(found) and survives(found)
        draw_dot(panel, middle, place, colour, filled=sure, size=5.5, tooltip=told)
    panel.axvline(0, color=FAINT, linewidth=0.8, zorder=0)
    panel.set_ylim(len(rows) - 0.4, -0.6)
    panel.set_yticks(range(len(rows)), [row["label"] for row in rows] if named else [])
    panel.tick_params(axis="y", length=0)
    panel.margins(x=0.08)
    panel.locator_params(axis="x", nbins=5)
    side = "left" if figure.better < 0 else "right"
    panel.set_title(f"{figure.full_heading}\nbetter: {side}", fontsize=8.5, color=INK)
    hide_spines(panel, ("top", "right", "left"))


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
        row["label"]: dict(part["invented"])
        for row in results["methods"]
        for part in row.values()
        if row["role"] != "control" and isinstance(part, Mapping) and "invented" in part
    }
    total: Counter[str] = Counter()
    for found in counts.values():
        total.update(found)
    names = [name for name, _ in sorted(total.items(), key=lambda item: (-item[1], item[0]))[:most]]
    return names, counts if names else {}


def category_figure(results: Mapping[str, Any], width: float = WIDE, *, titled: bool = True) -> Drawing | None:
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
    made, (panel,) = empty_figure(min(width, 2.4 + 0.45 * len(names)), 1.2 + 0.27 * len(labels))
    if titled:
        write_title(made, results, f"Captions that invent an object; green: fewer than {labels[0]}, red: more")
    change = [[counts[label].get(n, 0) - base.get(n, 0) for n in names] for label in labels]
    shades = [(0.0, "#2a9d6fb0"), (0.5, "#2a9d6f00"), (0.5, "#d1495b00"), (1.0, "#d1495bb0")]
    colours = LinearSegmentedColormap.from_list("change", shades)
    most = max((abs(value) for row in change for value in row), default=0) or 1
    panel.pcolormesh(range(len(names) + 1), range(len(labels) + 1), change, cmap=colours, vmin=-most, vmax=most)
    for y, label in enumerate(labels):
        for x, name in enumerate(names):
            count = str(counts[label].get(name, 0))
            panel.text(x + 0.5, y + 0.5, count, ha="center", va="center", fontsize=8, color=INK)
    panel.invert_yaxis()
    panel.set_xticks([x + 0.5 for x in range(len(names))], names, rotation=45, ha="left")
    panel.xaxis.tick_top()
    panel.set_yticks([y + 0.5 for y in range(len(labels))], labels)
    panel.tick_params(length=0)
    hide_spines(panel, ("top", "right", "left", "bottom"))
    return made


_ABOUT = """\
Draw a run's plots: differences with their intervals, hallucination against recall, and invented objects by category.

  vlmfix plot runs/a                               into the run's folder
  vlmfix plot runs/a --out figures                 into another one
  vlmfix plot runs/testbed-1a2b3c4d                a run that named its folder by itself
"""


def add_plot(verbs: Any) -> argparse.ArgumentParser:
    """Add the verb to a command line's subparsers; import nothing heavy."""
    parser = verb_parser(verbs, "plot", _ABOUT, "RUN [OPTIONS]")
    parser.add_argument("folder", type=Path, metavar="RUN", help="run folder")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the files go (default: the run folder)")
    return parser


def run(options: argparse.Namespace, *, show: Callable[[str], None]) -> None:
    """Draw the plots and show where they are.

    Raises:
        VlmfixError: No such run, or nothing to draw.
    """
    from ..scores.counts import load_results

    written = write_plots(load_results(options.folder), options.out or options.folder)
    show(f"written: {' '.join(map(str, written))}")
