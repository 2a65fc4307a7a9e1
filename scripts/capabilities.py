"""Measure what vlmfix does on every family and write the matrix to tests/families/FAMILIES.md.

Every cell is the outcome of running the family's tiny random model: nothing is declared. Needs no network.

    python scripts/capabilities.py                     # writes tests/families/FAMILIES.md
    python scripts/capabilities.py --check             # fails with a diff if the file is not what is measured
    python scripts/capabilities.py --check --methods   # the same without the machinery, which the tests compare with it
    python scripts/capabilities.py --families llava,gemma3 --print
    python scripts/capabilities.py --update llava,gemma3   # measures these, and what the file lacks; keeps the rest
"""

from __future__ import annotations

import argparse
import difflib
import multiprocessing
import os
import re
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OUTPUT = ROOT / "tests" / "families" / "FAMILIES.md"
VERSIONS = "Measured with "
"""How the line starts that names versions; ``--check`` leaves it out."""

for folder in (ROOT / "tests", ROOT):
    sys.path.insert(0, str(folder))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

Row = dict[str, tuple[str, str]]
"""Per column, the mark and the note."""

LEGEND = {
    "sites": "text attention modules that reach the patch, of those the model has (those of an encoder are left alone)",
    "strength 0": "a patch of strength zero, and taking a patch off, leave every bit (forward and `generate`), and a "
    "strength next to zero is next to stock",
    "image mask": "the image tokens found are those whose embeddings the model replaces by visual features",
    "text only": "prompts without an image are answered bit for bit by the stock model",
    "generate": "`generate` reads one prompt, decodes step by step, and the edit shows",
    "pipeline": "a pipeline around the model can be patched and answers what `generate` answers (with a stand-in for "
    "the processor, which gives the family's inputs)",
    "batch": "a padded batch of unequal prompts (one, two, no image) equals its prompts one by one",
    "cache": "decoding with a cache equals recomputation without one",
    "static": "a static cache equals a dynamic one",
    "sliding": "sliding or chunked layers still agree with recomputation once the window has left the image",
    "beams": "three beams of a batch equal those of its prompts one by one",
}
"""What the columns of the machinery mean."""

TYPES = """
## Every model type

What transformers maps to images and text, type by type. *measured*: a tiny model of the type is a row above. *refused*:
`vlmfix.patch` says so to a model of the type, in these words. *unbuilt*: neither is known.

| model type | class in transformers | | families, or the reason |
|---|---|---|---|"""
"""The head of the table of types."""

INTRODUCTION = f"""# Families

Written by `scripts/capabilities.py`; do not edit. Every cell was measured on a tiny random model of the family
(`tests/families`), fp32 on CPU, tolerance 1e-5. The machinery is measured with a probe that doubles the attention
weights of image tokens in every layer.

{VERSIONS}{{versions}}.

- `yes`, `active`: measured. `active` also means that a padded batch equals its prompts one by one and that a prompt
  without an image is answered bit for bit by the stock model.
- `no-op`: the method runs and the answer stays what it was. `refused`: vlmfix says so when the model is patched or run.
- `upstream`: the unpatched model fails in the same way. `-`: does not apply. Numbers refer to the notes below.
"""


def measure_row(name: str, columns: Sequence[str] | None = None) -> Row:
    """Measure one family, or some columns of it; runs in its own process."""
    import warnings

    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore")
    from families import by_name
    from families.capability import measure_family

    return {column: (cell.mark, cell.note) for column, cell in measure_family(by_name(name), columns).items()}


def measure_all(names: Sequence[str], jobs: int, known: dict[str, Row] | None = None) -> dict[str, Row]:
    """Measure families, a row each, on several processes.

    Args:
        names: The families.
        jobs: How many processes.
        known: Cells that need not be measured again.
    """
    from families.capability import MACHINERY, method_columns

    columns = (*MACHINERY, *method_columns())
    rows = {name: (known or {}).get(name, {}) for name in names}
    lacking = {name: missing for name in names if (missing := [each for each in columns if each not in rows[name]])}
    if jobs <= 1:
        found: Iterable[Row] = map(measure_row, lacking, lacking.values())
    else:
        with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
            found = list(pool.map(measure_row, lacking, lacking.values()))
    rows |= {name: rows[name] | row for name, row in zip(lacking, found, strict=True)}
    return rows


def read(text: str) -> dict[str, Row]:
    """Read the cells of a matrix that ``render`` wrote."""
    from families import FAMILIES

    names = {family.title: family.name for family in FAMILIES}
    notes = {number: _plain(note) for number, note in re.findall(r"^(\d+)\. (.*)$", text, re.MULTILINE)}
    rows: dict[str, Row] = {}
    columns: list[str] = []
    for line in text.partition("\n## Notes\n")[0].splitlines():
        title, *cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if title == "family":
            columns = cells
        elif title in names and len(cells) == len(columns):
            row = rows.setdefault(names[title], {})
            for column, cell in zip(columns, cells, strict=True):
                mark, _, number = cell.removesuffix("]").partition(" [")
                row[column] = (mark, notes.get(number, ""))
    return rows


