"""``vlmfix compare``: rows of several runs, paired on the images and questions that all of them share.

Everything comes from ``results.json`` and ``counts.json``: no data, no answers and no model are read. The result has
the form of ``results.json`` (``methods``, ``controls``, ...), so that the same tables show it.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from vlmfix.errors import DataError

from ..benchmarks.registry import benchmark_class, benchmark_names
from ..benchmarks.yes_no import MCC, paired_answers, question_rows
from ..flags import verb_parser
from ..scores.controls import (
    bias_curves,
    bias_lines,
    head_lines,
    resamples_for,
    stored_lines,
    stored_versions,
)
from ..scores.counts import RunCounts
from ..scores.verdicts import correct_controls, correct_rows, verdict
from ..stats.bootstrap import CONFIDENCE, RESAMPLES, finite
from ..stats.table import Table, summary
from .shared_rows import Shared, differing, obstacle, share

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Row:
    """One method of one run.

    Attributes:
        label: ``A:vhr``.
        run: Name of the run, ``A``.
        entry: Its entry in the run's ``results.json``.
        tables: Benchmark -> its table on the shared rows.
        controls: Benchmark -> name of a control that needs no method -> its table on the shared rows.
    """

    label: str
    run: str
    entry: Mapping[str, Any]
    tables: Mapping[str, Table]
    controls: Mapping[str, Mapping[str, Table]]

    @property
    def benchmarks(self) -> dict[str, Table]:
        """The tables of benchmarks, without those that stand beside them."""
        return {name: table for name, table in self.tables.items() if name in benchmark_names()}


def run_names(count: int) -> list[str]:
    """A, B, C, ...; behind Z go on with R27."""
    return [ascii_uppercase[i] if i < len(ascii_uppercase) else f"R{i + 1}" for i in range(count)]


def compare_runs(
    runs: Sequence[RunCounts],
    *,
    against: str | None = None,
    methods: Sequence[str] = (),
    across_prompts: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    """Compare every method of every run with one of them, on what all runs share.

    Args:
        runs: At least one; they are called A, B, ... in this order.
        against: The row to compare with, such as ``"B:vhr"``; default: the baseline of the first run.
        methods: Labels of the methods to show, in every run (``vhr``) or in one (``A:vhr``); default: all. Baselines
            and the reference are always there.
        across_prompts: Compare answers to different prompts too.
        seed: Seed of the bootstrap.

    Raises:
        DataError: No benchmark can be compared (the message says why, one reason each), or there is no such row.
    """
    named = dict(zip(run_names(len(runs)), runs, strict=True))
    shared, left_out = _shared(named, across_prompts)
    rows = _rows(named, shared, methods, against)
    reference = _reference(rows, against)
    entries = [_entry(row, reference, seed) for row in rows]
    controls = [line for name in named for line in _controls([row for row in rows if row.run == name], seed)]
    corrections = correct_rows([entry for entry in entries if "differences" in entry])
    _judge(rows, entries, controls, seed)
    return {
        "schema_version": SCHEMA_VERSION,
        "reference": reference.label,
        "runs": {
            name: {
                "folder": str(run.folder),
                "model": run.results.get("model"),
                "data": run.results.get("data"),
                "command": run.results["command"],
                "settings_digest": run.results["settings_digest"],
            }
            for name, run in named.items()
        },
        "differing_settings": differing(named),
        "shared": {
            benchmark: {
                "rows": found.size,
                "images": found.images,
                "rows_of_runs": dict(found.sizes),
                "notes": list(found.notes),
            }
            for benchmark, found in shared.items()
            if benchmark in benchmark_names()
        },
        "left_out": left_out,
        "methods": entries,
        "controls": controls,
        "intervals": {"confidence": CONFIDENCE, "resamples": RESAMPLES, "resampled": "images"},
        "corrections": corrections,
    }


def _shared(runs: Mapping[str, RunCounts], across_prompts: bool) -> tuple[dict[str, Shared], dict[str, str]]:
    """What of each benchmark is comparable, and why the others are left out."""
    shared: dict[str, Shared] = {}
    left_out: dict[str, str] = {}
    for benchmark in dict.fromkeys(name for run in runs.values() for name in run.benchmarks):
        lacking = [name for name, run in runs.items() if benchmark not in run.benchmarks]
        reason = (
            f"{', '.join(lacking)} did not run it"
            if lacking
            else obstacle(benchmark, runs, across_prompts=across_prompts)
        )
        if reason is None:
            try:
                shared[benchmark] = share(benchmark, runs)
            except DataError as error:
                reason = str(error)
        if reason is not None and benchmark in benchmark_names():
            left_out[benchmark] = reason
    if not set(shared) & set(benchmark_names()):
        reasons = "".join(f"\n  {name}: {reason}" for name, reason in left_out.items())
        raise DataError(f"nothing can be compared between these runs:{reasons or ' they have no benchmark'}")
    return shared, left_out


def _rows(
    runs: Mapping[str, RunCounts], shared: Mapping[str, Shared], methods: Sequence[str], against: str | None
) -> list[Row]:
    """The rows to show: the baselines, the reference, and those that are asked for with their head controls."""
    rows: list[Row] = []
    known: set[str] = set()
    labels = []
    for name, run in runs.items():
        for entry in run.results["methods"]:
            label = str(entry["label"])
            labels.append(f"{name}:{label}")
            named = [each for each in (label, entry.get("parent")) if each is not None]
            own = {*named, *(f"{name}:{each}" for each in named)}
            known |= own
            if methods and entry["role"] != "baseline" and own.isdisjoint({*methods, against}):
                continue
            tables = {b: run.benchmarks[b].methods[label].take(found.rows[name]) for b, found in shared.items()}
            controls = {
                b: {
                    control: table.take(found.rows[name])
                    for control, table in run.benchmarks[b].controls.get(label, {}).items()
                }
                for b, found in shared.items()
            }
            rows.append(Row(f"{name}:{label}", name, entry, tables, controls))
    if unknown := [method for method in methods if method not in known]:
        raise DataError(f"no run has a method {unknown[0]!r}; they have {', '.join(labels)}")
    return rows


def _reference(rows: Sequence[Row], against: str | None) -> Row:
    if against is None:
        return rows[0]
    for row in rows:
        if row.label == against:
            return row
    raise DataError(f"--against {against}: there is no such row; choose one of {', '.join(row.label for row in rows)}")


def _entry(row: Row, reference: Row, seed: int) -> dict[str, Any]:
    """A row in the form of ``results.json``, with its differences to the reference."""
    names = ("role", "parent", "params")
    entry: dict[str, Any] = {
        "label": row.label,
        "describe": row.label if row.entry["describe"] == row.entry["label"] else row.entry["describe"],
        "run": row.run,
        **{name: row.entry.get(name) for name in names},
    }
    for benchmark, table in row.benchmarks.items():
        other = reference.tables[benchmark]
        shown = [figure for figure in benchmark_class(benchmark).figures if figure.column]
        figures = summary(table, shown)
        if len(rows := question_rows(table)):
            figures["mcc"] = MCC.of(table.take(rows))
        part: dict[str, Any] = {"summary": finite(figures), "changed": int(table.differs(other)), "seconds": 0.0}
        part["all"] = {"summary": part["summary"]}
        if "unparsed" in table.columns:
            part["counts"] = {"unparsed": int(table.unparsed.sum())}
        if row is not reference and (paired := paired_answers(table, other, seed)) is not None:
            part["paired"] = paired
        entry[benchmark] = part
    if row is not reference:
        entry["differences"] = _differences(row, reference, seed)
    return entry


def _differences(row: Row, other: Row, seed: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, table in row.benchmarks.items():
        found |= benchmark_class(name).differences(table, other.tables[name], seed)
    return found


def _controls(rows: Sequence[Row], seed: int) -> list[dict[str, Any]]:
    """The controls of one run's methods, matched on the shared rows."""
    baseline = rows[0]
    curves = {
        name: bias_curves(name, table, stored_versions(table, baseline.controls[name]))
        for name, table in baseline.benchmarks.items()
    }
    lines: list[dict[str, Any]] = []
    compared = [row for row in rows if row.entry["role"] == "method"]
    n_resamples = resamples_for(len(compared), curves)
    for row in compared:
        of_run: list[dict[str, Any]] = []
        for name, table in row.benchmarks.items():
            kept = row.controls[name]  # Nothing of a run without controls.
            for control, curve in ((control, curve) for control, curve in curves[name].items() if control in kept):
                of_run += bias_lines(row.label, name, control, curve, table, seed, n_resamples)[0]
            for control, stored in kept.items():
                if control not in curves[name]:  # Older runs keep the control, and not what it was chosen from.
                    of_run += stored_lines(row.label, name, control, table, stored, seed)
        for other in rows:
            if other.entry.get("parent") == row.entry["label"]:
                select = str(other.entry["params"]["select"])
                tables = {b: {row.label: t, other.label: other.tables[b]} for b, t in row.benchmarks.items()}
                of_run += head_lines(row.label, other.label, select, tables, seed)
        for line in of_run:
            if not row.entry[line["metric"].partition(".")[0]]["changed"]:
                line["verdict"] = "unchanged"
        lines += of_run
    return lines


