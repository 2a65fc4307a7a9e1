"""Measure self-verification on the embedded models: calibrate it, evaluate it beside other methods, print the table.

    python scripts/verify_bars.py --out runs/verify                        # all of it: about half an hour on one core
    python scripts/verify_bars.py --models tiny --limit 100 --out /tmp/v   # a look
    python scripts/verify_bars.py --models tiny --together --out /tmp/v    # with VHR on the same model, and alone

The weights come from ``--calibrate`` scenes of the calibration split (0: from the model's recipe); held-out scenes are
read once they stand. Early stop is matched to the method's recall again in every resample of the images. *Faults* is
the share of captions that break a rule of ``grammar.py``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import grammar

from vlmfix.cli import main as vlmfix
from vlmfix.evals.data.coco import load_image
from vlmfix.evals.options import EvalOptions
from vlmfix.evals.run.answering import load_run_model
from vlmfix.evals.run.generate import Answerer, EncodedBatch, Generator
from vlmfix.evals.run.plan import plan_run
from vlmfix.evals.stats.bootstrap import interval_dict
from vlmfix.observe.prompts import PromptBuilder

SPLITS = ("heldout", "heldout2")
OTHERS = {"tiny": ("vhr", "pai", "vaf", "iat"), "smol": ("vhr", "pai", "vaf")}
"""Methods on attention, at the strengths of the model's recipe or their gentlest published ones."""
STRENGTHS = {"tiny": (), "smol": ("vhr.alpha=1.2", "pai.alpha=0.2")}
HEAD = (
    "| model, split | method | CHAIR_s | CHAIR_i | recall | F1 | words | rep-4 | faults | seconds | to early stop |",
    "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
)
HEAD_TOGETHER = (
    "| split, methods | CHAIR_s | CHAIR_i | recall | F1 | words | faults |",
    "|---|--:|--:|--:|--:|--:|--:|",
)
FIGURES = ("chair_s", "chair_i", "recall", "f1", "length_words")


def run(command: Sequence[str]) -> None:
    """Run a verb, and stop at an error."""
    sys.stderr.write("vlmfix " + " ".join(command) + "\n")
    if status := vlmfix(list(command)):
        raise SystemExit(status)


def calibrated(model: str, options: argparse.Namespace) -> str:
    """Return the recipe with the weights of a model, which are learned unless they are there."""
    if not options.calibrate:
        return "verify"
    recipe = options.out / model / "verify.json"
    recipe.parent.mkdir(parents=True, exist_ok=True)
    if not recipe.is_file():
        run(["calibrate", "verify", "--model", model, "--limit", str(options.calibrate), "--out", str(recipe)])
    return str(recipe)


def measure(model: str, options: argparse.Namespace) -> list[str]:
    """Calibrate and evaluate on one model, and return the rows of the table."""
    folder, rows = options.out / model, []
    for split in options.splits:
        others = [] if options.alone else list(OTHERS[model])
        strengths = ["--set", *STRENGTHS[model]] if STRENGTHS[model] and others else []
        command = ["eval", "--model", model, "--benchmark", "chair", "--split", split, "--limit", str(options.limit)]
        command += ["--prompt", options.prompt] if options.prompt else []
        command += ["--method", calibrated(model, options), *others, *strengths, "--out", str(folder / split)]
        run(command)
        results = json.loads((folder / split / "results.json").read_text(encoding="utf-8"))
        texts = grammar.captions_of(folder / split / "answers.jsonl")
        for each in (each for each in results["methods"] if each["role"] != "control"):
            rows.append(row_of(f"{model} {split}", each, results, faulty(texts[each["label"]])))
    return rows


def faulty(captions: Sequence[str]) -> str:
    """Return the share of captions that break a rule of grammar."""
    count, broken, _ = grammar.share(captions)
    return f"{100 * broken / count:.1f}"


