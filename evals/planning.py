"""What a run is before any weights are loaded: its folder, its samples in batches, and the key of every answer."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from types import MappingProxyType
from typing import Any

from vlmfix.errors import DataError, VlmfixError
from vlmfix.textfiles import read_json

from .cache import AnswerLog, digest, write_json
from .config import (
    SCHEMA_VERSION,
    EvalOptions,
    MethodSpec,
    differing_settings,
    load_recipe,
    plan_methods,
    recipe_entries,
    run_name,
    versions,
)
from .every_method import expand_all, skipped_notes
from .generate import PromptBuilder
from .models import ModelSource, find_model, resolve_device, resolve_dtype
from .samples import Answer, Answers, Sample
from .shards import Shard
from .tasks import Tasks, make_tasks

RUNS = Path("runs")
ANSWERS = "answers.jsonl"

#: Answers as the log keeps them, by key.
Records = Mapping[str, Mapping[str, Any]]


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
    from . import testbed

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
    config = run.folder / "config.json"
    if not config.is_file():
        raise VlmfixError(f"--rescore: {run.folder} holds no run; name its folder with --out DIR")
    stored = read_json(config, what="configuration of a run", remedy="name another folder with --out DIR")
    old = stored.get("settings", {}).get("versions", {})
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
    config = run.folder / "config.json"
    answers = run.folder / ANSWERS
    if run.folder.exists() and not run.folder.is_dir():
        raise VlmfixError(f"{run.folder} is a file; choose another folder with --out DIR")
    if not run.options.resume:
        return
    if config.is_file():
        try:
            remedy = "choose --out DIR or --no-resume"
            old = dict(read_json(config, what="configuration of a run", remedy=remedy)["settings"])
        except DataError:
            raise
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(
                f"{config} is not the configuration of a run ({error}); choose --out DIR or --no-resume"
            ) from error
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


def write_config(run: EvalRun, **more: Any) -> None:
    """Write ``config.json``: what identifies the run, and what is worth knowing beside that."""
    head = {"model": run.source.name, "data": run.tasks.description, "notes": list(run.notes)}
    write_json(run.folder / "config.json", {**head, "settings": run.settings, **more})


class AnswerPlan:
    """Which answers a run needs, in which batches, and under which keys.

    The batches do not depend on what is there already: an interrupted batch is generated again as a whole, so that a
    resumed run decodes exactly what an uninterrupted one does.
    """

    def __init__(self, run: EvalRun) -> None:
        """Compute every prompt, batch and key."""
        self.run = run
        builder = PromptBuilder(run.source.processor, use_template=run.options.chat_template)
        firsts = {_shape(sample): sample for sample in run.tasks.samples()}
        self._builder = builder
        self._prompts = {shape: builder(s.question, image=s.path is not None) for shape, s in firsts.items()}
        self.batches = list(self._batches())
        self._bases = {
            (spec.label, sample.benchmark, sample.max_new_tokens): ""
            for spec in run.methods
            for sample in run.tasks.samples()
        }
        for label, benchmark, limit in self._bases:
            self._bases[label, benchmark, limit] = digest(
                {
                    "benchmark": benchmark,  # What is recorded beside the text depends on it.
                    "model": run.settings["model"],
                    "method": run.settings["methods"][label],
                    "decoding": {**run.settings["decoding"], "max_new_tokens": limit},
                    "versions": run.settings["versions"],
                }
            )

    def _batches(self) -> Iterable[list[Sample]]:
        """Batches of first turns, each with the second turns behind its own answers."""
        tokenizer = self.run.source.processor.tokenizer
        length = {shape: len(tokenizer(prompt)["input_ids"]) for shape, prompt in self._prompts.items()}
        for task in self.run.tasks.tasks:
            second = {sample.first: sample for sample in task.samples if sample.second is not None}
            # Prompts of one length need no padding; ids break ties so that the order is stable.
            samples = sorted(
                (sample for sample in task.samples if sample.second is None),
                key=lambda s: (_kind(s), length[_shape(s)], s.image_id, s.question),
            )
            for _, alike in groupby(samples, _kind):
                group = list(alike)
                for start in range(0, len(group), self.run.batch_size):
                    batch = group[start : start + self.run.batch_size]
                    yield [*batch, *(second[sample] for sample in batch if sample in second)]

    def prompt(self, spec: MethodSpec, sample: Sample, records: Records) -> str | None:
        """What the processor reads; None if the answer that a second turn follows is not in the log."""
        if sample.second is None:
            return self._prompts[_shape(sample)]
        before = records.get(str(self.key(spec, sample.first, records)))
        if before is None:
            return None
        turns = ((sample.question, str(before["text"])),)
        return self._builder(sample.second, image=sample.path is not None, before=turns)

    def key(self, spec: MethodSpec, sample: Sample, records: Records = MappingProxyType({})) -> str | None:
        """The key of one answer: everything that decides it; None where ``prompt`` is None."""
        prompt = self.prompt(spec, sample, records)
        if prompt is None:
            return None
        base = self._bases[spec.label, sample.benchmark, sample.max_new_tokens]
        return digest([base, prompt, self.run.tasks.image_digests[sample.path] if sample.path is not None else None])

    def missing(self, log: AnswerLog) -> int:
        """Number of answers that are not in the log."""
        return sum(
            self.key(spec, sample, log.records) not in log.records
            for spec in self.run.methods
            for sample in self.run.tasks.samples()
        )

    def missing_of(self, log: AnswerLog, shard: Shard) -> int:
        """Number of answers that are not in the log and that a process is to give."""
        return sum(
            self.key(spec, sample, log.records) not in log.records
            for index, batch in enumerate(self.batches)
            if shard.owns(index)
            for spec in self.run.methods
            for sample in batch
        )

    def answers(self, log: AnswerLog) -> dict[str, Answers]:
        """All answers by method label and ``Sample.key``."""
        return {
            spec.label: {
                s.key: _answer(log.records[str(self.key(spec, s, log.records))]) for s in self.run.tasks.samples()
            }
            for spec in self.run.methods
        }


def _shape(sample: Sample) -> tuple[str, bool]:
    """What a first turn's prompt depends on."""
    return sample.question, sample.path is not None


def _kind(sample: Sample) -> tuple[int, str, bool]:
    """What the samples of a batch have in common."""
    return sample.max_new_tokens, sample.records, sample.path is not None


def halved_batches(answers: Mapping[str, Mapping[tuple[str, int, str], Answer]]) -> list[dict[str, Any]]:
    """What ran in smaller batches than planned, because memory was full.

    Args:
        answers: Method label to its answers by (benchmark, image id, question).

    Returns:
        One entry per method and benchmark: ``answers``, how many, and ``rows``, the smallest batch.
    """
    rows: dict[tuple[str, str], list[int]] = {}
    for label, given in answers.items():
        for (benchmark, _, _), answer in given.items():
            if answer.rows is not None:
                rows.setdefault((label, benchmark), []).append(answer.rows)
    return [
        {"method": label, "benchmark": benchmark, "answers": len(found), "rows": min(found)}
        for (label, benchmark), found in rows.items()
    ]


def _answer(record: dict[str, Any]) -> Answer:
    try:
        return Answer(
            text=record["text"],
            tokens=tuple(record.get("tokens", ())),
            truncated=record["truncated"],
            eos_gaps=tuple(record.get("eos_gaps", ())),
            score=record.get("score"),
            seconds=record["seconds"],
            rows=record.get("rows"),
        )
    except KeyError as error:
        raise DataError(
            f"answer {record['key'][:12]} in answers.jsonl lacks {error}; start afresh with --no-resume"
        ) from error