def _judge(
    rows: Sequence[Row], entries: Sequence[dict[str, Any]], controls: Sequence[dict[str, Any]], seed: int
) -> None:
    """Give every method its word: against the baseline and the controls of its own run, whatever the reference is."""
    own: list[dict[str, Any]] = []
    for row in rows:
        judged = {"label": row.label, "role": row.entry["role"]}
        judged |= {name: {"changed": row.entry[name]["changed"]} for name in row.benchmarks}
        if row.entry["role"] == "method":
            baseline = next(other for other in rows if other.run == row.run)
            judged["differences"] = _differences(row, baseline, seed)
            for name in row.benchmarks:
                found = benchmark_class(name).text_differences(row.tables, baseline.tables, seed)
                judged[name]["text_quality"] = {"differences": found}
        own.append(judged)
    correct_rows([row for row in own if "differences" in row])
    correct_controls(controls, own)
    for judged, entry in zip(own, entries, strict=True):
        entry["verdict"] = verdict({"methods": own, "controls": controls}, judged)


_ABOUT = """\
Compare the methods of several run folders, paired on the images and questions that all of them share. Neither data nor
a model is needed.

  vlmfix compare runs/a runs/b                     every method of both against the baseline of the first
  vlmfix compare runs/a runs/b --against B:vhr     against a row of the second
  vlmfix compare runs/7b runs/13b --method vhr --out comparison/
"""


def add_compare(verbs: Any) -> argparse.ArgumentParser:
    """Add the verb to a command line's subparsers; import nothing heavy."""
    parser = verb_parser(verbs, "compare", _ABOUT, "RUN [RUN ...] [OPTIONS]")
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folders; called A, B, ... in this order")
    parser.add_argument("--against", metavar="ROW", help="row to compare with, such as B:vhr (default: A's baseline)")
    parser.add_argument(
        "--method",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME",
        help="methods to show, as vhr or A:vhr (default: all)",
    )
    parser.add_argument(
        "--across-prompts", action="store_true", help="compare answers to different prompts too (default: refuse)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap (default: 0)")
    parser.add_argument(
        "--out", type=Path, metavar="PATH", help="write FILE.json, FILE.md, or both into a folder (compare.json, .md)"
    )
    return parser
