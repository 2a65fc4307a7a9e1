"""What a run is before any weights are loaded: its folder, its samples in batches, and the key of every answer."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmfix.errors import DataError, VlmfixError

from .cache import AnswerLog, digest, write_json
from .config import (
    SCHEMA_VERSION,
    EvalOptions,
    MethodSpec,
    differing_settings,
    load_recipe,
    plan_methods,
    run_name,
    versions,
)
from .generate import PromptBuilder
from .models import ModelSource, find_model, resolve_device, resolve_dtype
from .samples import Answer, Sample
from .shards import Shard
from .tasks import Tasks, make_tasks

RUNS = Path("runs")
ANSWERS = "answers.jsonl"


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
    methods = plan_methods(options, recipe) if methods is None else methods
    tasks = make_tasks(options)
    source = find_model(testbed.MODEL_DIR, name="testbed") if options.model is None else find_model(options.model)
    PromptBuilder(source.processor, use_template=options.chat_template)(next(tasks.samples()).question)
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


def check_folder(run: EvalRun) -> None:
    """Make sure that what the run folder holds belongs to this run.

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
            old = json.loads(config.read_text(encoding="utf-8"))["settings"]
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(
                f"{config} is not the configuration of a run ({error}); choose --out DIR or --no-resume"
            ) from error
        differing = differing_settings(old, run.settings)
        if differing:
            raise VlmfixError(
                f"{run.folder} holds a run with other settings; choose another folder with --out DIR, or type "
                "--no-resume to throw its answers away. Differences:\n  " + "\n  ".join(differing[:12])
            )
    elif answers.is_file() and answers.stat().st_size:
        raise VlmfixError(f"{run.folder} has answers but no config.json; choose --out DIR or --no-resume")


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
        self.prompts = {text: builder(text) for text in dict.fromkeys(s.question for s in run.tasks.samples())}
        self.batches = list(self._batches())
        self._bases = {
            (spec.label, benchmark): digest(
                {
                    "model": run.settings["model"],
                    "method": dict(spec.params),
                    "decoding": {**run.settings["decoding"], "max_new_tokens": run.tasks.max_new_tokens(benchmark)},
                    "versions": run.settings["versions"],
                }
            )
            for spec in run.methods
            for benchmark in run.options.benchmarks
        }

    def _batches(self) -> Iterable[list[Sample]]:
        tokenizer = self.run.source.processor.tokenizer
        length = {text: len(tokenizer(prompt)["input_ids"]) for text, prompt in self.prompts.items()}
        for task in (self.run.tasks.chair, self.run.tasks.pope):
            # Prompts of one length need no padding; ids break ties so that the order is stable.
            samples = sorted(
                task.samples if task is not None else (), key=lambda s: (length[s.question], s.image_id, s.question)
            )
            for start in range(0, len(samples), self.run.batch_size):
                yield samples[start : start + self.run.batch_size]

    def key(self, spec: MethodSpec, sample: Sample) -> str:
        """The key of one answer: everything that decides it."""
        base = self._bases[spec.label, sample.benchmark]
        return digest([base, self.prompts[sample.question], self.run.tasks.image_digests[sample.path]])

    def missing(self, log: AnswerLog) -> int:
        """Number of answers that are not in the log."""
        return sum(
            self.key(spec, sample) not in log.records
            for spec in self.run.methods
            for sample in self.run.tasks.samples()
        )

    def missing_of(self, log: AnswerLog, shard: Shard) -> int:
        """Number of answers that are not in the log and that a process is to give."""
        return sum(
            self.key(spec, sample) not in log.records
            for index, batch in enumerate(self.batches)
            if shard.owns(index)
            for spec in self.run.methods
            for sample in batch
        )

    def answers(self, log: AnswerLog) -> dict[str, dict[tuple[str, int, str], Answer]]:
        """All answers by method label and (benchmark, image id, question)."""
        return {
            spec.label: {
                (s.benchmark, s.image_id, s.question): _answer(log.records[self.key(spec, s)])
                for s in self.run.tasks.samples()
            }
            for spec in self.run.methods
        }


def _answer(record: dict[str, Any]) -> Answer:
    try:
        return Answer(
            text=record["text"],
            tokens=tuple(record.get("tokens", ())),
            truncated=record["truncated"],
            eos_gaps=tuple(record.get("eos_gaps", ())),
            score=record.get("score"),
            seconds=record["seconds"],
        )
    except KeyError as error:
        raise DataError(
            f"answer {record['key'][:12]} in answers.jsonl lacks {error}; start afresh with --no-resume"
        ) from error
