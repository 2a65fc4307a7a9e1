"""The evaluation loop: plan, generate what is missing, append, score, report."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import vlmfix
from vlmfix.errors import DataError, VlmfixError

from .cache import AnswerLog, digest, read_records, write_json, write_text
from .config import (
    SCHEMA_VERSION,
    EvalOptions,
    MethodSpec,
    differing_settings,
    load_recipe,
    plan_methods,
    run_name,
    runtime_info,
    versions,
)
from .generate import Generator, PromptBuilder
from .models import ModelSource, find_model, fitting_threads, load_model, resolve_device, resolve_dtype
from .page import html_report
from .report import markdown_report, text_report
from .samples import Answer, Sample
from .scoring import score_run
from .shards import Shard, merge_parts
from .tasks import Tasks, make_tasks

logger = logging.getLogger("vlmfix.evals")

RUNS = Path("runs")
ANSWERS = "answers.jsonl"


class EvalInterrupted(KeyboardInterrupt):
    """Ctrl-C during a run; its text says how many answers are kept and how to go on."""


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


def evaluate(
    options: EvalOptions,
    *,
    methods: Sequence[MethodSpec] | None = None,
    show: Callable[[str], None] = logger.info,
) -> dict[str, Any]:
    """Run (or resume, or only re-score) an evaluation.

    Args:
        options: As typed.
        methods: The rows, the baseline first, for example one method at many strengths (``config.method_specs``); by
            default what the options name, with controls.
        show: Called with the lines before the run and with the final table.

    Returns:
        The content of ``results.json``.

    Raises:
        VlmfixError: See the message; answers written so far are kept.
        EvalInterrupted: Ctrl-C; likewise.
    """
    shard = Shard.here()
    if not shard.is_main:
        return _evaluate_share(options, methods, shard)
    run = plan_run(options, methods)
    check_folder(run)
    show(f"{run.source.name} on {run.tasks.description}: {len(run.methods)} methods, {run.total} answers, {run.folder}")
    for note in run.notes:
        show(f"note: {note}")
    with AnswerLog(run.folder / ANSWERS, keep=options.resume) as log:
        if not (options.resume and (run.folder / "config.json").is_file()):
            write_config(run, runtime=None, resolved=None)
        merge_parts(run.folder, log, keep=options.resume)
        plan = AnswerPlan(run)
        missing = plan.missing(log)
        if missing < run.total:
            show(f"{run.total - missing} answers are there already, {missing} to go")
        if missing or shard.world > 1:
            try:
                if shard.world == 1:
                    generate_answers(run, plan, log, missing, shard)
                else:
                    show(f"{shard.world} processes share the batches")
                    shard.wait()
                    answer_share(run, plan, log.records, shard)
            except KeyboardInterrupt as error:
                raise EvalInterrupted(
                    f"interrupted: {run.total - plan.missing(log)} of {run.total} answers are kept in {run.folder}; "
                    f"to go on, type: {options.resume_line}"
                ) from error
        merge_parts(run.folder, log)
        answers = plan.answers(log)

    def decode(tokens: Sequence[int]) -> str:
        return str(run.source.processor.tokenizer.decode(tokens, skip_special_tokens=True)).strip()

    config = json.loads((run.folder / "config.json").read_text(encoding="utf-8"))
    resolved = config["resolved"] or {}
    results = {
        "schema_version": SCHEMA_VERSION,
        "settings_digest": digest(run.settings),
        "command": options.command_line,
        "model": run.source.name,
        "data": run.tasks.description,
        "settings": run.settings,
        "batch_size": run.batch_size,
        "notes": [*run.notes, *dict.fromkeys(note for part in resolved.values() for note in part["notes"])],
        "resolved": resolved,
        **score_run(run.tasks, run.methods, answers, decode=decode, controls=options.controls, seed=options.seed),
    }
    write_json(run.folder / "results.json", results)
    write_text(run.folder / "report.md", markdown_report(results))
    write_text(run.folder / "report.html", html_report(results, run.methods, run.tasks.chair, answers))
    show(text_report(results))
    show(f"written: {run.folder}/config.json answers.jsonl results.json report.md report.html")
    return results


def answer_share(run: EvalRun, plan: AnswerPlan, known: Mapping[str, Mapping[str, Any]], shard: Shard) -> None:
    """Answer this process's batches into a file of its own, and wait for the others."""
    with AnswerLog(shard.part(run.folder), known=known) as part:
        missing = plan.missing_of(part, shard)
        shard.wait()  # everybody knows by now what was there before
        if missing:
            generate_answers(run, plan, part, missing, shard)
    shard.wait()


