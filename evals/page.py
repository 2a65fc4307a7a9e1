"""``report.html``: one self-contained page with tables, plots and the captions that changed, to be looked at."""

from __future__ import annotations

import base64
import html
import io
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .columns import METRICS, Metric
from .data.coco import load_image
from .report import conditions
from .tables import number, signed

if TYPE_CHECKING:
    from .benchmarks.chair import ChairTask
    from .config import MethodSpec
    from .samples import Answer, Sample

    Answers = Mapping[tuple[str, int, str], Answer]

GALLERY = 6
"""Captions shown per method."""
CATEGORIES = 12
"""Categories shown in the plot of invented objects."""
COLOURS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#ff8ab7", "#a463f2", "#97bbf5", "#9c6b4e", "#9498a0")

STYLE = """
:root { color-scheme: light dark; --line: #8885; --soft: #8882; --bad: #d33; --good: #2a8; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1080px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; display: block; overflow-x: auto; }
th, td { padding: .3rem .6rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
tr.control td { opacity: .65; } small { opacity: .75; }
svg { max-width: 100%; height: auto; } svg text { fill: currentColor; font: 12px system-ui, sans-serif; }
.pair { display: grid; grid-template-columns: 220px 1fr; gap: 1rem; padding: 1rem 0; }
.pair { border-top: 1px solid var(--line); }
.pair img { width: 220px; border-radius: 6px; } .pair p { margin: .2rem 0 .6rem; }
mark { background: #d333; color: inherit; border-bottom: 2px solid var(--bad); }
mark.real { background: #2a82; border-bottom: 2px solid var(--good); }
@media (max-width: 640px) { .pair { grid-template-columns: 1fr; } }
"""


def html_report(
    results: Mapping[str, Any],
    methods: Sequence[MethodSpec],
    task: ChairTask | None,
    answers: Mapping[str, Answers],
) -> str:
    """Write the page of a run.

    Args:
        results: The content of ``results.json``.
        methods: Rows, the baseline first.
        task: What was captioned, if anything; its images are embedded as thumbnails.
        answers: Method label to its answers by (benchmark, image id, question).

    Returns:
        HTML without any reference to another file.
    """
    parts = [
        f"<h1>{_text(results['model'])} on {_text(results['data'])}</h1>",
        f"<p><small>{'<br>'.join(_text(line) for line in conditions(results))}</small></p>",
        "".join(f"<p>Note: {_text(note)}</p>" for note in results["notes"]),
        "<h2>Summary</h2>",
        _summary(results),
        "<p><small>Below each figure the paired difference to the baseline and its 95 % interval, in points. Controls "
        "of a method are grey.</small></p>",
    ]
    if len(results["methods"]) > 1:
        parts += ["<h2>Differences to the baseline</h2>", _intervals(results)]
    if task is not None:
        parts += ["<h2>Hallucination against recall</h2>", _scatter(results["methods"])]
        parts += ["<h2>Objects invented, by category</h2>", _categories(methods, task, answers)]
        parts += _gallery(methods, task, answers)
    title = _text(f"vlmfix: {results['model']}")
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head><body>'
        + "\n".join(parts)
        + "</body></html>\n"
    )


def _heading(metric: Metric) -> str:
    return metric.heading if metric.benchmark == "chair" else f"{metric.benchmark.upper()} {metric.heading}"


def _colour(results_or_methods: Sequence[Any], label: str) -> str:
    """A method's colour, the same in every plot; the baseline has that of text."""
    labels = [row["label"] if isinstance(row, Mapping) else row.label for row in results_or_methods]
    place = labels.index(label)
    return "currentColor" if place == 0 else COLOURS[(place - 1) % len(COLOURS)]


def _text(value: object) -> str:
    return html.escape(str(value))


def _figure(row: Mapping[str, Any], metric: Metric) -> float | None:
    part = row.get(metric.benchmark)
    if part is None:
        return None
    summary = part["summary"] if "summary" in part else part["all"]["summary"]
    value: float | None = summary.get(metric.name)
    return value


def _shown(results: Mapping[str, Any]) -> list[Metric]:
    return [metric for metric in METRICS if any(_figure(row, metric) is not None for row in results["methods"])]


def _summary(results: Mapping[str, Any]) -> str:
    shown = _shown(results)
    head = "".join(f"<th>{_text(_heading(metric))}</th>" for metric in shown)
    body = []
    for row in results["methods"]:
        cells = "".join(f"<td>{_cell(row, metric)}</td>" for metric in shown)
        body.append(f'<tr class="{_text(row["role"])}"><td>{_text(row["label"])}</td>{cells}</tr>')
    return f"<table><thead><tr><th>method</th>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"


