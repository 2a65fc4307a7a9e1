"""The summary of a run: a row per method with its figures, their differences and a verdict."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from ..benchmarks.columns import Metric, changed_methods, figure, seconds, used_metrics
from ..scores.verdicts import verdict, verdict_legend
from ..tables import Table, difference_cell, interval_cell, number, p_cell


@dataclass(frozen=True)
class Cell:
    """A figure of a row, as text; what is empty does not apply.

    Attributes:
        value: The figure.
        difference: To the baseline, with its star.
        interval: The two ends of the difference's interval, without brackets.
        test: The difference's p-values in words.
    """

    value: str
    difference: str = ""
    interval: str = ""
    test: str = ""


@dataclass(frozen=True)
class Row:
    """A method in the summary.

    Attributes:
        label: Its name.
        describe: Its name with its parameters.
        role: ``"baseline"``, ``"method"`` or ``"control"``.
        cells: Its figures.
        seconds: Time of its answers.
        verdict: See ``scores.verdicts``; empty where there is none.
        is_compared: Whether it is compared with another row.
        is_changed: Whether it changed an answer.
        run: Name of the run it comes from; empty where all come from the same.
    """

    label: str
    describe: str
    role: str
    cells: tuple[Cell, ...]
    seconds: str
    verdict: str
    is_compared: bool
    is_changed: bool
    run: str = ""


@dataclass(frozen=True)
class Summary:
    """The summary's columns and rows.

    Attributes:
        columns: The figures.
        rows: The baseline first.
        reference: The row that the others are compared with.
        is_timed: Whether there are seconds.
        is_judged: Whether there are verdicts.
    """

    columns: tuple[Metric, ...]
    rows: tuple[Row, ...]
    reference: str
    is_timed: bool
    is_judged: bool

    @property
    def groups(self) -> list[tuple[str, int]]:
        """Title of each benchmark, with its number of columns."""
        return _groups(self.columns)

    @property
    def closing(self) -> list[str]:
        """Headings of what follows the figures."""
        return ["seconds"] * self.is_timed + ["verdict"] * self.is_judged


def summarise(results: Mapping[str, Any], columns: Sequence[Metric] | None = None) -> Summary:
    """Collect the summary of a run.

    Args:
        results: The content of ``results.json``; rows are compared with ``results["reference"]``, by default ``none``.
        columns: The figures; by default all that the run has.
    """
    shown = tuple(used_metrics(results) if columns is None else columns)
    changed = set(changed_methods(results))
    rows = tuple(
        Row(
            label=method["label"],
            describe=method["describe"],
            role=method["role"],
            cells=tuple(_cell(method, metric) for metric in shown),
            seconds=number(seconds(method), percent=False),
            verdict=verdict(results, method),
            is_compared="differences" in method,
            is_changed=method["label"] in changed,
            run=method.get("run", ""),
        )
        for method in results["methods"]
    )
    timed = any(seconds(method) > 0 for method in results["methods"])
    return Summary(shown, rows, results.get("reference", "none"), timed, any(row.verdict for row in rows))


def _cell(method: Mapping[str, Any], metric: Metric) -> Cell:
    value = number(figure(method, metric), percent=metric.percent)
    found = method.get("differences", {}).get(metric.key)
    if found is None:
        return Cell(value)
    return Cell(
        value,
        difference_cell(found, percent=metric.percent),
        interval_cell(found, percent=metric.percent),
        f"p = {p_cell(found.get('p_value'))}, corrected {p_cell(found.get('p_holm'))}",
    )


def _groups(columns: Sequence[Metric]) -> list[tuple[str, int]]:
    return [(name.upper(), len(list(own))) for name, own in groupby(metric.benchmark for metric in columns)]


def main_table(summary: Summary, width: int) -> str:
    """The summary for a terminal, up to three lines per row: figures, differences, intervals.

    One table per benchmark where all together are wider than ``width``; seconds and verdicts stand in the last.
    """
    whole = _plain(summary, 0, len(summary.columns), width, closing=True)
    if max(map(len, whole.split("\n"))) <= width:
        return whole
    tables, first = [], 0
    for _, size in summary.groups:
        last = first + size == len(summary.columns)
        tables.append(_plain(summary, first, first + size, width, closing=last))
        first += size
    return "\n\n".join(tables)


def _plain(summary: Summary, first: int, last: int, width: int, *, closing: bool) -> str:
    columns = summary.columns[first:last]
    more = summary.closing if closing else []
    rows = [["method", *(metric.heading for metric in columns), *more]]
    for row in summary.rows:
        cells, blank = row.cells[first:last], [""] * len(more)
        rows.append([row.label, *(cell.value for cell in cells), *(_closing(summary, row) if closing else [])])
        if row.is_compared and not row.is_changed:
            rows.append([f"  = {summary.reference}", *[""] * len(cells), *blank])
        elif row.is_compared:
            rows.append([f"  - {summary.reference}", *(cell.difference for cell in cells), *blank])
            rows.append(["  95 %", *(cell.interval for cell in cells), *blank])
    return Table(rows, groups=(("", 1), *_groups(columns), *[("", 1)] * len(more))).plain(width)


def _closing(summary: Summary, row: Row) -> list[str]:
    return [row.seconds] * summary.is_timed + [row.verdict] * summary.is_judged


def markdown_main(summary: Summary) -> str:
    """The summary as Markdown, one row per method with its intervals in the cells."""
    rows = [["method", *(metric.full_heading for metric in summary.columns), *summary.closing]]
    for row in summary.rows:
        cells = [
            f"{cell.value}<br>{cell.difference} [{cell.interval.replace(',', ', ')}]" if cell.interval else cell.value
            for cell in row.cells
        ]
        rows.append([_markdown_name(row), *cells, *_closing(summary, row)])
    return Table(rows).markdown()


def _markdown_name(row: Row) -> str:
    name = f"`{row.describe}`"
    if row.run and row.describe != row.label:
        name = f"`{row.label}` {row.describe}"
    return f"control {name}" if row.role == "control" else name


def legend(results: Mapping[str, Any], *, in_cells: bool = False) -> Iterator[str]:
    """How to read the summary, and what the short method names stand for.

    Args:
        results: The content of ``results.json``.
        in_cells: Whether differences stand in the cells of the figures, not in lines of their own.
    """
    resamples, reference = results["intervals"]["resamples"], results.get("reference", "none")
    compared = results.get("corrections", {}).get("rows", 0)
    demoted = f"; (*): not after Holm's correction for {compared} rows" if compared > 1 else ""
    where = f"Below each figure: the paired difference to {reference} in points, and its 95 % interval"
    where = where if in_cells else f"- {reference}: paired difference in points; 95 %: its interval"
    yield f"{where} over {resamples} resamples of the images"
    yield f"*: the interval excludes 0{demoted}; = {reference}: no answer changed"
    if words := verdict_legend(verdict(results, method) for method in results["methods"]):
        yield f"verdict: {words}"
    named = [f"{m['label']} is {m['describe']}" for m in results["methods"] if m["describe"] != m["label"]]
    if named:
        yield "; ".join(named)
