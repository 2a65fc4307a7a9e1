#!/usr/bin/env python
"""The table of methods on ``smol``: captions of 200 scenes and questions about 60, on both held-out splits.

    python scripts/smol_table.py --out DIR              # everything; goes on where it stopped
    python scripts/smol_table.py --out DIR --scenes 10 --question-scenes 4     # a look
    python scripts/smol_table.py --out DIR --model smol-seed1 --runs captions heads      # the other seed, captions only

Strengths are those of the model's recipe, chosen on the calibration split. Captions (CHAIR, with the early-stop control
and VHR's head controls) and questions (POPE, and count, colour, height and relation) are separate runs of ``vlmfix
eval``, whose commands are printed. The table's figures go to ``DIR/figures.json``, which ``evals/testbed/smol`` keeps.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlmfix.cli import main as vlmfix_command
from vlmfix.evals import testbed
from vlmfix.evals.compare.compare import compare_runs
from vlmfix.evals.scores.counts import load_run
from vlmfix.evals.testbed import prepare
from vlmfix.evals.testbed.export import file_name
from vlmfix.evals.testbed.scenes import image_id, make_scene
from vlmfix.evals.testbed.smol.facts import things
from vlmfix.evals.testbed.smol.questions import other_questions

SPLITS = ("heldout", "heldout2")
METHODS = ("vhr", "var", "pai", "spin", "mma", "guidance", "vcd", "verify")
HEAD_METHODS = ("act", "adhh")
"""Methods that must be told heads; their captions are a run of their own, beside its own ``none``."""
RUNS = ("captions", "heads", "questions")
KINDS = ("count", "colour", "row", "relation")
"""Questions beyond existence whose answer this model can know."""

QUESTIONS_OF_A_SCENE = 4
PROMPT = "Describe the image."
"""Captions of a few sentences; one ``in detail`` takes 2.5 times as long."""


def write_questions(split: str, scenes: int, path: Path) -> None:
    """Write questions beyond existence about a split's first scenes, as the benchmark ``custom`` reads them."""
    folder = prepare(split, scenes)
    rows = []
    for index in range(scenes):
        scene = make_scene(image_id(split, index))
        image = folder / "val2014" / file_name(scene.image_id)
        rng = random.Random(f"questions {scene.image_id}")
        for asked in other_questions(scene.kind, things(scene), rng, QUESTIONS_OF_A_SCENE, KINDS):
            rows.append({"image": str(image), "question": asked.text, "answer": asked.answer, "kind": asked.kind})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def evaluate(options: argparse.Namespace, run: str, split: str) -> None:
    """Run ``vlmfix eval`` on scenes of a split, or go on with it."""
    out = options.out / split / run
    if run == "questions":
        asked = options.out / split / "questions.jsonl"
        write_questions(split, options.question_scenes, asked)
        benchmarks, methods, scenes = ["pope", "custom"], [*METHODS, *HEAD_METHODS], options.question_scenes
        more = ["--benchmark-data", f"custom={asked}"]
    else:
        benchmarks, methods, scenes = ["chair"], METHODS if run == "captions" else HEAD_METHODS, options.scenes
        more = []
    command = ["eval", "--model", options.model, "--split", split, "--limit", str(scenes), "--benchmark", *benchmarks]
    command += ["--method", *methods, "--prompt", PROMPT, *more, "--out", str(out)]
    print("vlmfix " + " ".join(command), flush=True)
    if code := vlmfix_command(command):
        sys.exit(code)


def change(difference: Mapping[str, Any], scale: float = 100) -> list[float]:
    """A difference with its interval, in points."""
    return [round(scale * difference[end], 2) for end in ("estimate", "low", "high")]


