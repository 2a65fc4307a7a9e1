"""Published tables that this package has the methods for: commands, expected figures, and where these come from.

They stand in ``published.json``. We have run none of the evaluations (they need a GPU, a checkpoint and COCO). The
``label`` of a table says how well its figures are known: "paper" (read in the paper that prints them), "rescored"
(recomputed by us from captions its authors released), "second-hand" (quoted by somebody else), "README" (of the
authors' repository). Figures are in percent, lengths in words; a pair is a mean over seeds with its deviation.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LABELS = {
    "paper": "read in the paper",
    "rescored": "recomputed from released captions",
    "second-hand": "second-hand: quoted by somebody else",
    "README": "README of the authors' repository",
}
#: Of LLaVA-1.5-7B at batch 1, as the IRI paper prints them; the slower step is that of AdaIAT's timing file.
SECONDS_PER_STEP, SECONDS_PER_PREFILL = (0.036, 0.110), 0.100
BATCH = 8


@dataclass(frozen=True)
class Row:
    """Published figures of one method.

    Attributes:
        method: Its label in the run; for rescored files the name of the result.
        figures: Such as ``chair.chair_s`` -> percent.
        spread: Published standard deviation over seeds, where there is one.
    """

    method: str
    figures: Mapping[str, float]
    spread: Mapping[str, float]


@dataclass(frozen=True)
class Table:
    """One published table, or the part of it that can be met.

    Attributes:
        title: What it shows.
        source: Paper and table.
        label: One of :data:`LABELS`.
        rows: Expected figures, the plain model first.
        quoted: Published figures of methods that this package does not have, or of cells that it does not run.
        commands: Words with the placeholders {model}, {data}, {train}, {pope}, {captions}, {amber},
            {mmstar}, {mmhal}, {judge} and {out}.
        runs: Folders (or one folder of result files) below {out} that ``--check`` reads.
        model: Default of {model}; None where no model is needed.
        notes: How our run differs from the published one, and what else a reader must know.
        captions: Captions per run and method, for the estimate.
        steps: Decoding steps of a batch of captions (its longest caption).
        questions: Distinct questions per run and method, for the estimate.
    """

    title: str
    source: str
    label: str
    rows: Sequence[Row]
    commands: Sequence[Sequence[str]]
    runs: Sequence[str]
    notes: Sequence[str]
    model: str | None = "llava-hf/llava-1.5-7b-hf"
    captions: int = 0
    steps: int = 170
    questions: int = 0
    quoted: Sequence[Row] = ()

    @property
    def minutes(self) -> tuple[float, float]:
        """GPU time of all runs, a lower and an upper estimate."""
        count = len(self.runs) * len(self.rows)
        decoding = math.ceil(self.captions / BATCH) * self.steps
        low, high = (count * (decoding * step + self.questions * SECONDS_PER_PREFILL) / 60 for step in SECONDS_PER_STEP)
        return low, high


def filled_in(word: str, values: Mapping[str, object]) -> str:
    """A word of a command with its placeholders filled in, as far as they are known; ``{question}`` is a prompt's."""
    for name, value in values.items():
        word = word.replace(f"{{{name}}}", str(value))
    return word


def _tables(published: Mapping[str, Any]) -> Iterator[tuple[str, Table]]:
    """Name and content of every table: shared notes and words put in, a command per run (seed) or file."""
    for name, found in published["tables"].items():
        seeds = found.pop("seeds", 1)
        runs = [name] if seeds == 1 else [f"{name}-seed{seed}" for seed in range(seeds)]
        commands: list[list[str]] = []
        for text in found.pop("commands"):
            words = shlex.split(filled_in(filled_in(text, published["commands"]), published["commands"]))
            each: list[dict[str, object]] = [{}]
            if "{run}" in words[-1]:
                each = [{"seed": seed, "run": run} for seed, run in enumerate(runs)]
            elif "{row}" in words[-1]:
                each = [{"row": method} for method in found["rows"]]
            commands += [[filled_in(word, values) for word in words] for values in each]
        rows, quoted = (
            [_row(method, figures) for method, figures in found.pop(kind, {}).items()] for kind in ("rows", "quoted")
        )
        notes = [published["notes"].get(note, note) for note in found.pop("notes")]
        needs_model = found.get("model", "") is not None
        runs = runs if needs_model else [""]
        yield name, Table(rows=rows, quoted=quoted, commands=commands, runs=runs, notes=notes, **found)


def _row(method: str, figures: Mapping[str, float | Sequence[float]]) -> Row:
    pairs = {key: value if isinstance(value, Sequence) else (value,) for key, value in figures.items()}
    spread = {key: value[1] for key, value in pairs.items() if len(value) > 1}
    return Row(method, {key: value[0] for key, value in pairs.items()}, spread)


TABLES: Mapping[str, Table] = dict(
    _tables(json.loads(Path(__file__).with_name("published.json").read_text(encoding="utf-8")))
)
