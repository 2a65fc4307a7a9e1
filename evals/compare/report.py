"""What ``vlmfix compare`` prints and writes."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import wrap
from typing import Any

from ..data.write import write_json, write_text
from ..report.text import (
    ANSWERS_LEGEND,
    CONTROLS_EXPLAINED,
    PAIRED_LEGEND,
    TERMINAL_WIDTH,
    answers_rows,
    control_rows,
    controls_text,
    legend,
    main_table,
    markdown_legend,
    markdown_main,
    paired_rows,
)
from ..scores.counts import load_run
from ..tables import fitting_table, markdown_table
from .compare import compare_runs

_MATCHED_ON_ALL = (
    "controls were matched on all rows of their own run; matched: method, control, on the rows shown here. Verdicts "
    "compare a method with the baseline and the controls of its own run."
)


def run(options: argparse.Namespace) -> str:
    """Compare as asked, write what is wanted, and return the text.

    Raises:
        VlmfixError: A folder that is no run, runs that share nothing, an unknown row, or an unwritable file.
    """
    found = compare_runs(
        [load_run(folder) for folder in options.runs],
        against=options.against,
        methods=options.method,
        across_prompts=options.across_prompts,
        seed=options.seed,
    )
    text = comparison_text(found)
    if options.out is None:
        return text
    written = write_comparison(found, options.out)
    return f"{text}\n\nwritten: {' '.join(map(str, written))}"


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
    parts = [*_wrapped([*_runs(found), *_settings(found), *_rows(found)]), "", main_table(found, TERMINAL_WIDTH)]
    parts += ["", *_wrapped(legend(found))]
    answers = answers_rows(found)
    if answers:
        parts += ["", fitting_table(answers, TERMINAL_WIDTH), "", *_wrapped(_answers_legend(found))]
    others = paired_rows(found)
    if others:
        parts += ["", fitting_table(others, TERMINAL_WIDTH), "", *_wrapped(PAIRED_LEGEND)]
    if found["controls"]:
        parts += ["", controls_text(found), "", *_wrapped([_MATCHED_ON_ALL])]
    return "\n".join(parts)


def comparison_markdown(found: Mapping[str, Any]) -> str:
    """The comparison as Markdown."""
    parts = ["# vlmfix comparison", "", *(f"- {line}" for line in [*_runs(found), *_rows(found)]), ""]
    parts += ["## What differs", "", _settings_markdown(found), ""]
    parts += ["## Paired differences", "", markdown_main(found), ""]
    parts += [line for text in markdown_legend(found) for line in (text, "")]
    answers = answers_rows(found)
    if answers:
        parts += ["## Paired answers", "", *_answers_legend(found), "", markdown_table(answers), ""]
    others = paired_rows(found)
    if others:
        parts += ["## Paired answers, other benchmarks", "", *PAIRED_LEGEND, "", markdown_table(others), ""]
    if found["controls"]:
        parts += ["## Controls", "", CONTROLS_EXPLAINED, "", _MATCHED_ON_ALL, "", markdown_table(control_rows(found))]
    commands = [f"{name}: {run['command']}" for name, run in found["runs"].items()]
    return "\n".join([*parts, "", "## Repeat", "", "```", *commands, "```", ""])


def _wrapped(lines: Sequence[str]) -> list[str]:
    return [part for line in lines for part in wrap(line, TERMINAL_WIDTH, subsequent_indent="    ")]


def _runs(found: Mapping[str, Any]) -> list[str]:
    return [f"{name} is {run['folder']}: {run['model']} on {run['data']}" for name, run in found["runs"].items()]


def _rows(found: Mapping[str, Any]) -> list[str]:
    """What each benchmark is compared on, or why it is not."""
    lines = []
    for benchmark, part in found["shared"].items():
        sizes = part["rows_of_runs"]
        what = "captions" if benchmark == "chair" else "questions"
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
    return markdown_table(rows)


def _answers_legend(found: Mapping[str, Any]) -> list[str]:
    return [text.replace("only none", f"only {found['reference']}") for text in ANSWERS_LEGEND]