def figures_of(folder: Path, runs: Sequence[str] = RUNS) -> dict[str, Any]:
    """What the tables show of a split: rows of the captions and of the questions, and what was run.

    Args:
        folder: Of the split, with the folders of the runs.
        runs: Which, the captions among them.
    """
    found: dict[str, Any] = {}
    for name in runs:
        results = json.loads((folder / name / "results.json").read_text(encoding="utf-8"))
        rows = {row["label"]: _row(row) for row in results["methods"]}
        for line in results["controls"]:
            key = f"{_own_name(line['metric'])} to {line['control']}"
            rows[line["method"]]["controls"][key] = change(line["difference"])
        if name != "questions":
            compared = compare_runs([load_run(folder / "captions"), load_run(folder / name)], against="A:verify")
            for row in (row for row in compared["methods"] if row["run"] == "B"):
                own = rows[row["label"].removeprefix("B:")]
                own |= {"verdict": row["verdict"], "minus_verify": _changes(row.get("differences", {}))}
        found[name] = {"data": results["data"], "versions": results["settings"]["versions"], "rows": rows}
    return found


def _row(row: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {"describe": row["describe"], "role": row["role"], "controls": {}}
    found["minus_none"] = _changes(row.get("differences", {}))
    for name in ("chair", "pope", "custom"):
        if name not in row:
            continue
        part = row[name]
        found[name] = {
            key: round(value if key == "length_words" else 100 * value, 2)
            for key, value in part["summary"].items()
            if value is not None
        }
        found[name] |= {"seconds": round(part["seconds"], 1), "changed": part["changed"], "n": part["asked"]}
        if name == "chair":
            quality = part["text_quality"]
            found[name] |= {key: round(100 * value, 2) for key, value in quality["summary"].items()}
            matched = quality.get("length_matched", {}).get("words", {}).get("chair_i")
            found[name]["chair_i_at_equal_length"] = matched and change(matched["difference"])
        if name == "pope":
            found[name]["splits"] = {
                split: {key: round(100 * part[split]["summary"][key], 2) for key in ("accuracy", "f1", "yes_ratio")}
                for split in part["splits"]
            }
        if name == "custom":
            found[name]["kinds"] = {
                kind: {key: round(value, 2) for key, value in each.items()} for kind, each in part["breakdown"].items()
            }
    return found


def _changes(differences: Mapping[str, Any]) -> dict[str, list[float]]:
    return {
        _own_name(key): change(each, 1 if key.endswith("words") else 100)
        for key, each in differences.items()
        if isinstance(each, Mapping)
    }


def _own_name(key: str) -> str:
    """A figure's name; with its benchmark's for questions beyond existence, whose accuracy is not POPE's."""
    return key if key.startswith("custom.") else key.rpartition(".")[2]


def write_figures(folder: Path, runs: Sequence[str] = RUNS) -> None:
    """Write ``figures.json``, a row a line."""
    found = {split: figures_of(folder / split, runs) for split in SPLITS}
    lines = []
    for split, runs in found.items():
        for name, run in runs.items():
            head = {key: value for key, value in run.items() if key != "rows"}
            rows = ",\n".join(f"   {json.dumps(label)}: {json.dumps(row)}" for label, row in run["rows"].items())
            lines.append(f'  {json.dumps(f"{split} {name}")}: {json.dumps(head)[:-1]}, "rows": {{\n{rows}\n  }}}}')
    (folder / "figures.json").write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def captions_table(figures: Mapping[str, Any], split: str) -> str:
    """The figures of a split's captions, all of them, as Markdown."""
    head = (
        "method", "CHAIR_s ↓", "CHAIR_i ↓", "recall ↑", "F1 ↑", "words", "rep-4", "CHAIR_i at equal length",
        "CHAIR_i to early stop", "CHAIR_i of `verify` to it", "seconds",
    )  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|---|" + "--:|" * (len(head) - 1)]
    for label, row in _caption_rows(figures, split):
        chair, change = row["chair"], row["minus_none"]
        cells = [_name(label, row)]
        cells += [_value(chair[key], change.get(key)) for key in ("chair_s", "chair_i", "recall", "f1")]
        cells += [f"{chair['length_words']:.0f}", f"{chair['repetition']:.1f}"]
        cells += [_signed(chair["chair_i_at_equal_length"]), _signed(row["controls"].get("chair_i to early stop"))]
        against = None if label == "verify" else row["minus_verify"]["chair_i"]
        cells += [_signed(against and [-against[0], -against[2], -against[1]]), f"{chair['seconds']:.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def questions_table(figures: Mapping[str, Any], split: str) -> str:
    """The figures of a split's questions, as Markdown."""
    rows = figures[f"{split} questions"]["rows"]
    pope_splits, kinds = rows["none"]["pope"]["splits"], rows["none"]["custom"]["kinds"]
    head = ["method", "POPE acc. ↑", "F1 ↑", "yes", "AUC ↑", *pope_splits, "acc. to yes bias"]
    head += [f"{kind} (n = {each['n']:.0f})" for kind, each in kinds.items()]
    lines = ["| " + " | ".join([*head, "seconds"]) + " |", "|---|" + "--:|" * len(head)]
    for label, row in rows.items():
        pope, change = row["pope"], row["minus_none"]
        cells = [_name(label, row), _value(pope["accuracy"], change.get("accuracy"))]
        cells += [f"{pope[key]:.1f}" if key in pope else "" for key in ("f1", "yes_ratio", "auc")]
        cells += [f"{each['accuracy']:.1f}" for each in pope["splits"].values()]
        cells += [_signed(row["controls"].get("accuracy to yes bias"))]
        cells += [f"{each['right']:.1f}" for each in row["custom"]["kinds"].values()]
        lines.append("| " + " | ".join([*cells, f"{pope['seconds'] + row['custom']['seconds']:.0f}"]) + " |")
    return "\n".join(lines)


def opening_table(figures: Mapping[str, Any], model: str = "smol") -> str:
    """The figures that README opens with: both splits side by side; a star where the interval excludes 0."""
    shown = {"chair_i": "CHAIR_i ↓", "recall": "recall ↑", "f1": "F1 ↑"}
    head = [f"`{model}`", *(f"{title}, {split}" for split in ("held-out", "held-out 2") for title in shown.values())]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "--:|" * (len(head) - 1)]
    other = dict(_caption_rows(figures, SPLITS[1]))
    for label, row in _caption_rows(figures, SPLITS[0]):
        cells = [_name(label, row)]
        for each in (row, other[label]):
            for key in shown:
                change = each["minus_none"].get(key)
                star = "" if change is None or change[1] <= 0 <= change[2] else "*"
                cells.append(f"{each['chair'][key]:.1f}" + (f" ({change[0]:+.1f}{star})" if change else ""))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _caption_rows(figures: Mapping[str, Any], split: str) -> list[tuple[str, Any]]:
    """The rows of both runs of captions, ``none`` once, ``verify`` last."""
    rows = dict(figures[f"{split} captions"]["rows"])
    rows |= {key: row for key, row in figures[f"{split} heads"]["rows"].items() if row["role"] != "baseline"}
    return sorted(rows.items(), key=lambda each: each[0] == "verify")


def _name(label: str, row: Mapping[str, Any]) -> str:
    controls = {"all": "control: every head", "unselected": "control: the other heads"}
    return controls[label.partition("/")[2]] if row["role"] == "control" else f"`{label}`"


def _value(value: float, change: Sequence[float] | None) -> str:
    return f"{value:.1f}" + (f" ({_signed(change)})" if change else "")


def _signed(change: Sequence[float] | None) -> str:
    return "" if not change else f"{change[0]:+.1f} [{change[1]:+.1f}, {change[2]:+.1f}]"


def main() -> None:
    """Measure as asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=testbed.OF_SMOL, default="smol")
    parser.add_argument("--scenes", type=int, default=200, help="scenes of a split to describe (default: 200)")
    parser.add_argument("--question-scenes", type=int, default=60, help="scenes to ask about (default: 60)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the runs and figures go")
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=RUNS, help="only some (default: all)")
    options = parser.parse_args()
    for run, split in ((run, split) for run in options.runs for split in SPLITS):
        evaluate(options, run, split)
    done = [run for run in RUNS if all((options.out / split / run / "results.json").is_file() for split in SPLITS)]
    if not {"captions", "heads"} <= {*done}:
        return
    write_figures(options.out, done)
    figures = json.loads((options.out / "figures.json").read_text(encoding="utf-8"))
    tables = [opening_table(figures, options.model)]
    shown = (captions_table, questions_table) if "questions" in done else (captions_table,)
    tables += [table(figures, split) for table in shown for split in SPLITS]
    (options.out / "tables.md").write_text("\n\n".join(tables) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
