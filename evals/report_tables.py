"""The main table of a run and the table of its controls, as rows of cells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from .columns import BY_KEY, Metric, changed_methods, figure, seconds, used_metrics
from .tables import difference_cell, fitting_table, interval_cell, markdown_table, number, plain_table
from .verdicts import verdict

Rows = list[list[str]]

VERDICTS = {
    "better": "beats its control",
    "same": "not told apart",
    "worse": "worse than control",
    "unchanged": "no answer changed",
}
"""What a line of the controls' table says."""

CONTROLS_EXPLAINED = (
    "*early stop*: `none`'s own captions, ended as soon as the end token comes within a fixed margin, chosen so that "
    "recall is the method's. *yes bias*: a constant added to `none`'s yes-minus-no logit, chosen so that the share of "
    "yes is the method's. *every head* and *other heads*: the same factor on all heads, and on those the method leaves "
    "alone. A method that does not beat its control only moves along the trade-off."
)


def main_table(results: Mapping[str, Any], width: int) -> str:
    """Figures, paired differences and verdicts; one table per benchmark where all together are wider than ``width``.

    Args:
        results: The content of ``results.json``; rows are compared with ``results["reference"]``, by default ``none``.
        width: Columns of the terminal.
    """
    metrics = used_metrics(results)
    whole = fitting_table(main_rows(results, metrics), width)
    if _width(whole) <= width:
        return whole
    groups = [list(group) for _, group in groupby(metrics, key=lambda metric: metric.benchmark)]
    last = len(groups) - 1
    tables = [main_rows(results, group, closing=i == last) for i, group in enumerate(groups)]
    return "\n\n".join(fitting_table(rows, width) for rows in tables)


def _width(table: str) -> int:
    return max(map(len, table.split("\n")))


def main_rows(results: Mapping[str, Any], metrics: Sequence[Metric], *, closing: bool = True) -> Rows:
    """Two headings, then up to three rows per method: figures, differences, intervals.

    Args:
        results: The content of ``results.json``.
        metrics: Columns.
        closing: Whether seconds and the verdict follow the figures.
    """
    reference = results.get("reference", "none")
    timed = closing and _timed(results)
    words = {method["label"]: verdict(results, method) for method in results["methods"]} if closing else {}
    judged = any(words.values())
    more = [*(["seconds"] if timed else []), *(["verdict"] if judged else [])]
    rows = [["", *(_group(metrics, i) for i in range(len(metrics))), *[""] * len(more)]]
    rows.append(["method", *(metric.heading for metric in metrics), *more])
    changed = set(changed_methods(results))
    for method in results["methods"]:
        closing_cells = [number(seconds(method), percent=False)] if timed else []
        closing_cells += [words[method["label"]]] if judged else []
        rows.append([method["label"], *(value_cell(method, m) for m in metrics), *closing_cells])
        if "differences" not in method:
            continue
        if method["label"] not in changed:
            rows.append([f"  = {reference}", *[""] * (len(metrics) + len(more))])
            continue
        found = [(method["differences"].get(metric.key), metric) for metric in metrics]
        blank = [""] * len(more)
        rows.append([f"  - {reference}", *(difference_cell(d, percent=m.percent) for d, m in found), *blank])
        rows.append(["  95 %", *(interval_cell(d, percent=m.percent) for d, m in found), *blank])
    return rows


def markdown_main(results: Mapping[str, Any]) -> str:
    """The main table as Markdown, one row per method with its intervals in the cells."""
    metrics = used_metrics(results)
    timed = _timed(results)
    words = {method["label"]: verdict(results, method) for method in results["methods"]}
    judged = any(words.values())
    more = [*(["seconds"] if timed else []), *(["verdict"] if judged else [])]
    rows = [["method", *map(long_heading, metrics), *more]]
    for method in results["methods"]:
        cells = []
        for metric in metrics:
            cell = value_cell(method, metric)
            found = method.get("differences", {}).get(metric.key)
            if found is not None:
                interval = interval_cell(found, percent=metric.percent).replace(",", ", ")
                cell += f"<br>{difference_cell(found, percent=metric.percent)} [{interval}]"
            cells.append(cell)
        cells += [number(seconds(method), percent=False)] if timed else []
        rows.append([_markdown_name(method), *cells, *([words[method["label"]]] if judged else [])])
    return markdown_table(rows)


def long_heading(metric: Metric) -> str:
    """A heading that names its benchmark: ``CHAIR i ↓``."""
    title = metric.title.removeprefix("CHAIR_")
    return f"{metric.benchmark.upper()} {title}{metric.heading.removeprefix(metric.title)}"


def _markdown_name(method: Mapping[str, Any]) -> str:
    name = f"`{method['describe']}`"
    if "run" in method and method["describe"] != method["label"]:
        name = f"`{method['label']}` {method['describe']}"
    return f"control {name}" if method["role"] == "control" else name


def _timed(results: Mapping[str, Any]) -> bool:
    return any(seconds(method) > 0 for method in results["methods"])


def controls_text(results: Mapping[str, Any]) -> str:
    """The controls' table for a terminal: words to the left, figures to the right."""
    rows = control_rows(results)
    left = 3  # The first columns are words.
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            c.ljust(w) if i < left or i == len(row) - 1 else c.rjust(w)
            for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def control_rows(results: Mapping[str, Any]) -> Rows:
    """Every method against every control of it, the headings first."""
    rows = [["method", "control", "matched", "metric", "method", "control", "difference", "95 %", "verdict"]]
    for control in results["controls"]:
        metric = BY_KEY[control["metric"]]
        difference = control.get("difference")
        rows.append(
            [
                control["method"],
                control["control"],
                control.get("matched", ""),
                metric.heading if metric.benchmark in ("chair", "pope") else long_heading(metric),
                number(control.get("method_value"), percent=metric.percent),
                number(control.get("control_value"), percent=metric.percent),
                difference_cell(difference, percent=metric.percent),
                interval_cell(difference, percent=metric.percent),
                VERDICTS[control.get("verdict_holm", control["verdict"])],
            ]
        )
    return rows


def pareto_text(rows: Rows) -> str:
    """The table of :func:`vlmfix.evals.pareto.pareto_rows` for a terminal, the names to the left."""
    names = max(len(row[1]) for row in rows)
    who = max(len(row[-1]) for row in rows)
    return plain_table([[f"{row[0]:<6}{row[1]:<{names}}", *row[2:-1], f"{row[-1]:<{who}}"] for row in rows])


def _group(metrics: Sequence[Metric], index: int) -> str:
    """The benchmark's name above its first column."""
    first = index == 0 or metrics[index].benchmark != metrics[index - 1].benchmark
    return metrics[index].benchmark.upper() if first else ""


def value_cell(method: Mapping[str, Any], metric: Metric) -> str:
    """A row's figure."""
    return number(figure(method, metric), percent=metric.percent)
