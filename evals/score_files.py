"""The ``vlmfix score`` verb: answers in files, whoever generated them, scored as those of a run; no model is loaded."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmfix.errors import DataError, VlmfixError

from .flags import verb_parser

if TYPE_CHECKING:
    from .benchmarks.base import Benchmark, ScoredFile

SEED = 0
"""Of the bootstrap."""

_ABOUT = """\
Score captions or answers in a file, whoever generated them, without a model. Each benchmark has its own --help.

  vlmfix score chair --captions captions.jsonl --ground-truth COCO_DIR --mode nltk
  vlmfix score pope --answers answers.jsonl --questions coco_pope_*.json
  vlmfix score amber responses.jsonl --data AMBER_DIR
"""

_EPILOG = """\
FILE may be JSON lines, a JSON list, CSV, TSV, xlsx, parquet or arrow, also packed (gz, bz2, xz), and what the APIs and
evaluation tools write. The model's text is found by its key and held against the truth and the question beside it.
"""


def add_score(verbs: Any) -> argparse.ArgumentParser:
    """Add the verb to a command line's subparsers, with every benchmark that reads files."""
    from .benchmarks.registry import names_of_files

    parser = verb_parser(verbs, "score", _ABOUT, "BENCHMARK FILE [OPTIONS]")
    kinds = parser.add_subparsers(title="benchmarks", metavar="BENCHMARK", required=True, parser_class=_BenchmarkParser)
    for name, summary in names_of_files().items():
        own = kinds.add_parser(
            name, prog=f"vlmfix score {name}", allow_abbrev=False, epilog=_EPILOG, help=summary.replace("%", "%%")
        )
        own.name = name
    return parser


