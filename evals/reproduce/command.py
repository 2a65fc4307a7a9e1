"""Published tables: list them, print the commands of one, run them, and put expected beside measured."""

from __future__ import annotations

import argparse
import logging
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

from vlmfix.errors import DataError, VlmfixError

from ..flags import verb_parser
from .check import check
from .table import LABELS, SECONDS_PER_PREFILL, SECONDS_PER_STEP, TABLES, Row, Table, filled_in

logger = logging.getLogger(__name__)

_ABOUT = """\
Published tables that this package can meet: commands, expected figures with their source, GPU time (estimated).

examples:
  vlmfix reproduce                                        the list
  vlmfix reproduce vhr-llava15-chair                      commands, expected figures, sources
  vlmfix reproduce --matrix                               an independent re-run of several methods, cell by cell
  vlmfix reproduce vhr-llava15-chair --data COCO --run    runs them, after a look at what is missing
  vlmfix reproduce vhr-llava15-chair --check runs/vhr-llava15-chair-seed0
  vlmfix reproduce vhr-llava15-chair --check              all its runs in --out

We have run none of the evaluations: nothing printed as published was measured by us.
"""
SPELLED = {
    "data": "COCO_DIR",
    "train": "TRAIN_COCO_DIR",
    "pope": "POPE_DIR",
    "captions": "CAPTIONS_DIR",
    "amber": "AMBER_DIR",
    "mmstar": "MMSTAR",
    "mmhal": "MMHAL_DIR",
    "judge": "JUDGE",
}
WIDTH = 120

MATRIX = "assess-"
"""What the names of the tables of the independent re-run begin with: model and benchmark follow."""

PLACES = {
    "data": "COCO folder: instances_val2014.json, captions_val2014.json, val2014/",
    "train": "COCO folder of train2014, to calibrate on other images",
    "pope": "folder of coco_pope_random.json, coco_pope_popular.json, coco_pope_adversarial.json",
    "captions": "folder of the released captions",
    "amber": "AMBER's folder",
    "mmstar": "MMStar's file",
    "mmhal": "MMHal-Bench's folder",
    "judge": "command that reads a prompt and writes a judgement with 'Rating: N'",
}


def add_reproduce(verbs: Any) -> argparse.ArgumentParser:
    """Add the verb to a command line's subparsers; import nothing heavy."""
    parser = verb_parser(verbs, "reproduce", _ABOUT, "[TABLE] [OPTIONS]")
    parser.add_argument("name", nargs="?", metavar="TABLE", choices=list(TABLES), help="a table (default: list them)")
    parser.add_argument("--matrix", action="store_true", help="published cells of an independent re-run")
    parser.add_argument("--run", action="store_true", help="run the commands (a killed run goes on where it was)")
    parser.add_argument("--check", nargs="*", type=Path, metavar="RUN", help="compare runs (default: those in --out)")
    parser.add_argument("--model", metavar="PATH_OR_ID", help="checkpoint (default: the hub's)")
    parser.add_argument("--out", default="runs", metavar="DIR", help="where runs go (default: runs)")
    for name, text in PLACES.items():
        parser.add_argument(f"--{name}", metavar="DIR", help=text)
    return parser


def run(options: argparse.Namespace, *, show: Callable[[str], None]) -> None:
    """List the tables, describe one, run its commands, or compare what they gave.

    Raises:
        VlmfixError: Something that the commands need is missing, one of them failed, or there is no such run.
    """
    if options.name is None:
        show(matrix() if options.matrix else listing())
        return
    table = TABLES[options.name]
    filled = [command(words, table, options) for words in table.commands]
    if options.check is not None:
        show(check(table, options.check or [Path(options.out) / each for each in table.runs]))
        return
    show(description(options.name, table, filled))
    if options.run:
        places = {name: getattr(options, name) for name in PLACES}
        lacking = missing(table, places, options.model or table.model)
        if lacking:
            raise VlmfixError("not run; missing:\n" + "\n".join(f"  - {each}" for each in lacking))
        run_commands(filled, needs_gpu=table.model is not None, show=show)


def listing() -> str:
    """One line per table."""
    width = max(map(len, TABLES))
    lines = [f"{name.ljust(width)}  {table.title} ({table.label})" for name, table in TABLES.items()]
    return "\n".join([*lines, "", "We have run none of the evaluations. Type: vlmfix reproduce TABLE"])


def matrix() -> str:
    """The independent re-run, cell by cell: a row per model and method, a column per figure of each benchmark."""
    from ..benchmarks.columns import figure_of
    from ..tables import Table as Printed

    cells: dict[tuple[str, str], dict[str, float]] = {}
    own: set[str] = set()
    for name, table in TABLES.items():
        if name.startswith(MATRIX):
            for row in (*table.rows, *table.quoted):
                cells.setdefault((name.split("-")[1], row.method), {}).update(row.figures)
            own.update(row.method for row in table.rows)
    keys = list(dict.fromkeys(key for figures in cells.values() for key in figures))
    rows = [["model", "method", *(figure_of(key).heading for key in keys)]]
    for (model, method), figures in sorted(cells.items(), key=lambda cell: cell[0][0]):
        found = [f"{figures[key]:g}" if key in figures else "" for key in keys]
        rows.append([model, method if method in own else f"({method})", *found])
    benchmarks = [key.partition(".")[0] for key in keys]
    groups = [("", 2), *((each.upper(), benchmarks.count(each)) for each in dict.fromkeys(benchmarks))]
    first = next(found for name, found in TABLES.items() if name.startswith(MATRIX))
    notes = [*first.notes[:1], "in brackets: no method of this package, quoted only; empty: not printed there"]
    text = [f"source: {first.source}", "", Printed(rows, words=(0, 1), groups=tuple(groups)).plain(WIDTH), ""]
    commands = f"Commands of a cell: vlmfix reproduce {MATRIX}MODEL-BENCHMARK, such as {MATRIX}llava15-chair"
    return "\n".join([*text, *(fill(note, WIDTH - 4, subsequent_indent="  ") for note in notes), "", commands])