def row_of(name: str, method: dict[str, Any], results: dict[str, Any], faults: str) -> str:
    """Return a method's row: figures, differences to none, and CHAIR_i against early stop."""
    chair, parts = method["chair"], [name, f"`{method['label']}`"]
    for key in ("chair_s", "chair_i", "recall", "f1"):
        change = next((d for d in _differences(method) if d[0] == key), None)
        parts.append(f"{100 * chair['summary'][key]:.1f}" + (f" ({_signed(change[1])})" if change else ""))
    parts.append(f"{chair['summary']['length_words']:.1f}")
    parts.append(f"{100 * chair['text_quality']['summary']['repetition']:.1f}")
    parts += [faults, f"{chair['seconds']:.0f}"]
    against = [
        line
        for line in results["controls"]
        if line["method"] == method["label"] and line["control"] == "early stop" and line["metric"] == "chair.chair_i"
    ]
    parts.append(_signed(against[0]["difference"]) if against else "")
    return "| " + " | ".join(parts) + " |"


def together(model: str, options: argparse.Namespace) -> list[str]:
    """Evaluate VHR and verification alone and on one model, and return what the one adds to the other."""
    rows = []
    for split in options.splits:
        methods = ("vhr", calibrated(model, options))
        asked = EvalOptions(
            model=model, benchmarks=("chair",), split=split, limit=options.limit, methods=methods, prompt=options.prompt
        )
        plan = plan_run(asked)
        by_label = {each.label: each.build() for each in plan.methods if each.label in ("vhr", "verify")}
        vhr, verify = by_label["vhr"], by_label["verify"]
        rows += compared(plan, split, {"none": None, "vhr": [vhr], "verify": [verify], "vhr + verify": [vhr, verify]})
    return rows


def compared(plan: Any, split: str, methods: dict[str, Any]) -> list[str]:
    """Return a row per combination of methods: its figures, and their differences to the rows before it."""
    (task,) = plan.tasks.tasks
    generator = Generator(load_run_model(plan), plan.source.processor)
    answerer, tables, faults = Answerer(generator), {}, {}
    prompt = PromptBuilder(plan.source.processor)(task.samples[0].question)
    for label, each in methods.items():
        answers = {}
        for start in range(0, len(task.samples), plan.batch_size):
            samples = task.samples[start : start + plan.batch_size]
            batch = EncodedBatch(generator, [prompt] * len(samples), [load_image(s.path) for s in samples])
            found = answerer.answer(batch, label, each, "text", task.max_new_tokens)
            answers |= {sample.key: answer for sample, answer in zip(samples, found, strict=True)}
        tables[label], faults[label] = task.score(answers), faulty([answer.text for answer in answers.values()])
    rows = []
    figures = {name: task.figure(name).statistic for name in FIGURES}
    for label, table in tables.items():
        values = [f"{(1 if name == 'length_words' else 100) * f.of(table):.1f}" for name, f in figures.items()]
        rows.append(f"| {split} `{label}` | " + " | ".join([*values, faults[label]]) + " |")
        for other in [other for other in tables if other != label and (other == "none" or other in label.split(" + "))]:
            changes = [
                _signed(interval_dict(f.difference(table, tables[other])), 1 if name == "length_words" else 100)
                for name, f in figures.items()
            ]
            rows.append(f"| - `{other}` | " + " | ".join(changes) + " | |")
    return rows


def _differences(method: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    found = method.get("differences") or {}
    return [(key.rpartition(".")[2], value) for key, value in found.items() if isinstance(value, dict)]


def _signed(difference: dict[str, Any], scale: float = 100) -> str:
    low, high = (f"{scale * difference[end]:+.1f}" for end in ("low", "high"))
    return f"{scale * difference['estimate']:+.1f} [{low}, {high}]"


def main() -> None:
    """Measure as asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["tiny", "smol"], choices=["tiny", "smol"])
    parser.add_argument("--limit", type=int, default=300, help="images of a split (default: 300)")
    parser.add_argument(
        "--calibrate", type=int, default=300, help="images to calibrate on (default: 300; 0: its recipe)"
    )
    parser.add_argument("--splits", nargs="+", default=list(SPLITS), choices=SPLITS, help="default: both")
    parser.add_argument("--prompt", help="what captions are asked for with (default: as vlmfix eval has it)")
    parser.add_argument("--alone", action="store_true", help="no methods beside it")
    parser.add_argument("--together", action="store_true", help="VHR and verification, alone and on one model")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where runs and the table go")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    head, rows_of = (HEAD_TOGETHER, together) if options.together else (HEAD, measure)
    rows = [row for model in options.models for row in rows_of(model, options)]
    text = "\n".join([*head, *rows]) + "\n"
    (options.out / "table.md").write_text(text, encoding="utf-8")
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
