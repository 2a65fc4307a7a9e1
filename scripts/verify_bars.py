"""Measure self-verification on the embedded models: calibrate it, evaluate it beside other methods, print the table.

    python scripts/verify_bars.py --out runs/verify                        # all of it: about half an hour on one core
    python scripts/verify_bars.py --models tiny --limit 100 --out /tmp/v   # a look

The weights come from ``--calibrate`` scenes of the calibration split; held-out scenes are read once they stand. Early
stop is matched to the method's recall again in every resample of the images.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from vlmfix.cli import main as vlmfix

SPLITS = ("heldout", "heldout2")
OTHERS = {"tiny": ("vhr", "pai", "vaf", "iat"), "smol": ("vhr", "pai", "vaf")}
"""Methods on attention, at the strengths of the model's recipe or their gentlest published ones."""
STRENGTHS = {"tiny": (), "smol": ("vhr.alpha=1.2", "pai.alpha=0.2")}
HEAD = (
    "| model, split | method | CHAIR_s | CHAIR_i | recall | F1 | words | rep-4 | seconds | CHAIR_i to early stop |",
    "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|",
)


def run(command: Sequence[str]) -> None:
    """Run a verb, and stop at an error."""
    sys.stderr.write("vlmfix " + " ".join(command) + "\n")
    if status := vlmfix(list(command)):
        raise SystemExit(status)


def measure(model: str, options: argparse.Namespace) -> list[str]:
    """Calibrate and evaluate on one model, and return the rows of the table."""
    folder = options.out / model
    folder.mkdir(parents=True, exist_ok=True)
    own = [] if model == "tiny" else ["--model", model]
    recipe = folder / "verify.json"
    if not recipe.is_file():
        run(["calibrate", "verify", *own, "--limit", str(options.calibrate), "--out", str(recipe)])
    rows = []
    for split in SPLITS:
        others = [] if options.alone else list(OTHERS[model])
        strengths = ["--set", *STRENGTHS[model]] if STRENGTHS[model] and others else []
        command = ["eval", *own, "--benchmark", "chair", "--split", split, "--limit", str(options.limit)]
        command += ["--method", str(recipe), *others, *strengths, "--out", str(folder / split)]
        run(command)
        results = json.loads((folder / split / "results.json").read_text(encoding="utf-8"))
        rows += [row_of(f"{model} {split}", each, results) for each in results["methods"] if each["role"] != "control"]
    return rows


def row_of(name: str, method: dict[str, Any], results: dict[str, Any]) -> str:
    """Return a method's row: figures, differences to none, and CHAIR_i against early stop."""
    chair, parts = method["chair"], [name, f"`{method['label']}`"]
    for key in ("chair_s", "chair_i", "recall", "f1"):
        change = next((d for d in _differences(method) if d[0] == key), None)
        parts.append(f"{100 * chair['summary'][key]:.1f}" + (f" ({_signed(change[1])})" if change else ""))
    parts.append(f"{chair['summary']['length_words']:.1f}")
    parts.append(f"{100 * chair['text_quality']['summary']['repetition']:.1f}")
    parts.append(f"{chair['seconds']:.0f}")
    against = [
        line
        for line in results["controls"]
        if line["method"] == method["label"] and line["control"] == "early stop" and line["metric"] == "chair.chair_i"
    ]
    parts.append(_signed(against[0]["difference"]) if against else "")
    return "| " + " | ".join(parts) + " |"


def _differences(method: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    found = method.get("differences") or {}
    return [(key.rpartition(".")[2], value) for key, value in found.items() if isinstance(value, dict)]


def _signed(difference: dict[str, Any]) -> str:
    low, high = (f"{100 * difference[end]:+.1f}" for end in ("low", "high"))
    return f"{100 * difference['estimate']:+.1f} [{low}, {high}]"


def main() -> None:
    """Measure as asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["tiny", "smol"], choices=["tiny", "smol"])
    parser.add_argument("--limit", type=int, default=300, help="images of a split (default: 300)")
    parser.add_argument("--calibrate", type=int, default=300, help="images to calibrate on (default: 300)")
    parser.add_argument("--alone", action="store_true", help="no methods beside it")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where runs and the table go")
    options = parser.parse_args()
    rows = [row for model in options.models for row in measure(model, options)]
    text = "\n".join([*HEAD, *rows]) + "\n"
    (options.out / "table.md").write_text(text, encoding="utf-8")
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
