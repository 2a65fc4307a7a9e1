#!/usr/bin/env python
"""Chooses an embedded model's method strengths on its calibration split and writes its recipe.json.

    python scripts/calibrate_testbed.py                  # evals/testbed/recipe.json
    python scripts/calibrate_testbed.py --model smol     # evals/testbed/smol/recipe.json; 15 minutes on one core
    python scripts/calibrate_testbed.py --model smol --more --out DIR    # methods whose measurements fill files
    python scripts/calibrate_testbed.py --model smol-seed1

The rule was fixed before any setting was tried, and is the same for all methods: of the settings whose text is whole
and whose recall is at most one point below that of the unpatched model, the one with the lowest CHAIR_i; of equals, the
first. A text is whole if repetition (rep-4) is at most two points above the unpatched model's and the share of captions
that run into the token limit at most five. Where no setting is left, the one of whole text that loses the least recall
is taken, and the recipe says so. The held-out splits are never looked at. The whole grid goes into the recipe file, so
that nobody has to guess how much was tried.

Heads, thresholds and weights are learned first (``vlmfix calibrate``), also on scenes of the calibration split. What
some methods learn is too much for a recipe in the package (directions of every layer, statistics of every head):
``--more`` writes a file for each of these to the folder ``--out``, which ``vlmfix eval --method`` takes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmfix.cli import main as vlmfix_command
from vlmfix.evals.evaluate import evaluate
from vlmfix.evals.options import EvalOptions
from vlmfix.evals.run.methods import method_specs, recipe_of_one
from vlmfix.evals.testbed import MODELS, OF_SMOL, RECIPES
from vlmfix.methods.registry import make_method

MAX_RECALL_LOSS = 0.01
MAX_MORE_REPETITION = 0.02
MAX_MORE_CUT_OFF = 0.05

Grid = Mapping[str, Sequence[Mapping[str, Any]]]
"""The settings of each method, the gentlest first."""


def steps(key: str, *values: float, **fixed: Any) -> list[dict[str, Any]]:
    """The settings of a method that differ in one parameter."""
    return [{key: value, **fixed} for value in values]


@dataclass(frozen=True)
class Plan:
    """What is tried on a model.

    Attributes:
        limit: Scenes of the calibration split that settings are compared on.
        learned: Methods that are calibrated first, and on how many scenes.
        grids: Settings; each grid is one run with its own ``none``.
        prompt: What captions are asked for with; None as ``vlmfix eval`` has it.
    """

    limit: int
    learned: Mapping[str, int]
    grids: Sequence[Grid]
    prompt: str | None = None


VHR_STRENGTHS = (1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.8, 2.0)
PLANS = {
    "tiny": Plan(
        500,
        {},
        [
            {
                # What methods/vhr.py leaves open, each choice tried at every strength. The first is the default.
                "vhr": [
                    setting
                    for variant in ({}, {"outliers": False}, {"layers": "0:"})
                    for setting in steps("alpha", *VHR_STRENGTHS, **variant)
                ],
                "var": [{}],
            }
        ],
    ),
    "smol": Plan(
        48,
        {"var": 60, "adhh": 6, "act": 2, "verify": 120},
        [
            {
                "vhr": steps("alpha", 1.05, 1.1, 1.2, 1.3, 1.5),
                "var": steps("recycle", 0.3, 0.6),
                "pai": steps("alpha", 0.1, 0.2, 0.35),
                "spin": steps("keep", 0.95, 0.85),
                "mma": steps("gamma", 0.1, 0.3),
                "guidance": steps("gamma", 1.1, 1.3),
                "vcd": steps("alpha", 0.1, 0.5),
                "verify": [{}],
            },
            {
                "act": steps("beta", 0.7, 0.4),
                "adhh": steps("tau", 0.7, 0.4),
            },
        ],
        "Describe the image.",
    ),
    "smol, more": Plan(
        48,
        {"adaiat": 24, "allpath": 8, "iri": 2, "maskcd": 60, "vti": 40},
        [
            {
                "adaiat": steps("alpha", 2.0, 6.0),
                "allpath": [{"up": 1.2, "down": 0.8}, {"up": 2.0, "down": 0.0}],
                "iri": [{"lambda_a": 0.08, "lambda_m": 0.05}, {"lambda_a": 0.26, "lambda_m": 0.16}],
                "maskcd": steps("alpha", 0.1, 0.5),
                "vti": [{"alpha_text": 0.3, "alpha_image": 0.3}, {"alpha_text": 0.9, "alpha_image": 0.9}],
            }
        ],
        "Describe the image.",
    ),
}


def main(argv: list[str] | None = None) -> int:
    """Learn, run the grids, and write the recipe."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="tiny")
    parser.add_argument("--more", action="store_true", help="smol: methods whose measurements fill files")
    parser.add_argument("--limit", type=int, help="scenes of the calibration split (default: 500, smol 48)")
    parser.add_argument("--out", type=Path, help="default: the model's recipe.json; with --more a folder")
    parser.add_argument("--run", type=Path, default=Path("runs/calibration"), help="run folder, resumed if there")
    args = parser.parse_args(argv)
    if args.more and (args.model not in OF_SMOL or args.out is None):
        parser.error("--more goes with --model smol and a folder --out")
    plan = PLANS[("smol" if args.model in OF_SMOL else args.model) + ", more" * args.more]
    limit = args.limit or plan.limit
    chosen, notes, rows = [], [], []
    for number, grid in enumerate(plan.grids):
        learned = {name: learn(args.model, name, plan.learned, args.run) for name in grid if name in plan.learned}
        notes += [told for name in learned if (told := threshold_note(name, args.run))]
        settings = {
            name: [make_method(name, {**learned.get(name, {}), **values}) for values in grid[name]] for name in grid
        }
        labelled = {f"{name} {place}": each for name, tried in settings.items() for place, each in enumerate(tried)}
        options = EvalOptions(
            model=args.model,
            benchmarks=("chair",),
            split="calibration",
            limit=limit,
            controls=False,
            prompt=plan.prompt,
            out=args.run / str(number),
        )
        found = {row["label"]: summarise(row) for row in evaluate(options, methods=method_specs(labelled))["methods"]}
        rows += [row for label, row in found.items() if number == 0 or label != "none"]
        for name in grid:
            label, note = choose(found, [label for label in labelled if label.split()[0] == name])
            chosen.append(labelled[label].to_dict())
            notes += [f"{name}: {note}"] if note else []
    recipe = {
        "methods": chosen,
        "chosen_on": f"{limit} scenes of the calibration split",
        "rule": "lowest CHAIR_i with recall at most one point below none and whole text",
        "notes": notes,
        "learned_on": {name: f"{count} scenes of the calibration split" for name, count in plan.learned.items()},
        "grid": rows,
    }
    out = args.out or RECIPES[None if args.model == "tiny" else args.model]
    if args.more:
        out.mkdir(parents=True, exist_ok=True)
        for each in chosen:
            (out / f"{each['method']}.json").write_text(json.dumps(each), encoding="utf-8")
        recipe["methods"], out = [each["method"] for each in chosen], out / "grid.json"
    out.write_text(one_entry_a_line(recipe), encoding="utf-8")
    print(f"written: {out}")
    return 0