def _evaluate_share(options: EvalOptions, methods: Sequence[MethodSpec] | None, shard: Shard) -> dict[str, Any]:
    """What a process does that is not the main one: no output, no results."""
    run = plan_run(options, methods)
    plan = AnswerPlan(run)
    shard.wait()  # the main process has checked the folder and merged what earlier runs left
    answer_share(run, plan, read_records(run.folder / ANSWERS), shard)
    return {}


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


def generate_answers(run: EvalRun, plan: AnswerPlan, log: AnswerLog, missing: int, shard: Shard) -> None:
    """Load the model and generate every answer the log lacks; each batch is answered by all methods in turn.

    With several processes, those of this one's batches.

    Raises:
        VlmfixError: Loading or patching failed, memory or the disk is full; the answers so far are kept.
    """
    model = load_model(
        run.source,
        dtype=run.settings["model"]["dtype"],
        device=shard.device(run.device),
        attn_implementation=run.options.attn_implementation,
    )
    with fitting_threads(model):
        _generate_missing(run, plan, log, missing, model, shard)


def _generate_missing(run: EvalRun, plan: AnswerPlan, log: AnswerLog, missing: int, model: Any, shard: Shard) -> None:
    from tqdm import tqdm

    from .data.coco import load_image

    generator = Generator(model, run.source.processor)
    methods, resolved = [], {}
    for spec in run.methods:
        with vlmfix.patched(model, spec.build()):
            status = vlmfix.status(model)
        assert status is not None
        # The bound method: layers and sink dimensions are resolved once, not in every batch.
        methods.append((spec, status.methods[0]))
        resolved[spec.label] = {"params": status.methods[0].to_dict(), "layers": status.layers, "notes": status.notes}
    info = {
        **runtime_info(run.options, run.batch_size, model),
        "generation_config": model.generation_config.to_diff_dict(),
    }
    if shard.is_main:
        write_config(run, runtime=info, resolved=resolved)
    with tqdm(
        total=missing, unit="answer", disable=None if shard.is_main else True, smoothing=0.1, dynamic_ncols=True
    ) as bar:
        for index, batch in enumerate(plan.batches):
            if not shard.owns(index):
                continue
            lacking = [
                (spec, method, wanted)
                for spec, method in methods
                if (wanted := [plan.key(spec, s) not in log.records for s in batch]) and any(wanted)
            ]
            if not lacking:
                continue
            images = {path: load_image(path) for path in dict.fromkeys(s.path for s in batch)}
            inputs = generator.encode([plan.prompts[s.question] for s in batch], [images[s.path] for s in batch])
            benchmark = batch[0].benchmark
            if bar.n == 0:  # The first pass through a model is slow for reasons that are no method's fault.
                generator.generate(inputs, benchmark, 1)
            for spec, method, wanted in lacking:
                bar.set_description(f"{benchmark} {index + 1}/{len(plan.batches)} {spec.label}", refresh=False)
                with vlmfix.patched(model, method):
                    answers = generator.generate(inputs, benchmark, run.tasks.max_new_tokens(benchmark))
                log.append(
                    _record(plan.key(spec, sample), spec, sample, answer)
                    for sample, answer, want in zip(batch, answers, wanted, strict=True)
                    if want
                )
                bar.update(sum(wanted))


def _record(key: str, spec: MethodSpec, sample: Sample, answer: Answer) -> dict[str, Any]:
    record: dict[str, Any] = {
        "key": key,
        "method": spec.label,
        "benchmark": sample.benchmark,
        "image_id": sample.image_id,
        "question": sample.question,
        "text": answer.text,
        "truncated": answer.truncated,
    }
    if sample.benchmark == "chair":
        record |= {"tokens": list(answer.tokens), "eos_gaps": list(answer.eos_gaps)}
    else:
        record["score"] = answer.score
    return {**record, "seconds": answer.seconds}


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
