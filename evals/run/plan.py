"""What a run is before any weights are loaded: its methods, questions, settings and folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vlmfix.errors import DataError, VlmfixError
from vlmfix.files import read_json

from ..benchmarks.registry import Tasks, make_tasks
from ..data.write import digest, write_json
from ..options import EvalOptions
from .generate import PromptBuilder
from .methods import MethodSpec, expand_all, load_recipe, plan_methods, recipe_entries, skipped_notes
from .models import ModelSource, find_model, resolve_device, resolve_dtype
from .provenance import SCHEMA_VERSION, differing_settings, run_name, versions

RUNS = Path("runs")


ANSWERS = "answers.jsonl"


CONFIG = "config.json"


@dataclass(frozen=True)
class EvalRun:
    """A planned run.

    Attributes:
        options: As typed.
        methods: Rows of the result table, ``none`` first.
        source: The model, not loaded.
        tasks: What is asked.
        settings: Everything that identifies the run.
        device: Device of the model.
        batch_size: Samples per batch.
        folder: Run folder.
        notes: What the reader must know, for the report.
    """

    options: EvalOptions
    methods: tuple[MethodSpec, ...]
    source: ModelSource
    tasks: Tasks
    settings: dict[str, Any]
    device: str
    batch_size: int
    folder: Path
    notes: tuple[str, ...]

    @property
    def total(self) -> int:
        """Number of answers of the whole run."""
        return len(self.methods) * sum(1 for _ in self.tasks.samples())


def plan_run(options: EvalOptions, methods: Sequence[MethodSpec] | None = None) -> EvalRun:
    """Resolve the options into a run without loading any weights.

    Args:
        options: As typed.
        methods: The rows, the baseline first; by default what the options name, with controls.

    Raises:
        VlmfixError: Something the run needs is missing or contradictory; nothing was written.
    """
    from .. import testbed

    notes: list[str] = []
    recipe = None
    if options.model is None:
        recipe = load_recipe(testbed.RECIPE)
        if recipe is None:
            notes.append(
                "the testbed has no recipe file: the methods run at their defaults, not at calibrated strengths"
            )
        else:
            notes.append(
                f"method strengths are the testbed's recipe, chosen on {recipe.get('chosen_on', 'unknown data')}"
            )
    source = find_model(testbed.MODEL_DIR, name="testbed") if options.model is None else find_model(options.model)
    if methods is None:
        names, skipped = expand_all(options.methods, source.config, recipe_entries(recipe))
        methods = plan_methods(replace(options, methods=names), recipe)
        notes += skipped_notes(skipped)
    tasks = make_tasks(options)
    first = next(tasks.samples())
    PromptBuilder(source.processor, use_template=options.chat_template)(first.question, image=first.path is not None)
    device = resolve_device(options.device)
    settings = {
        "schema_version": SCHEMA_VERSION,
        "model": {
            **source.identity,
            "dtype": resolve_dtype(options.dtype, device, source.config),
            "attn_implementation": options.attn_implementation or "default",
            "chat_template": digest(source.processor.chat_template) if options.chat_template else None,
        },
        "methods": {spec.label: dict(spec.params) for spec in methods},
        "decoding": {"do_sample": False, "num_beams": 1},
        **tasks.settings(),
        "seed": options.seed,
        "versions": versions(),
    }
    settings = json.loads(json.dumps(settings))
    batch_size = options.batch_size or (64 if options.model is None else 8)
    folder = options.out or RUNS / run_name(source.name, settings)
    return EvalRun(options, tuple(methods), source, tasks, settings, device, batch_size, folder, (*notes, *tasks.notes))


def with_methods(run: EvalRun, methods: Sequence[MethodSpec]) -> EvalRun:
    """The same run with other rows, the baseline first."""
    params = {spec.label: dict(spec.params) for spec in methods}
    return replace(run, methods=tuple(methods), settings={**run.settings, "methods": params})


def as_it_was(run: EvalRun) -> EvalRun:
    """A planned run with the versions of the answers in its folder, so that these are found and scored again.

    Raises:
        VlmfixError: The folder holds no run.
    """
    if not (run.folder / CONFIG).is_file():
        raise VlmfixError(f"--rescore: {run.folder} holds no run; name its folder with --out DIR")
    old = read_config(run.folder, remedy="name another folder with --out DIR")["settings"].get("versions", {})
    changed = [f"{name} {value}" for name, value in old.items() if run.settings["versions"].get(name) != value]
    note = f"the answers come from other versions ({', '.join(changed)}) than those that scored them"
    return replace(run, settings={**run.settings, "versions": old}, notes=(*run.notes, *([note] if changed else [])))


def check_folder(run: EvalRun, *, any_methods: bool = False) -> None:
    """Make sure that what the run folder holds belongs to this run.

    Args:
        run: The run.
        any_methods: Whether it may have been with other rows.

    Raises:
        VlmfixError: It holds the run of another configuration (the message lists what differs), or is not a run folder.
    """
    answers = run.folder / ANSWERS
    if run.folder.exists() and not run.folder.is_dir():
        raise VlmfixError(f"{run.folder} is a file; choose another folder with --out DIR")
    if not run.options.resume:
        return
    if (run.folder / CONFIG).is_file():
        old = read_config(run.folder)["settings"]
        if run.options.rescore:
            old = _scored_as(old, run)
        differing = differing_settings(
            {**old, "methods": run.settings["methods"]} if any_methods else old, run.settings
        )
        if differing:
            raise VlmfixError(
                f"{run.folder} holds a run with other settings; choose another folder with --out DIR, or type "
                "--no-resume to throw its answers away. Differences:\n  " + "\n  ".join(differing[:12])
            )
    elif answers.is_file() and answers.stat().st_size:
        raise VlmfixError(f"{run.folder} has answers but no config.json; choose --out DIR or --no-resume")


def _scored_as(old: Mapping[str, Any], run: EvalRun) -> dict[str, Any]:
    """Stored settings with those of a run for what only decides how answers are scored."""
    changed = dict(old)
    for task in run.tasks.tasks:
        if task.name in changed:
            changed[task.name] = {
                **changed[task.name],
                **{name: run.settings[task.name][name] for name in task.scoring},
            }
    return changed


def read_config(folder: Path, *, remedy: str = "choose --out DIR or --no-resume") -> dict[str, Any]:
    """What :func:`write_config` wrote into a run folder.

    Args:
        folder: The run folder.
        remedy: What to type if that is something else.

    Raises:
        DataError: It is missing, or something else.
    """
    config = folder / CONFIG
    found = read_json(config, what="configuration of a run", remedy=remedy)
    if not isinstance(found, dict) or not isinstance(found.get("settings"), dict):
        raise DataError(f"{config} is not the configuration of a run (it has no settings); {remedy}")
    return found


def write_config(run: EvalRun, **more: Any) -> None:
    """Write ``config.json``: what identifies the run, and what is worth knowing beside that."""
    head = {"model": run.source.name, "data": run.tasks.description, "notes": list(run.notes)}
    write_json(run.folder / CONFIG, {**head, "settings": run.settings, **more})
