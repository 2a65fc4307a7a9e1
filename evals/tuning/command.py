"""``vlmfix tune``: try settings on calibration images, choose by a fixed rule, confirm on images never looked at."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmfix.errors import DataError, VlmfixError
from vlmfix.recipes import load_recipe, make_method, method_from_dict, method_names

from ..answer_plan import AnswerPlan
from ..answering import generate_answers, load_run_model
from ..cache import AnswerLog, write_json
from ..config import EvalOptions, method_specs, parse_settings
from ..planning import ANSWERS, CONFIG, RUNS, EvalRun, check_folder, plan_run, read_config, with_methods, write_config
from ..runner import evaluate
from ..scoring import score_run
from ..shards import Shard
from .report import recipe_text, tuning_table
from .rule import Goal, admitted, choose, goal_of
from .search import Search, space_of
from .splits import make_splits

if TYPE_CHECKING:
    from vlmfix.methods.base import Method

CHOSEN, START = "chosen", "start"


@dataclass(frozen=True)
class TuneOptions:
    """The options of ``vlmfix tune``, as typed; None means that the command chooses.

    Attributes:
        method: A method's name, or a recipe file of one method: where the search starts.
        settings: ``key=value`` parameters that stay fixed.
        ranges: ``key=low:high`` or ``key=a,b``, beside or instead of what the method declares.
        budget: How many settings are tried, the starting one included.
        margin: What a guard may lose, in points.
        confirm: Images to confirm on.
        confirm_ids: File of their ids.
        out: The recipe file.
        run: Everything that evaluation runs have too; its ``out`` is the folder of both runs.
    """

    method: str
    settings: tuple[str, ...]
    ranges: tuple[str, ...]
    budget: int
    margin: float
    confirm: int | None
    confirm_ids: Path | None
    out: Path | None
    run: EvalOptions

    def __post_init__(self) -> None:
        """Refuse values that no search can have."""
        if self.budget < 2:
            raise VlmfixError(f"--budget must be at least 2 (the starting setting is one), got {self.budget}")
        if not 0 <= self.margin <= 100:
            raise VlmfixError(f"--margin is in points, between 0 and 100, got {self.margin}")
        if self.confirm is not None and self.confirm < 1:
            raise VlmfixError(f"--confirm must be at least 1, got {self.confirm}")
        others = sorted(set(self.run.benchmarks) - {"chair", "pope"})
        if others:
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
    if not out.parent.is_dir():
        raise DataError(f"--out {out}: there is no folder {out.parent}; make it first")
    search = Search(start, space, seed=options.run.seed)
    folder = options.run.out or RUNS / f"tune-{start.name}"
    on, off = make_splits(options.run, options.confirm, options.confirm_ids, folder)
    on = replace(on, out=folder / "calibration", controls=False)
    off = replace(off, out=folder / "heldout")
    base = plan_run(on, method_specs({}))
    plan_run(off, method_specs({}))  # What is wrong with the held-out images is found before the search.
    show(f"{base.source.name}: {options.budget} settings of {start.name} on {base.tasks.description}")
    show("searched: " + ", ".join(f"{key} in {_spell(value)}" for key, value in space.items()))
    tried = _try_settings(base, search, options, show)
    baseline, goals = tried.baseline, [goal for _, goal in tried.trials]
    best = choose(goals, baseline, options.margin / 100)
    calibration = evaluate(on, methods=method_specs(tried.labelled()), show=_silent)
    if best is None:
        raise VlmfixError(
            f"none of {len(goals)} settings lowers {baseline.name} below {100 * baseline.hallucination:.1f} while "
            f"losing at most {options.margin:g} points of {' and '.join(baseline.guards)}: nothing was written. The "
            f"settings are in {on.out}/report.md; raise --margin, --budget or --limit, or search elsewhere with --range"
        )
    chosen = tried.trials[best][0]
    show(f"chosen: {chosen!r}; now on {'held-out images' if off.data else 'the held-out split'}")
    rows = {CHOSEN: chosen} if chosen == start else {START: start, CHOSEN: chosen}
    heldout = evaluate(off, methods=method_specs(rows), show=_silent)
    recipe = {
        "methods": [chosen.to_dict()],
        "rule": f"lowest {baseline.name} that loses at most {options.margin:g} points of {', '.join(baseline.guards)}",
        "searched": {key: _spell(value) for key, value in space.items()},
        "command": options.run.command_line,
        "settings_tried": len(goals),
        **recipe_text(calibration, heldout, tried.labels[best], baseline),
    }
    write_json(out, recipe)
    show(tuning_table(recipe))
    show(f"written: {out} (patch(model, {str(out)!r})), {on.out}, {off.out}")
    return recipe


def starting_setting(method: str, fixed: Mapping[str, Any]) -> Method:
    """The method a search starts from: by name, or from a recipe file of one method."""
    if method in method_names() or not method.endswith(".json"):
        return make_method(method, fixed)
    found = load_recipe(method)
    if len(found) != 1:
        raise VlmfixError(f"--method {method}: tune takes one method, the recipe holds {len(found)}")
    return method_from_dict({**found[0].to_dict(), **fixed})


@dataclass
class _Tried:
    """The baseline and every setting with what came of it."""

    baseline: Goal
    trials: list[tuple[Method, Goal]]

    @property
    def labels(self) -> list[str]:
        """Names of the settings in the tables, in the order they were tried."""
        return [f"{number:02d}" for number in range(1, len(self.trials) + 1)]

    def labelled(self) -> dict[str, Method]:
        """The settings by name."""
        return {label: method for label, (method, _) in zip(self.labels, self.trials, strict=True)}


def _try_settings(base: EvalRun, search: Search, options: TuneOptions, show: Callable[[str], None]) -> _Tried:
    """Evaluate setting after setting with one loaded model; answers of an earlier, interrupted run are used again."""
    loaded: list[Any] = []
    shard = Shard.here()

    def answered(run: EvalRun, log: AnswerLog) -> Goal:
        plan = AnswerPlan(run)
        missing = plan.missing(log)
        if missing:
            if not loaded:
                loaded.append(load_run_model(run, shard))
            generate_answers(run, plan, log, missing, shard, model=loaded[0])
        return goal_of(
            score_run(run.tasks, run.methods[-1:], plan.answers(log), decode=str, controls=False)["methods"][0]
        )

    check_folder(base, any_methods=True)
    with AnswerLog(base.folder / ANSWERS, keep=base.options.resume) as log:
        tried = _Tried(answered(base, log), [])
        show(f"none: {_describe(tried.baseline)}")
        for method in search.settings(options.budget):
            tried.trials.append((method, tried.baseline))
            run = with_methods(base, method_specs(tried.labelled()))
            goal = answered(run, log)
            tried.trials[-1] = (method, goal)
            search.tell(method, goal, tried.baseline, options.margin / 100)
            mark = "" if admitted(goal, tried.baseline, options.margin / 100) else "  (loses too much)"
            values = ", ".join(f"{key}={getattr(method, key)!r}" for key in search.space)
            show(f"{tried.labels[-1]}: {_describe(goal)}  {values}{mark}")
    final = with_methods(base, method_specs(tried.labelled()))
    if not (base.folder / CONFIG).is_file() or read_config(base.folder)["settings"] != final.settings:
        write_config(final, runtime=None, resolved=None)  # Nothing was missing, of a run that had tried more.
    return tried


def _describe(goal: Goal) -> str:
    figures = {goal.name: goal.hallucination, **goal.guards}
    return "  ".join(f"{name} {100 * value:5.1f}" for name, value in figures.items())


def _spell(space: Any) -> str:
    if hasattr(space, "values"):
        return "{" + ", ".join(json.dumps(value) for value in space.values) + "}"
    return f"[{space.low:g}, {space.high:g}]" + (" (log)" if space.log else "")


def _silent(line: str) -> None:
    """The tables of both runs stand in their folders."""
