"""The drawings of ``report.html``, as SVG; everything comes from ``results.json``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .plots import COLOURS
from .columns import Metric, used_metrics
from .invented import categories
from .labels import place_labels
from .markup import line, polyline, svg, text, write
from .pareto import axes, flat_front, pareto
from .report_tables import long_heading
from .tables import excludes_zero, number, signed, survives

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