def command(words: Sequence[str], table: Table, options: argparse.Namespace) -> list[str]:
    """A command with its placeholders filled in, as far as they are known."""
    known = {name: getattr(options, name) or SPELLED[name] for name in PLACES}
    known |= {"model": options.model or table.model or "", "out": options.out}
    return [filled_in(word, known) for word in words]


def needed(table: Table) -> list[str]:
    """The folders that the commands of a table ask for."""
    words = " ".join(word for words in table.commands for word in words)
    return [name for name in PLACES if f"{{{name}}}" in words]


def description(name: str, table: Table, commands: Sequence[Sequence[str]]) -> str:
    """All that is known of a table, and the commands."""
    lines = [f"{name}: {table.title}", f"source: {table.source}", f"figures: {LABELS[table.label]}", ""]
    lines += ["published (percent; lengths in words; ± standard deviation over seeds):"]
    lines += [f"  {row.method.ljust(16)} {_figures(row)}" for row in table.rows]
    lines += [f"  {f'({row.method})'.ljust(16)} {_figures(row)}" for row in table.quoted]
    lines += ["  (...): quoted, not run"] * bool(table.quoted)
    if table.notes:
        lines += ["", "where this differs from the published run, and what to know:"]
        lines += [fill(note, 116, initial_indent="  - ", subsequent_indent="    ") for note in table.notes]
    lines += ["", *[f"{SPELLED[each]}: {PLACES[each]}" for each in needed(table)]]
    lines += ["", *[shlex.join(words) for words in commands], "", estimate(table)]
    return "\n".join(lines)


def _figures(row: Row) -> str:
    cells = []
    for key, value in row.figures.items():
        spread = f" ± {row.spread[key]:g}" if key in row.spread else ""
        cells.append(f"{key.partition('.')[2]} {value:g}{spread}")
    return ", ".join(cells)


def estimate(table: Table) -> str:
    """The GPU time of a table, and how it was estimated."""
    if table.model is None:
        return "GPU time: none, seconds on a CPU"
    low, high = table.minutes
    parts = []
    if table.captions:
        step = "-".join(f"{seconds:g}" for seconds in SECONDS_PER_STEP)
        parts.append(f"{table.captions} captions in batches of 8, {table.steps} steps of {step} s each")
    if table.questions:
        parts.append(f"{table.questions} distinct questions of {SECONDS_PER_PREFILL:g} s each")
    span = f"{low:.0f}" if f"{low:.0f}" == f"{high:.0f}" else f"{low:.0f} to {high:.0f}"
    text = (
        f"GPU time: about {span} minutes on a GPU with 24 GB or more. An estimate, not measured: "
        f"{len(table.runs)} run(s) of {len(table.rows)} methods, {' and '.join(parts)}; times per step and prefill are "
        "those that others print for LLaVA-1.5-7B at batch 1; calibration and loading are not counted."
    )
    return fill(text, 118)


def missing(table: Table, places: Mapping[str, str | None], model: str | None) -> list[str]:
    """What stands in the way of running the commands, in words."""
    lacking = []
    for name in needed(table):
        place = places[name]
        if place is None:
            lacking.append(f"--{name} DIR ({PLACES[name]})")
        elif name in ("amber", "mmstar", "mmhal"):
            lacking += [] if Path(place).exists() else [f"--{name} {place}: there is no such path ({PLACES[name]})"]
        elif name != "judge":
            lacking += _lacking_files(name, Path(place), table)
    if any(word in ("nltk", "mixed") for words in table.commands for word in words):
        from ..benchmarks.coco_objects import ChairMatcher

        try:
            ChairMatcher("nltk")
        except VlmfixError as error:
            lacking.append(str(error))
    if model is not None:
        lacking += _lacking_model(model)
    return lacking


def _lacking_files(name: str, folder: Path, table: Table) -> list[str]:
    if name == "data" and table.model is None and folder.is_file():
        return []  # Scoring takes a file of objects per image as well.
    if not folder.is_dir():
        return [f"--{name} {folder}: there is no such folder ({PLACES[name]})"]
    if name in ("pope", "captions"):
        words = {word for words in table.commands for word in words if word.startswith(f"{{{name}}}")}
        wanted = sorted(Path(word).name for word in words)
        return [f"--{name} {folder}: there is no {file} in it" for file in wanted if not (folder / file).is_file()]
    from ..data.coco import CocoData

    try:
        data = CocoData.load(folder)
        if table.model is not None:
            data.select(limit=1)  # Raises without a single image.
    except DataError as error:
        return [f"--{name} {folder}: {error}"]
    return []


def _lacking_model(model: str) -> list[str]:
    from transformers import AutoConfig

    try:
        AutoConfig.from_pretrained(model)
    except Exception as error:  # Whatever the hub, the network or a broken folder raises.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        return [f"the checkpoint {model}: {reason}; give a folder with --model PATH"]
    return []


def run_commands(commands: Sequence[Sequence[str]], *, needs_gpu: bool, show: Callable[[str], None]) -> None:
    """Run the commands one after the other, until one fails.

    Raises:
        VlmfixError: One failed.
    """
    import torch

    if needs_gpu and not torch.cuda.is_available():
        logger.warning("no GPU here; a 7B model on a CPU takes days, and the estimate does not hold")
    for words in commands:
        show("\n$ " + shlex.join(words))
        status = subprocess.run([sys.executable, "-m", *words]).returncode
        if status:
            raise VlmfixError(f"stopped, the command above ended with status {status}")
