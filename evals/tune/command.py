"""``vlmfix tune``: try settings on calibration images, choose by a fixed rule, confirm on images never looked at."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmfix.errors import VlmfixError
from vlmfix.methods.registry import make_method, method_from_dict
from vlmfix.recipes import parse_settings

from ..benchmarks.chair.text_quality import broken_text
from ..benchmarks.columns import figure_of, value_in
from ..data.thinking import without_traces
from ..data.write import check_parent, write_json
from ..evaluate import evaluate
from ..flags import IMAGES, MODEL, OUTPUT, SCORING, add_verb, option
from ..options import BenchmarkOptions
from ..run.answer_log import AnswerLog
from ..run.answering import generate_answers, load_run_model
from ..run.batches import AnswerPlan
from ..run.folder import ANSWERS, CONFIG, check_folder, read_config, write_config
from ..run.methods import method_specs, recipe_of_one
from ..run.plan import RUNS, EvalRun, plan_run, with_methods
from ..run.shards import Shard
from ..scores.score_run import score_run
from ..tables import difference_cell, interval_cell, number, plain_table
from .search import Goal, Search, admitted, choose, goal_of, space_of
from .splits import make_splits

if TYPE_CHECKING:
    from vlmfix.methods.base import Method


SHOWN = ("chair.chair_i", "chair.chair_s", "chair.recall", "chair.f1", "pope.accuracy", "pope.f1", "pope.yes_ratio")


def recipe_text(
    calibration: Mapping[str, Any], heldout: Mapping[str, Any], label: str, baseline: Goal
) -> dict[str, Any]:
    """Return the part of a recipe that says how its setting did: ``calibration``, ``heldout``, and all settings tried.

    Args:
        calibration: Results of the run that chose.
        heldout: Results of the run that confirms; its row ``chosen`` is the setting.
        label: The chosen row of ``calibration``.
        baseline: The goal without a method.
    """
    return {
        "goal": baseline.name,
        "calibration": _figures(calibration, label),
        "heldout": _figures(heldout, "chosen"),
        "grid": [
            {**row["params"], **{key: value for key in SHOWN if (value := value_in(row, figure_of(key))) is not None}}
            for row in calibration["methods"]
        ],
        "versions": heldout["settings"]["versions"],
        "model": {"name": heldout["model"], **heldout["settings"]["model"]},
    }


def _figures(results: Mapping[str, Any], label: str) -> dict[str, Any]:
    rows = {row["label"]: row for row in results["methods"]}
    own, none = rows[label], results["methods"][0]
    found = {
        key: {"none": value_in(none, figure_of(key)), "value": value, "difference": own["differences"].get(key)}
        for key in SHOWN
        if (value := value_in(own, figure_of(key))) is not None
    }
    return {"data": results["data"], "command": results["command"], "figures": found}


def tuning_table(recipe: Mapping[str, Any]) -> str:
    """Return the chosen setting on both sets of images: figures, paired differences to none, their intervals."""
    rows = [
        ["", "calibration", "", "", "", "held out", "", "", ""],
        ["", *["none", "chosen", "difference", "95 %"] * 2],
    ]
    for key in recipe["heldout"]["figures"]:
        metric = figure_of(key)
        cells: list[str] = []
        for side in ("calibration", "heldout"):
            found = recipe[side]["figures"][key]
            difference = found["difference"]
            cells += [number(found[name], percent=metric.percent) for name in ("none", "value")]
            cells += [cell(difference, percent=metric.percent) for cell in (difference_cell, interval_cell)]
        rows.append([f"{metric.benchmark.upper()} {metric.title.removeprefix('CHAIR_')}", *cells])
    tried = recipe["settings_tried"]
    return (
        f"{plain_table(rows)}\n\nThe calibration side is the best of {tried} settings on these very images, so it "
        "flatters; the held-out side is what to expect."
    )


CHOSEN, START = "chosen", "start"


BENCHMARKS = ("chair", "pope")
"""Those that the rule reads."""


@dataclass(frozen=True, kw_only=True)
class TuneOptions(BenchmarkOptions):
    """The options of ``vlmfix tune``; ``limit`` images to choose on, ``out`` the recipe."""

    method: str = option("a method, or a recipe file to start from", group=MODEL, default=MISSING, metavar="NAME")
    ranges: tuple[str, ...] = option(
        "what to search: alpha=1.1:2.0 or layers=null,0: (default: what the method declares)",
        group=MODEL,
        name="--range",
        default=(),
        metavar="KEY=RANGE",
    )
    budget: int = option(
        "settings to try, the one it starts from included", group=MODEL, default=20, metavar="N", at_least=2
    )
    margin: float = option("what recall may lose, in points", group=SCORING, default=1.0, metavar="POINTS")
    benchmarks: tuple[str, ...] = option(
        "benchmarks to ask: chair, pope", group=IMAGES, name="--benchmark", default=("chair",), metavar="NAME"
    )
    confirm: int | None = option(
        "images to confirm on (default: 500; on the testbed 400, 200 for POPE)", group=IMAGES, metavar="N", at_least=1
    )
    confirm_ids: Path | None = option("their ids, beside --ids for those to choose on", group=IMAGES, metavar="FILE")
    out: Path | None = option("recipe to write (default: METHOD-tuned.json)", group=OUTPUT, metavar="FILE")
    folder: Path | None = option("folder of both runs (default: runs/tune-METHOD)", group=OUTPUT, metavar="DIR")

    def __post_init__(self) -> None:
        """Refuse a margin that is no number of points, and benchmarks that have no rule."""
        super().__post_init__()
        if not 0 <= self.margin <= 100:
            raise VlmfixError(f"--margin is in points, between 0 and 100, got {self.margin}")
        if others := sorted({*self.benchmarks} - {*BENCHMARKS}):
            raise VlmfixError(f"tune reads chair and pope, not {', '.join(others)}")


def tune(options: TuneOptions, show: Callable[[str], None]) -> dict[str, Any]:
    """Tune a method and write its recipe.

    Returns:
        The recipe.

    Raises:
        VlmfixError: Something is missing or contradictory, or no setting lowers hallucination within the margin (the
            recipe is not written; the runs are kept).
    """
    if Shard.here().world > 1:
        raise VlmfixError("tune runs in one process; start it without torchrun or accelerate launch")
    fixed = parse_settings(options.settings)
    start = starting_setting(options.method, fixed)
    space = space_of(start, fixed, options.ranges)
    out = options.out or Path(f"{start.name}-tuned.json")
    check_parent(out)
    search = Search(start, space, seed=options.seed)
    folder = options.folder or RUNS / f"tune-{start.name}"
    on, off = make_splits(options.as_eval(settings=()), options.confirm, options.confirm_ids, folder)
    on = replace(on, out=folder / "calibration", controls=False)
    off = replace(off, out=folder / "heldout")
    base = plan_run(on, method_specs({}))
    plan_run(off, method_specs({}))  # What is wrong with the held-out images is found before the search.
    show(f"{base.source.name}: {options.budget} settings of {start.name} on {base.tasks.description}")
    show("searched: " + ", ".join(f"{key} in {_spell(value)}" for key, value in space.items()))
    baseline, tried = _try_settings(base, search, options, show)
    goals = {label: goal for label, (_, goal) in tried.items()}
    best = choose(list(goals.values()), baseline, options.margin / 100)
    calibration = evaluate(on, methods=method_specs(_methods(tried)), show=_silent)
    rule = f"loses at most {options.margin:g} points of {' and '.join(baseline.guards)}"
    rule += " and keeps its text whole" if baseline.text else ""
    if best is None:
        raise VlmfixError(
            f"none of {len(goals)} settings lowers {baseline.name} below {100 * baseline.hallucination:.1f} and {rule}"
            f": nothing was written. The settings are in {on.out}/report.md; raise --margin, --budget or --limit, or "
            "search elsewhere with --range"
        )
    label = list(tried)[best]
    chosen = tried[label][0]
    show(f"chosen: {chosen!r}; now on {'held-out images' if off.data else 'the held-out split'}")
    rows = {CHOSEN: chosen} if chosen == start else {START: start, CHOSEN: chosen}
    heldout = evaluate(off, methods=method_specs(rows), show=_silent)
    recipe = {
        "methods": [chosen.to_dict()],
        "rule": f"lowest {baseline.name} that {rule}",
        "searched": {key: _spell(value) for key, value in space.items()},
        "command": options.command_line,
        "settings_tried": len(goals),
        **recipe_text(calibration, heldout, label, baseline),
    }
    write_json(out, recipe)
    show(tuning_table(recipe))
    show(f"written: {out} (patch(model, {str(out)!r})), {on.out}, {off.out}")
    return recipe


def starting_setting(method: str, fixed: Mapping[str, Any]) -> Method:
    """Return the method a search starts from: by name, or from a recipe file of one method."""
    if not method.endswith(".json"):
        return make_method(method, fixed)
    return method_from_dict({**recipe_of_one(method), **fixed})


def _try_settings(
    base: EvalRun, search: Search, options: TuneOptions, show: Callable[[str], None]
) -> tuple[Goal, dict[str, tuple[Method, Goal]]]:
    """Evaluate setting after setting with one loaded model; answers of an earlier, interrupted run are used again.

    Returns:
        The goal without a method; and every setting with its goal, by its label in the tables, as they were tried.
    """
    tried: dict[str, tuple[Method, Goal]] = {}
    loaded: list[Any] = []
    margin = options.margin / 100

    def answered(methods: Mapping[str, Method]) -> Goal:
        """The goal of the last method, whose answers are generated if they are not in the log."""
        run = with_methods(base, method_specs(methods))
        plan = AnswerPlan(run)
        missing = plan.missing(log)
        if missing:
            if not loaded:
                loaded.append(load_run_model(run))
            generate_answers(plan, log, missing, model=loaded[0])
        answers, _ = without_traces(plan.answers(log))
        scores = score_run(run.tasks, run.methods[-1:], answers, decode=str, controls=False)
        return goal_of(scores["methods"][0])

    check_folder(base, any_methods=True)
    with AnswerLog(base.folder / ANSWERS, keep=base.options.resume) as log:
        baseline = answered({})
        show(f"none: {_describe(baseline)}")
        for method in search.settings(options.budget):
            label = f"{len(tried) + 1:02d}"
            goal = answered({**_methods(tried), label: method})
            tried[label] = method, goal
            search.tell(method, goal, baseline, margin)
            broken = broken_text(goal.rises(baseline))
            mark = "" if admitted(goal, baseline, margin) else "  (loses too much)"
            mark = f"  (its text breaks: {', '.join(broken)})" if broken else mark
            values = ", ".join(f"{key}={getattr(method, key)!r}" for key in search.space)
            show(f"{label}: {_describe(goal)}  {values}{mark}")
    final = with_methods(base, method_specs(_methods(tried)))
    if not (base.folder / CONFIG).is_file() or read_config(base.folder)["settings"] != final.settings:
        write_config(final, runtime=None, resolved=None)  # Nothing was missing, of a run that had tried more.
    return baseline, tried


def _methods(tried: Mapping[str, tuple[Method, Goal]]) -> dict[str, Method]:
    return {label: method for label, (method, _) in tried.items()}


def _describe(goal: Goal) -> str:
    figures = {goal.name: goal.hallucination, **goal.guards}
    return "  ".join(f"{name} {100 * value:5.1f}" for name, value in figures.items())


def _spell(space: Any) -> str:
    if hasattr(space, "values"):
        return "{" + ", ".join(json.dumps(value) for value in space.values) + "}"
    return f"[{space.low:g}, {space.high:g}]" + (" (log)" if space.log else "")


def _silent(line: str) -> None:
    """The tables of both runs stand in their folders."""


_ABOUT = """\
Search a method's parameters on calibration images, choose by a fixed rule, confirm on held-out images, and write a
recipe with both figures side by side.

  vlmfix tune --method vhr                         on the embedded testbed: calibration split, then the held-out one
  vlmfix tune --method pai --benchmark pope chair --budget 30 --range alpha=0.02:0.5
  vlmfix tune --method act.json --model llava-hf/llava-1.5-7b-hf --data COCO_DIR --limit 200 --confirm 500

Of the settings tried, the one with the lowest CHAIR_i wins whose recall (and POPE accuracy, if asked) falls by at most
the margin, and whose text does not break (repeated runs of four words, loops, captions cut off: none rises by more than
5 points); with POPE alone, the lowest share of absent objects confirmed, at its recall. An interrupted search goes on
when the same command is typed again. vlmfix.patch(model, "vhr-tuned.json") takes the recipe.
"""


def add_tune(verbs: Any) -> argparse.ArgumentParser:
    """Add the verb to a command line's subparsers; import nothing heavy."""
    return add_verb(
        verbs,
        "tune",
        TuneOptions,
        about=_ABOUT,
        help_of={
            "settings": "parameters that stay fixed",
            "limit": "images to choose on, drawn by seed (default: 200)",
            "resume": "go on with what an interrupted search left in the folder",
        },
        choices={"benchmarks": BENCHMARKS},
    )


def run(options: argparse.Namespace, *, show: Callable[[str], None]) -> None:
    """Tune as asked."""
    tune(TuneOptions.from_arguments(options), show)
