"""What ``vlmfix compare`` prints and writes."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..benchmarks.registry import benchmark_class
from ..data.write import check_not_read, write_json, write_text
from ..report.rows import answers_table, controls_table
from ..report.summary import legend, main_table, markdown_main, summarise
from ..report.text import TERMINAL_WIDTH, paragraphs, wrapped
from ..scores.counts import load_run
from ..tables import Table
from .compare import add_compare as add_compare
from .compare import compare_runs

_MATCHED_HERE = (
    "controls are those of a method's own run, matched on the rows shown here (in runs of older versions on all rows "
    "of the run, with the choice held fixed). Verdicts compare a method with the baseline and controls of its own run."
)


def run(options: argparse.Namespace, *, show: Callable[[str], None]) -> None:
    """Compare as asked, write what is wanted, and show the text.

    Raises:
        VlmfixError: A folder that is no run, runs that share nothing, an unknown row, or an unwritable file.
    """
    if options.out is not None:
        check_not_read(options.out, vars(options))
    found = compare_runs(
        [load_run(folder) for folder in options.runs],
        against=options.against,
        methods=options.method,
        across_prompts=options.across_prompts,
        seed=options.seed,
    )
    show(comparison_text(found))
    if options.out is not None:
        written = write_comparison(found, options.out)
        show(f"\nwritten: {' '.join(map(str, written))}")


def write_comparison(found: Mapping[str, Any], out: Path) -> list[Path]:
    """Write a comparison as JSON, Markdown or both.

    Args:
        found: Of :func:`vlmfix.evals.compare.compare.compare_runs`.
        out: A name in ``.json`` or ``.md``, or a folder.

    Returns:
        The files.
    """
    files = [out] if out.suffix in (".json", ".md") else [out / "compare.json", out / "compare.md"]
    for path in files:
        if path.suffix == ".json":
            write_json(path, found)
        else:
            write_text(path, comparison_markdown(found))
    return files


def comparison_text(found: Mapping[str, Any]) -> str:
    """The comparison for a terminal of 120 columns."""
    parts = [*wrapped([*_runs(found), *_settings(found), *_rows(found)]), ""]
    parts += [main_table(summarise(found), TERMINAL_WIDTH), "", *wrapped(legend(found))]
    for table in _tables(found):
        parts += ["", table.plain(TERMINAL_WIDTH), "", *wrapped(table.notes)]
    return "\n".join(parts)


def comparison_markdown(found: Mapping[str, Any]) -> str:
    """The comparison as Markdown."""
    parts = ["# vlmfix comparison", "", *(f"- {line}" for line in [*_runs(found), *_rows(found)]), ""]
    parts += ["## What differs", "", _settings_markdown(found), ""]
    parts += ["## Paired differences", "", markdown_main(summarise(found)), ""]
    parts += paragraphs(legend(found, in_cells=True))
    for table in _tables(found):
        parts += [f"## {table.title}", "", table.markdown(), "", *paragraphs(table.notes)]
    commands = [f"{name}: {run['command']}" for name, run in found["runs"].items()]
    return "\n".join([*parts, "## Repeat", "", "```", *commands, "```", ""])


def _tables(found: Mapping[str, Any]) -> list[Table]:
    """What stands beside the summary."""
    answers, controls = answers_table(found), controls_table(found)
    matched = None if controls is None else replace(controls, notes=(*controls.notes, _MATCHED_HERE))
    return [table for table in (answers, matched) if table is not None]


def _runs(found: Mapping[str, Any]) -> list[str]:
    return [f"{name} is {run['folder']}: {run['model']} on {run['data']}" for name, run in found["runs"].items()]


def _rows(found: Mapping[str, Any]) -> list[str]:
    """What each benchmark is compared on, or why it is not."""
    lines = []
    for benchmark, part in found["shared"].items():
        sizes = part["rows_of_runs"]
        what = benchmark_class(benchmark).rows_are
        told = f"{benchmark.upper()} on {part['rows']} {what} about {part['images']} images"
        if any(size != part["rows"] for size in sizes.values()):
            told += f", those that all runs share ({', '.join(f'{name} has {n}' for name, n in sizes.items())})"
        lines += [told, *(f"NOTE {benchmark.upper()}: {note}" for note in part["notes"])]
    return lines + [f"NOT COMPARED {name.upper()}: {reason}" for name, reason in found["left_out"].items()]


def _settings(found: Mapping[str, Any]) -> list[str]:
    """What differs between the runs, one line per setting."""
    if len(found["runs"]) == 1:
        return []
    return [
        f"differs: {name}: {', '.join(f'{value} in {run}' for run, value in values.items())}"
        for name, values in found["differing_settings"].items()
    ] or ["apart from methods, images and questions, the runs have the same settings"]


def _settings_markdown(found: Mapping[str, Any]) -> str:
    if not found["differing_settings"]:
        return "Apart from methods, images and questions, nothing."
    names = list(found["runs"])
    rows = [["setting", *names]]
    for setting, values in found["differing_settings"].items():
        rows.append([f"`{setting}`", *(str(values[name]).replace("|", "\\|") for name in names)])
    return Table(rows, words=tuple(range(1, len(names) + 1))).markdown()