class _BenchmarkParser(argparse.ArgumentParser):
    """The parser of one benchmark, whose module is imported when somebody wants to know its arguments."""

    name = ""

    @property
    def _actions(self) -> list[argparse.Action]:  # type: ignore[override]
        self._fill()
        return self._own

    @_actions.setter
    def _actions(self, actions: list[argparse.Action]) -> None:
        self._own = actions

    def _fill(self) -> None:
        from .benchmarks.registry import benchmark_class

        name, self.name = self.name, ""
        if name:
            _add_benchmark(self, benchmark_class(name))

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse as any parser does."""
        try:
            self._fill()
        except VlmfixError as error:  # Another package's fault, told as any error of a run.
            return argparse.Namespace(score=_refuse(error)), []
        return super().parse_known_args(args, namespace)


def _refuse(error: VlmfixError) -> Callable[[argparse.Namespace], str]:
    def refuse(options: argparse.Namespace) -> str:
        raise error

    return refuse


def _add_benchmark(parser: argparse.ArgumentParser, kind: type[Benchmark]) -> None:
    flag = kind.file_flag
    parser.description = kind.summary
    parser.add_argument("file", type=Path, nargs="?", metavar="FILE", help="answers, whoever generated them")
    if flag:
        parser.add_argument(flag, dest="named_file", type=Path, metavar="FILE", help="the same")
    kind.add_score_arguments(parser)
    parser.add_argument("--text-key", metavar="KEY", help="key of the model's text, if nothing else tells it")
    parser.add_argument(
        "--thinking",
        choices=("strip", "keep"),
        default="strip",
        help="what is done with thinking (<think>...</think>) before an answer (default: strip)",
    )
    parser.add_argument(
        "--subset", action="store_true", help="score what is answered, such as the files of a run with --limit"
    )
    parser.add_argument(
        "--baseline", type=Path, metavar="FILE", help="answers to the same questions, to compare with (paired)"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the figures and integer counts as JSON")
    parser.set_defaults(score=score, benchmark=kind.name, file_flag=flag)


def run(options: argparse.Namespace, *, show: Callable[[str], None]) -> None:
    """Score the file as asked and show the table."""
    show(options.score(options))


def score(options: argparse.Namespace) -> str:
    """Score as typed.

    Returns:
        What was scored and how, what the reader must know about it, and the table of figures.

    Raises:
        VlmfixError: A file cannot be read or scored, or the two files do not answer the same questions.
    """
    from .benchmarks.registry import benchmark_class
    from .data.write import SCHEMA_VERSION, check_not_read, write_json

    if options.out is not None:
        check_not_read(options.out, vars(options))
    kind = benchmark_class(options.benchmark)
    own = _scored(kind, _file(options), options)
    other = None if options.baseline is None else _scored(kind, options.baseline, options)
    result, text = own.task.report_file(own, other, SEED) or _declared(kind, own)
    if other is not None and result is not None and "baseline" not in result:
        result["baseline"], table = _compared(kind, own, other)
        text += "\n" + table
    if options.out is not None and result is not None:
        head = {"schema_version": SCHEMA_VERSION, "file": str(own.path), "benchmark": kind.name}
        write_json(options.out, {**head, **own.facts, **result})
    first, *rest = text.split("\n")
    notes = own.notes + ([] if other is None else [f"{other.path}: {note}" for note in other.notes])
    return "\n".join([first, *notes, *rest])


def _file(options: argparse.Namespace) -> Path:
    given = [path for path in (options.file, getattr(options, "named_file", None)) if path is not None]
    if len(given) != 1:
        raise VlmfixError(
            f"expected one file to score, found {len(given)}; type {options.file_flag} FILE".replace("  ", " ")
        )
    path: Path = given[0]
    return path


def _scored(kind: type[Benchmark], path: Path, options: argparse.Namespace) -> ScoredFile:
    from .benchmarks.base import ScoredFile

    try:
        task, answers = kind.from_files(path, options)
        return ScoredFile(path, task, answers, task.score(answers))
    except DataError as error:  # Of two files, the reader must know which one is meant.
        if str(path) in str(error):
            raise
        raise DataError(f"{path}: {error}") from error


def _declared(kind: type[Benchmark], own: ScoredFile) -> tuple[dict[str, Any], str]:
    """The figures that a benchmark declares, and its counts."""
    from .stats.bootstrap import finite
    from .tables import plain_table

    if own.table is None:
        raise DataError(f"{own.path} cannot be scored: {own.task.about()}")
    result: dict[str, Any] = {"counts": own.task.counts(own.table), "summary": _summary(kind, own)}
    if parts := own.task.breakdown(own.table):
        result["breakdown"] = {name: finite(figures) for name, figures in parts.items()}
    shown = [figure for figure in kind.figures if figure.name in result["summary"]]
    table = plain_table([["", *(figure.heading for figure in shown)], ["", *_cells(shown, result["summary"])]])
    counts = ", ".join(f"{name} {count}" for name, count in result["counts"].items() if isinstance(count, int))
    return result, f"{own.task.about()}, {own.path}\n{table}\n{counts}"


def _compared(kind: type[Benchmark], own: ScoredFile, other: ScoredFile) -> tuple[dict[str, Any], str]:
    """A baseline's figures and the differences to it, by the figures that a benchmark declares."""
    from .stats.bootstrap import CONFIDENCE
    from .tables import difference_cell, interval_cell, plain_table

    if own.table is None or other.table is None or own.table.keys != other.table.keys:
        raise DataError(f"{other.path} and {own.path} do not answer the same questions")
    found = kind.differences(own.table, other.table, SEED)
    summary, ours = _summary(kind, other), _summary(kind, own)
    shown = [figure for figure in kind.figures if figure.name in ours]
    rows = [["", *(figure.heading for figure in shown)], ["file", *_cells(shown, ours)]]
    rows.append(["baseline", *_cells(shown, summary)])
    for title, cell in (("difference", difference_cell), ("95 %", interval_cell)):
        rows.append([title, *(cell(found.get(figure.key), percent=figure.percent) for figure in shown)])
    part = {"file": str(other.path), **other.facts, "counts": other.task.counts(other.table), "summary": summary}
    return {**part, "differences": found, "confidence": CONFIDENCE}, plain_table(rows)


def _summary(kind: type[Benchmark], scored: ScoredFile) -> dict[str, Any]:
    from .stats.bootstrap import finite
    from .stats.table import summary

    return finite(summary(scored.table, kind.figures))


def _cells(shown: Sequence[Any], summary: Mapping[str, Any]) -> list[str]:
    from .tables import number

    return [number(summary.get(figure.name), percent=figure.percent) for figure in shown]