def learn(model: str, name: str, scenes: Mapping[str, int], folder: Path) -> dict[str, Any]:
    """What ``vlmfix calibrate`` finds for a method; a recipe that is there is read."""
    path = folder / f"{name}.json"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        command = ["calibrate", name, "--model", model, "--limit", str(scenes[name]), "--out", str(path)]
        if vlmfix_command(command) != 0:
            raise SystemExit(f"could not learn: vlmfix {' '.join(command)}")
    return {key: value for key, value in recipe_of_one(str(path)).items() if key != "method"}


def threshold_note(name: str, folder: Path) -> str:
    """How a calibration set a threshold; empty if it kept the method's."""
    options = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))["calibration"]["options"]
    if options.get("threshold_from") != "image tokens":
        return ""
    return (
        f"{name}: sink_threshold={options['sink_threshold']:g} is what {100 * options['sink_share']:g} % of the image "
        f"tokens in a layer reach (by their distribution; the largest is {options['largest_phi']:.1f})"
    )


def choose(rows: Mapping[str, Mapping[str, Any]], labels: Iterable[str]) -> tuple[str, str]:
    """The label that the rule chooses among a method's, and what must be said about it."""
    none = rows["none"]
    tried = list(labels)
    whole = [
        label
        for label in tried
        if rows[label]["rep_4"] <= none["rep_4"] + MAX_MORE_REPETITION
        and rows[label]["cut_off"] <= none["cut_off"] + MAX_MORE_CUT_OFF
    ]
    if not whole:
        return tried[0], "every setting breaks the text; the gentlest is taken"
    kept = [label for label in whole if rows[label]["recall"] >= none["recall"] - MAX_RECALL_LOSS]
    if not kept:
        return max(
            whole, key=lambda label: rows[label]["recall"]
        ), "all settings that keep the text whole lose more than a point of recall; the smallest loss is taken"
    best = min(kept, key=lambda label: rows[label]["chair_i"])
    return best, "" if rows[best]["chair_i"] < none["chair_i"] else "no setting lowers CHAIR_i; the lowest is taken"


def one_entry_a_line(recipe: Mapping[str, Any]) -> str:
    """Return the recipe as JSON that can be read as a table."""

    def spelled(value: Any) -> str:
        if isinstance(value, list) and value and isinstance(value[0], dict):
            return "[\n  " + ",\n  ".join(json.dumps(row) for row in value) + "\n ]"
        return json.dumps(value)

    return "{\n" + ",\n".join(f" {json.dumps(key)}: {spelled(value)}" for key, value in recipe.items()) + "\n}\n"


def summarise(row: Mapping[str, Any]) -> dict[str, Any]:
    """A method's numbers among its parameters, figures of its captions, and differences to none with intervals."""
    params = {key: value for key, value in row["params"].items() if not isinstance(value, (list, dict))}
    figures = {key: round(row["chair"]["summary"][key], 4) for key in ("chair_i", "chair_s", "recall", "f1")}
    quality = row["chair"]["text_quality"]["summary"]
    figures |= {"rep_4": round(quality["repetition"], 4), "cut_off": round(quality["truncation"], 4)}
    changes = {
        key: [round(difference[end], 4) for end in ("estimate", "low", "high")]
        for key, difference in row.get("differences", {}).items()
        if key in ("chair.chair_i", "chair.recall", "chair.f1")
    }
    return {**params, **figures, "minus_none_95": changes}


if __name__ == "__main__":
    raise SystemExit(main())
