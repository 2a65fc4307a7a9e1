"""Score a file of answers to any benchmark that reads files: its table, its figures, and a baseline beside them."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlmfix.errors import DataError, VlmfixError

from ..benchmarks.base import Benchmark
from ..benchmarks.registry import benchmark_class, benchmark_names
from ..data.samples import Answers
from ..stats.intervals import CONFIDENCE, finite
from ..stats.table import summary
from ..tables import difference_cell, interval_cell, number, plain_table
from .chair import write_result


def add_declared(kinds: Any) -> None:
    """Add every benchmark that reads files and has no parser yet, under its name and with its own arguments."""
    for name in benchmark_names():
        if name in kinds.choices:
            continue
        try:
            kind = benchmark_class(name)
        except VlmfixError as error:  # Another package's fault is told to those who want its benchmark.
            broken = kinds.add_parser(name, help=f"not available: {error}", add_help=False, prefix_chars="\0")
            broken.add_argument("words", nargs="*")
            broken.set_defaults(score=_refuse(error))
            continue
        if kind.reads_files():
            parser = kinds.add_parser(name, allow_abbrev=False, help=kind.summary)
            parser.add_argument("file", type=Path, metavar="FILE", help="answers, whoever generated them")
            kind.add_score_arguments(parser)
            parser.add_argument(
                "--baseline", type=Path, metavar="FILE", help="answers to the same questions, to compare with (paired)"
            )
            parser.add_argument(
                "--out", type=Path, metavar="FILE", help="also write the figures and integer counts as JSON"
            )
            parser.set_defaults(score=score_declared, benchmark=name)


def _refuse(error: VlmfixError) -> Any:
    def score(options: argparse.Namespace) -> str:
        raise error

    return score


def score_declared(options: argparse.Namespace) -> str:
    """Score as typed.

    Returns:
        What was scored and how, the table of figures, and the integer counts.

    Raises:
        VlmfixError: A file cannot be read or scored, or the two files do not answer the same questions.
    """
    kind = benchmark_class(options.benchmark)
    task, table, result = _scored(kind, options.file, options)
    shown = [figure for figure in kind.figures if figure.name in result["summary"]]
    rows = [["", *(figure.heading for figure in shown)], ["", *_cells(shown, result)]]
    if options.baseline is not None:
        _, other, baseline = _scored(kind, options.baseline, options)
        if table.keys != other.keys:
            raise DataError(f"{options.baseline} and {options.file} do not answer the same questions")
        found = kind.differences(table, other, seed=0)
        result["baseline"] = {"file": str(options.baseline), **baseline, "differences": found, "confidence": CONFIDENCE}
        rows.append(["baseline", *_cells(shown, baseline)])
        for title, cell in (("difference", difference_cell), ("95 %", interval_cell)):
            rows.append([title, *(cell(found.get(figure.key), percent=figure.percent) for figure in shown)])
    write_result(options.out, options.file, {"benchmark": kind.name, **result})
    counts = ", ".join(f"{name} {count}" for name, count in result["counts"].items() if isinstance(count, int))
    return "\n".join([f"{task.about()}, {options.file}", plain_table(rows), counts])


def _scored(kind: type[Benchmark], path: Path, options: argparse.Namespace) -> tuple[Benchmark, Any, dict[str, Any]]:
    task: Benchmark
    answers: Answers
    task, answers = kind.from_files(path, options)
    table = task.score(answers)
    if table is None:
        raise DataError(f"{path} cannot be scored: {task.about()}")
    result = {"counts": task.counts(table), "summary": finite(summary(table, kind.figures))}
    if parts := task.breakdown(table):
        result["breakdown"] = {name: finite(figures) for name, figures in parts.items()}
    return task, table, result


def _cells(shown: Any, result: Mapping[str, Any]) -> list[str]:
    return [number(result["summary"].get(figure.name), percent=figure.percent) for figure in shown]