def _cell(row: Mapping[str, Any], metric: Metric) -> str:
    value = number(_figure(row, metric), percent=metric.percent)
    interval = row.get("differences", {}).get(metric.key)
    if interval is None:
        return value
    bounds = ", ".join(signed(interval[end], percent=metric.percent) for end in ("low", "high"))
    return f"{value}<br><small>{signed(interval['estimate'], percent=metric.percent)} [{bounds}]</small>"


def _intervals(results: Mapping[str, Any]) -> str:
    """A plot of intervals, one panel per metric that is a share."""
    shown = [metric for metric in _shown(results) if metric.percent and metric.better]
    rows = [row for row in results["methods"] if row.get("differences")]
    left, width, step, gap = 150, 250, 22, 30
    panels = []
    for number_, metric in enumerate(shown):
        known = [(row, row["differences"].get(metric.key)) for row in rows]
        values = [100 * d[end] for _, d in known if d for end in ("low", "high", "estimate") if d[end] is not None]
        reach = max((abs(value) for value in values), default=1.0) or 1.0
        x0, y0 = (number_ % 3) * (width + gap) + left, (number_ // 3) * (step * len(rows) + 60) + 40
        middle = x0 + width / 2

        def at(value: float, middle: float = middle, reach: float = reach) -> float:
            return middle + 0.46 * width * 100 * value / reach

        better = "left" if metric.better < 0 else "right"
        panels.append(f'<text x="{x0}" y="{y0 - 16}"><tspan font-weight="600">{_text(_heading(metric))}</tspan>')
        panels.append(f" (better: {better}; ±{reach:.1f} points)</text>")
        panels.append(_line(middle, y0 - 8, middle, y0 + step * len(rows) - 8, "currentColor", 0.4))
        for place, (row, interval) in enumerate(known):
            y = y0 + step * place
            if number_ % 3 == 0:
                panels.append(f'<text x="{left - 10}" y="{y + 4}" text-anchor="end">{_text(row["label"])}</text>')
            if interval is None or interval["low"] is None:
                continue
            colour = _colour(results["methods"], row["label"])
            panels.append(_line(at(interval["low"]), y, at(interval["high"]), y, colour, 1.0, 3))
            panels.append(f'<circle cx="{at(interval["estimate"]):.1f}" cy="{y}" r="4.5" fill="{colour}"/>')
    height = ((len(shown) + 2) // 3) * (step * len(rows) + 60) + 20
    return _svg(left + 3 * (width + gap), height, panels)


def _scatter(rows: Sequence[Mapping[str, Any]]) -> str:
    """CHAIR_i against recall: a method is worth something if it goes down without going left."""
    points = [(row["chair"]["summary"]["recall"], row["chair"]["summary"]["chair_i"], row) for row in rows]
    points = [(x, y, row) for x, y, row in points if x is not None and y is not None]
    if not points:
        return "<p>No figures.</p>"
    width, height, margin = 760, 380, 60
    xs, ys = [100 * x for x, _, _ in points], [100 * y for _, y, _ in points]
    (x_low, x_high), (y_low, y_high) = _range(xs), _range(ys)

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            margin + (x - x_low) / (x_high - x_low) * (width - 2 * margin),
            height - margin - (y - y_low) / (y_high - y_low) * (height - 2 * margin),
        )

    marks = [
        _line(margin, height - margin, width - margin, height - margin, "currentColor", 0.4),
        _line(margin, margin, margin, height - margin, "currentColor", 0.4),
        f'<text x="{width / 2}" y="{height - 12}" text-anchor="middle">recall of objects, % (better: right)</text>',
        f'<text transform="translate(16 {height / 2}) rotate(-90)" text-anchor="middle">CHAIR_i, % (better: down)'
        "</text>",
    ]
    for value in (x_low, x_high):
        marks.append(
            f'<text x="{place(value, y_low)[0]:.1f}" y="{height - margin + 18}" text-anchor="middle">{value:.1f}</text>'
        )
    for value in (y_low, y_high):
        marks.append(
            f'<text x="{margin - 8}" y="{place(x_low, value)[1] + 4:.1f}" text-anchor="end">{value:.1f}</text>'
        )
    taken: list[tuple[float, float]] = []
    for x, y, row in points:
        cx, cy = place(100 * x, 100 * y)
        colour = _colour(rows, row["label"])
        shape = 'fill="none" stroke-width="2"' if row["role"] == "control" else f'fill="{colour}"'
        marks.append(f'<circle cx="{cx:.1f}" cy="{cy:.1f}" r="6" stroke="{colour}" {shape}/>')
        ty = cy + 4
        while any(abs(ty - other) < 13 and abs(cx - near) < 90 for near, other in taken):
            ty += 13
        taken.append((cx, ty))
        anchor, tx = ("end", cx - 10) if cx > width - 2 * margin else ("start", cx + 10)
        marks.append(f'<text x="{tx:.1f}" y="{ty:.1f}" text-anchor="{anchor}">{_text(row["label"])}</text>')
    return _svg(width, height, marks)


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    margin = max(0.12 * (high - low), 0.5)
    return low - margin, high + margin


def _categories(methods: Sequence[MethodSpec], task: ChairTask, answers: Mapping[str, Answers]) -> str:
    """How many captions invent an object, per category, for the baseline and every method."""
    rows = [spec for spec in methods if spec.role != "control"]
    counts = {
        spec.label: Counter(
            name for sample in task.samples for name in _invented(task, sample, _caption(sample, answers[spec.label]))
        )
        for spec in rows
    }
    total: Counter[str] = sum(counts.values(), Counter())
    names = [name for name, _ in total.most_common(CATEGORIES)]
    if not names:
        return "<p>No caption names an object that is not there.</p>"
    bar, group, left = 12, 12 * len(rows) + 12, 120
    top = max(counts[spec.label][name] for spec in rows for name in names)
    marks = []
    for number_, name in enumerate(names):
        y = number_ * group + 6
        marks.append(f'<text x="{left - 8}" y="{y + bar * len(rows) / 2 + 4}" text-anchor="end">{_text(name)}</text>')
        for place, spec in enumerate(rows):
            count = counts[spec.label][name]
            colour = _colour(methods, spec.label)
            length, at = 600 * count / top, y + place * bar
            marks.append(
                f'<rect x="{left}" y="{at}" width="{length:.1f}" height="{bar - 2}" fill="{colour}" opacity=".8"/>'
                f'<text x="{left + length + 5:.1f}" y="{at + 9}" style="font-size:10px">{count}</text>'
            )
    legend = " · ".join(
        f'<span style="color:{_colour(methods, spec.label)}">■</span> {_text(spec.label)}' for spec in rows
    )
    return f"<p>{legend}</p>" + _svg(800, len(names) * group + 10, marks)


def _invented(task: ChairTask, sample: Sample, caption: str) -> list[str]:
    """The objects a caption names that are not there, sorted."""
    return sorted(set(task.matcher.match(caption).nodes) - set(task.truth[sample.image_id]))


def _caption(sample: Sample, answers: Answers) -> str:
    return answers[sample.benchmark, sample.image_id, sample.question].text


def _gallery(methods: Sequence[MethodSpec], task: ChairTask, answers: Mapping[str, Answers]) -> Iterator[str]:
    """The captions whose invented objects changed most, each beside the baseline's."""
    baseline = answers[methods[0].label]
    for spec in methods[1:]:
        if spec.role == "control":
            continue
        changes = []
        for sample in task.samples:
            before, after = (_caption(sample, each) for each in (baseline, answers[spec.label]))
            if before != after:
                gap = len(_invented(task, sample, after)) - len(_invented(task, sample, before))
                changes.append((-abs(gap), sample.image_id, sample, before, after))
        yield f"<h2>Captions that {_text(spec.label)} changed most</h2>"
        yield f"<p>{len(changes)} of {len(task.samples)} captions changed. "
        yield "<mark>Invented</mark> and <mark class=real>present</mark> objects are marked.</p>"
        for _, _, sample, before, after in sorted(changes, key=lambda change: change[:2])[:GALLERY]:
            yield (
                f'<div class="pair"><div><img alt="image {sample.image_id}" src="{_thumbnail(sample)}">'
                f"<small>{sample.image_id}</small></div><div><small>{_text(methods[0].label)}</small>"
                f"<p>{_marked(task, sample, before)}</p><small>{_text(spec.label)}</small>"
                f"<p>{_marked(task, sample, after)}</p></div></div>"
            )


def _marked(task: ChairTask, sample: Sample, caption: str) -> str:
    """A caption with its objects marked, as far as their place in it is known, and those it invents."""
    truth = task.truth[sample.image_id]
    parts, start = [], 0
    for word, node in task.matcher.as_written(caption):
        found = re.search(rf"\b{re.escape(word)}\b", caption[start:], re.IGNORECASE)
        if found is None:
            continue
        kind = ' class="real"' if node in truth else ""
        parts.append(_text(caption[start : start + found.start()]))
        parts.append(f'<mark{kind} title="{_text(node)}">{_text(found[0])}</mark>')
        start += found.end()
    parts.append(_text(caption[start:]))
    invented = _invented(task, sample, caption)
    tail = f"<br><small>invented: {_text(', '.join(invented))}</small>" if invented else ""
    return "".join(parts) + tail


def _thumbnail(sample: Sample) -> str:
    assert sample.path is not None
    image = load_image(sample.path)
    image.thumbnail((440, 440))
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _line(x1: float, y1: float, x2: float, y2: float, colour: str, opacity: float, width: float = 1) -> str:
    return (
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" stroke-width="{width}" '
        f'stroke-opacity="{opacity}"/>'
    )


def _svg(width: float, height: float, marks: Iterable[str]) -> str:
    return f'<svg viewBox="0 0 {width} {height}" width="{width}" role="img">{"".join(marks)}</svg>'
