"""The folder of a run: what identifies the run it holds, and whether another one may go on there.

Comparing runs needs no model, so nothing of it is imported here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmfix.errors import DataError, VlmfixError
from vlmfix.files import read_json

from ..data.write import write_json

if TYPE_CHECKING:
    from .plan import EvalRun

ANSWERS = "answers.jsonl"

CONFIG = "config.json"


def as_it_was(run: EvalRun) -> EvalRun:
    """Return a planned run with the versions of the answers in its folder, so that these are found and scored again.

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
    """Return stored settings with those of a run for what only decides how answers are scored."""
    changed = dict(old)
    for task in run.tasks.tasks:
        if task.name in changed:
            changed[task.name] = changed[task.name] | {name: run.settings[task.name][name] for name in task.scoring}
    return changed


def read_config(folder: Path, *, remedy: str = "choose --out DIR or --no-resume") -> dict[str, Any]:
    """Read what :func:`write_config` wrote into a run folder.

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


def with_batch_note(run: EvalRun) -> EvalRun:
    """Return the run with a note if its folder's answers came in batches of another size, which no key holds."""
    was = last_batch_size(run) if run.options.resume and (run.folder / CONFIG).is_file() else run.batch_size
    if run.options.rescore or was == run.batch_size:
        return run
    note = f"answers that were there came in batches of {was}, new ones in batches of {run.batch_size}"
    return replace(run, notes=(*run.notes, f"{note}: the last digits of their logits may differ"))


def last_batch_size(run: EvalRun) -> int:
    """Return the size of the batches in which answers were generated last."""
    return int((read_config(run.folder).get("runtime") or {}).get("batch_size", run.batch_size))


def differing_settings(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return one line per setting in which two runs differ, nested names joined by dots."""
    return [
        f"{name}: {_clip(old_value)} in the folder, {_clip(new_value)} now"
        for name, old_value, new_value in setting_differences(old, new)
    ]


def setting_differences(old: Any, new: Any, name: str = "") -> Iterable[tuple[str, Any, Any]]:
    """Yield dotted name, old and new value of every setting in which two runs differ; ``"nothing"`` for none."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in sorted({*old, *new}):
            yield from setting_differences(
                old.get(key, "nothing"), new.get(key, "nothing"), f"{name}.{key}" if name else key
            )
    elif _is_list(old) and _is_list(new) and len(old) == len(new):
        for index, (a, b) in enumerate(zip(old, new, strict=True)):
            yield from setting_differences(a, b, f"{name}[{index}]")
    elif old != new:
        yield name, old, new


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _clip(value: Any) -> str:
    text = f"{len(value)} entries" if _is_list(value) and len(value) > 4 else str(value)
    return text if len(text) <= 80 else text[:77] + "..."
