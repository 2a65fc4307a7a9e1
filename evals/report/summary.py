"""The summary of a run: a row per method with its figures, their differences and a verdict."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, groupby
from typing import Any, NamedTuple

from ..benchmarks.columns import changed_methods, seconds, used_figures, value_in
from ..scores.verdicts import verdict, verdict_legend
from ..stats.figures import Figure
from ..tables import Table, difference_cell, interval_cell, number, p_cell


class Cell(NamedTuple):
    """A figure of a row as text: its value, the difference to the baseline, and its interval and p-values; or empty."""

    value: str
    difference: str = ""
    interval: str = ""
    test: str = ""


@dataclass(frozen=True)
class Row:
    """A method in the summary.

    Attributes:
        method: Its row of ``results.json``.
        cells: Its figures.
        seconds: Time of its answers.
        verdict: See ``scores.verdicts``; empty where there is none.
        is_changed: Whether it changed an answer; None for a row that is not compared with another one.
    """

    method: Mapping[str, Any]
    cells: tuple[Cell, ...]
    seconds: str
    verdict: str
    is_changed: bool | None


@dataclass(frozen=True)
class Summary:
    """The summary's columns, and its rows, the baseline first.

    Attributes:
        columns: The figures.
        rows: The methods.
        reference: Label of the row that the others are compared with.
        closing: Headings of what follows the figures: seconds and verdict, where there are any.
    """

    columns: tuple[Figure, ...]
    rows: tuple[Row, ...]
    reference: str
    closing: tuple[str, ...]

    @property
    def groups(self) -> list[tuple[str, int]]:
        """Title of each benchmark, with its number of columns."""
        by_benchmark = groupby(figure.benchmark for figure in self.columns)
        return [(name.upper(), len(list(own))) for name, own in by_benchmark]

    def last_cells(self, row: Row) -> list[str]:
        """What follows a row's figures."""
        cells = {"seconds": row.seconds, "verdict": row.verdict}
        return [cells[name] for name in self.closing]

    def parts(self, fits: Callable[[Summary], bool]) -> list[Summary]:
        """Summaries of whole benchmarks, as few as fit; seconds and verdict stand in the last."""
        ends = list(accumulate(size for _, size in self.groups))
        found: list[Summary] = []
        first = 0
        while first < len(self.columns):
            several = [self._part(first, end) for end in ends if end > first]
            found.append(next((part for part in reversed(several) if fits(part)), several[0]))
            first += len(found[-1].columns)
        return found

    def _part(self, first: int, last: int) -> Summary:
        rows = tuple(replace(row, cells=row.cells[first:last]) for row in self.rows)
        closing = self.closing if last == len(self.columns) else ()
        return Summary(self.columns[first:last], rows, self.reference, closing)


def summarise(results: Mapping[str, Any], columns: Sequence[Figure] | None = None) -> Summary:
    """Collect the summary of a run.

    Args:
        results: The content of ``results.json``; rows are compared with ``results["reference"]``, by default ``none``.
        columns: The figures; by default all that the run has.
    """
    shown = tuple(used_figures(results) if columns is None else columns)
    changed = set(changed_methods(results))
    rows = tuple(
        Row(
            method,
            tuple(_cell(method, figure) for figure in shown),
            number(seconds(method), percent=False),
            verdict(results, method),
            method["label"] in changed if "differences" in method else None,
        )
        for method in results["methods"]
    )
    closing = ["seconds"] * any(seconds(method) > 0 for method in results["methods"])
    closing += ["verdict"] * any(row.verdict for row in rows)
    return Summary(shown, rows, results.get("reference", "none"), tuple(closing))


def _cell(method: Mapping[str, Any], figure: Figure) -> Cell:
    value = number(value_in(method, figure), percent=figure.percent)
    found = method.get("differences", {}).get(figure.key)
    if found is None:
        return Cell(value)
    test = f"p = {p_cell(found.get('p_value'))}, corrected {p_cell(found.get('p_holm'))}"
    percent = figure.percent
    return Cell(value, difference_cell(found, percent=percent), interval_cell(found, percent=percent), test)


def main_table(summary: Summary, width: int) -> str:
    """The summary for a terminal, in several tables where all together are wider than ``width``."""

    def fits(part: Summary) -> bool:
        return max(map(len, _plain(part, width).split("\n"))) <= width

    return "\n\n".join(_plain(part, width) for part in summary.parts(fits))


def _plain(summary: Summary, width: int) -> str:
    """Up to three lines per row: figures, differences, intervals."""
    rows = [["method", *(figure.heading for figure in summary.columns), *summary.closing]]
    blank = [""] * len(summary.closing)
    for row in summary.rows:
        rows.append([row.method["label"], *(cell.value for cell in row.cells), *summary.last_cells(row)])
        if row.is_changed:
            rows.append([f"  - {summary.reference}", *(cell.difference for cell in row.cells), *blank])
            rows.append(["  95 %", *(cell.interval for cell in row.cells), *blank])
        elif row.is_changed is not None:
            rows.append([f"  = {summary.reference}", *[""] * len(row.cells), *blank])
    return Table(rows, groups=(("", 1), *summary.groups, *[("", 1)] * len(blank))).plain(width)


def markdown_main(summary: Summary) -> str:
    """The summary as Markdown, one row per method with its intervals in the cells."""
    rows = [["method", *(figure.full_heading for figure in summary.columns), *summary.closing]]
    for row in summary.rows:
        cells = [
            f"{cell.value}<br>{cell.difference} [{cell.interval.replace(',', ', ')}]" if cell.interval else cell.value
            for cell in row.cells
        ]
        rows.append([_markdown_name(row.method), *cells, *summary.last_cells(row)])
    return Table(rows).markdown()


def _markdown_name(method: Mapping[str, Any]) -> str:
    name = f"`{method['describe']}`"
    if "run" in method and method["describe"] != method["label"]:
        name = f"`{method['label']}` {method['describe']}"
    return f"control {name}" if method["role"] == "control" else name


def glossary(summary: Summary) -> Iterator[str]:
    """What the figures are, a line per benchmark."""
    for name, figures in groupby(summary.columns, key=lambda figure: figure.benchmark):
        explained = [f"{figure.title} ({figure.help})" for figure in figures if figure.help]
        if explained:
            yield f"{name.upper()}: {', '.join(explained)}"


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