class Notes:
    """Footnotes: the same text always has the same number."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def mark(self, mark: str, note: str) -> str:
        """Return a cell's text with its reference."""
        if not note:
            return mark
        number = self._numbers.setdefault(note, len(self._numbers) + 1)
        return f"{mark} [{number}]"

    def lines(self) -> list[str]:
        """Return the notes as a numbered list."""
        return [f"{number}. {_escaped(note)}" for note, number in self._numbers.items()]


def render(rows: dict[str, Row]) -> str:
    """Write the matrix as Markdown."""
    from families import by_name
    from families.capability import MACHINERY, method_columns

    notes = Notes()
    titles = {name: by_name(name).title for name in rows}
    parts = [INTRODUCTION.format(versions=versions()), "## Machinery\n", *_table(rows, titles, tuple(MACHINERY), notes)]
    parts += ["", *(f"- *{column}*: {meaning}." for column, meaning in LEGEND.items())]
    parts += ["\n## Methods\n", *_table(rows, titles, method_columns(), notes)]
    parts += ["\n## Notes\n", *notes.lines()]
    parts += ["\n## The models\n", "| family | class in transformers | what is peculiar |", "|---|---|---|"]
    for name in rows:
        family = by_name(name)
        parts.append(f"| {family.title} | {family.architecture} | {_escaped(family.notes)} |")
    parts += [TYPES, *types_table()]
    return "\n".join(parts) + "\n"


def types_table() -> list[str]:
    """Return a line of the table per model type of transformers."""
    from families.model_types import rows

    return [f"| {row.model_type} | {row.architecture} | {row.standing} | {_escaped(row.says)} |" for row in rows()]


def _table(rows: dict[str, Row], titles: dict[str, str], columns: Sequence[str], notes: Notes) -> list[str]:
    lines = [f"| family | {' | '.join(columns)} |", f"|---{'|---' * len(columns)}|"]
    for name, row in rows.items():
        lines.append(f"| {titles[name]} | {' | '.join(notes.mark(*row[column]) for column in columns)} |")
    return lines


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "\\<")


def _plain(text: str) -> str:
    return text.replace("\\|", "|").replace("\\<", "<")


def versions() -> str:
    """Name the versions that matter."""
    import torch
    import transformers

    return f"torch {torch.__version__.partition('+')[0]}, transformers {transformers.__version__}"


def is_of_these_versions(committed: str) -> bool:
    """Whether a matrix was measured with the versions that are installed."""
    return f"{VERSIONS}{versions()}." in committed


def difference(committed: str, measured: str) -> list[str]:
    """Compare two matrices, the line of versions left out."""
    before, after = (
        [line for line in text.splitlines() if not line.startswith(VERSIONS)] for text in (committed, measured)
    )
    return list(difflib.unified_diff(before, after, "tests/families/FAMILIES.md", "measured", lineterm="", n=0))


def main() -> int:
    """Measure; write or check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--check", action="store_true", help="compare with tests/families/FAMILIES.md instead of writing it"
    )
    parser.add_argument(
        "--methods",
        action="store_true",
        help="with --check: only the columns of methods, where tests/families/test_families.py compares the others "
        "(not with other versions of torch and transformers)",
    )
    parser.add_argument("--print", action="store_true", help="print the matrix instead of writing it")
    parser.add_argument("--families", default="", metavar="A,B", help="only these (implies --print)")
    parser.add_argument(
        "--update",
        metavar="A,B",
        help="measure these and the cells that tests/families/FAMILIES.md lacks, and keep its other cells",
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, metavar="N", help="processes (default: cores)")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")

    from families import FAMILIES, by_name
    from families.capability import MACHINERY

    wanted = [name for name in options.families.split(",") if name]
    try:
        names = [by_name(name).name for name in wanted] or [family.name for family in FAMILIES]
    except KeyError as error:
        parser.error(error.args[0])
    if wanted and options.check:
        parser.error("--check compares the whole matrix; leave --families out")
    if options.methods and not options.check:
        parser.error("--methods goes with --check")
    committed = OUTPUT.read_text(encoding="utf-8") if OUTPUT.exists() else ""
    known = {}
    if options.update is not None:
        again = options.update.split(",")
        known = {name: row for name, row in read(committed).items() if name not in again}
    elif options.methods and is_of_these_versions(committed):
        known = {name: {key: row[key] for key in row if key in MACHINERY} for name, row in read(committed).items()}
    text = render(measure_all(names, options.jobs, known))
    if options.print or wanted:
        print(text, end="")
        return 0
    if not options.check:
        OUTPUT.write_text(text, encoding="utf-8")
        print(f"wrote {OUTPUT.relative_to(ROOT)}: {len(names)} families")
        return 0
    changes = difference(committed, text)
    if changes:
        print("\n".join(changes))
        print(
            "tests/families/FAMILIES.md is not what is measured. Type: python scripts/capabilities.py", file=sys.stderr
        )
        return 1
    print(f"tests/families/FAMILIES.md is what is measured: {len(names)} families")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
