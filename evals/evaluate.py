"""The evaluation: plan, generate what is missing, append, score, report."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from vlmfix.errors import VlmfixError

from .benchmarks.base import safe_name
from .data.samples import Answers
from .data.write import digest, remove_unfinished, write_json, write_text
from .flags import add_verb
from .options import BENCHMARKS, DEFAULT_BENCHMARKS, EvalOptions
from .power import planned_lines
from .report.html import html_report
from .report.text import brief_report, markdown_report, text_report
from .run.answer_log import AnswerLog, read_records
from .run.answering import generate_answers
from .run.batches import AnswerPlan, halved_batches
from .run.methods import MethodSpec
from .run.plan import ANSWERS, CONFIG, EvalRun, as_it_was, check_folder, plan_run, read_config, write_config
from .run.provenance import SCHEMA_VERSION
from .run.shards import Shard, merge_parts
from .scores.counts import COUNTS, image_digests, write_counts
from .scores.score_run import score_run

EXPORT = "official"


logger = logging.getLogger("vlmfix.evals")


class EvalInterrupted(KeyboardInterrupt):
    """Ctrl-C during a run; its text says how many answers are kept and how to go on."""


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
    if options.rescore:
        run = as_it_was(run)
    check_folder(run)
    run = _with_batch_note(run)
    show(f"{run.source.name} on {run.tasks.description}: {len(run.methods)} methods, {run.total} answers, {run.folder}")
    for note in run.notes:
        show(f"note: {note}")
    answers = _answered(run, shard, show)
    results, counts = _scored(run, answers)
    write_counts(run.folder / COUNTS, results["settings_digest"], image_digests(run.tasks), counts)
    export_answers(run, answers)
    write_json(run.folder / "results.json", results)
    write_text(run.folder / "report.md", markdown_report(results))
    write_text(run.folder / "report.html", html_report(results, run.methods, run.tasks.chair, answers))
    if options.verbose:
        show(text_report(results))
    else:
        for note in results["notes"][len(run.notes) :]:  # the others were shown before the run
            show(f"note: {note}")
        show(f"\n{brief_report(results)}\n\nEverything else is in the report: {run.folder / 'report.html'}")
    show(f"written: {run.folder}/{CONFIG} answers.jsonl results.json counts.json report.md report.html {EXPORT}/")
    return results


def _with_batch_note(run: EvalRun) -> EvalRun:
    """The run with a note where its folder's answers came in batches of another size, which no key holds."""
    was = _batch_size(run) if run.options.resume and (run.folder / CONFIG).is_file() else run.batch_size
    if run.options.rescore or was == run.batch_size:
        return run
    note = f"answers that were there came in batches of {was}, new ones in batches of {run.batch_size}"
    return replace(run, notes=(*run.notes, f"{note}: the last digits of their logits may differ"))


def _batch_size(run: EvalRun) -> int:
    """Of the answers that were generated last."""
    return int((read_config(run.folder).get("runtime") or {}).get("batch_size", run.batch_size))


def _answered(run: EvalRun, shard: Shard, show: Callable[[str], None]) -> dict[str, Answers]:
    """Generate what the run folder lacks; every method's answers."""
    options = run.options
    with AnswerLog(run.folder / ANSWERS, keep=options.resume) as log:
        remove_unfinished(run.folder)
        if not (options.resume and (run.folder / CONFIG).is_file()):
            write_config(run, runtime=None, resolved=None)
        merge_parts(run.folder, log, keep=options.resume)
        plan = AnswerPlan(run)
        missing = plan.missing(log)
        if missing < run.total:
            show(f"{run.total - missing} answers are there already, {missing} to go")
        if missing and options.rescore:
            raise VlmfixError(
                f"{missing} of {run.total} answers are not in {run.folder}, and --rescore generates none; "
                "type the same command without it"
            )
        if missing == run.total and (lines := _expected(run)):
            show(lines)
        if missing or shard.world > 1:
            try:
                if shard.world == 1:
                    generate_answers(run, plan, log, missing, shard, show=show)
                else:
                    show(f"{shard.world} processes share the batches")
                    shard.wait()
                    answer_share(run, plan, log.records, shard, missing=missing, show=show)
            except KeyboardInterrupt as error:
                raise EvalInterrupted(
                    f"interrupted: {run.total - plan.missing(log)} of {run.total} answers are kept in {run.folder}; "
                    f"to go on, type: {options.resume_line}"
                ) from error
        merge_parts(run.folder, log)
        _check_all_there(run, plan, log)
        return plan.answers(log)


def _scored(run: EvalRun, answers: Mapping[str, Answers]) -> tuple[dict[str, Any], Any]:
    """The content of ``results.json``, and the counts of every image."""
    options = run.options

    def decode(tokens: Sequence[int]) -> str:
        return str(run.source.processor.tokenizer.decode(tokens, skip_special_tokens=True)).strip()

    resolved = read_config(run.folder)["resolved"] or {}
    scores = score_run(run.tasks, run.methods, answers, decode=decode, controls=options.controls, seed=options.seed)
    counts = scores.pop("counts")
    halved = halved_batches(answers)
    notes = [*run.notes, *dict.fromkeys(note for part in resolved.values() for note in part["notes"])]
    notes += [
        f"memory was too small for batches of {run.batch_size}: {each['answers']} answers of {each['method']} to "
        f"{each['benchmark']} came in smaller ones, down to {each['rows']}"
        for each in halved
    ]
    results = {
        "schema_version": SCHEMA_VERSION,
        "settings_digest": digest(run.settings),
        "command": options.command_line,
        "model": run.source.name,
        "data": run.tasks.description,
        "settings": run.settings,
        "batch_size": _batch_size(run),
        "halved_batches": halved,
        "notes": notes,
        "resolved": resolved,
        **scores,
    }
    return results, counts


def _check_all_there(run: EvalRun, plan: AnswerPlan, log: AnswerLog) -> None:
    if missing := plan.missing(log):
        raise VlmfixError(
            f"{missing} of {run.total} answers are not in {run.folder}: a process failed, or runs on a machine that "
            "does not share this folder. Name a shared one with --out DIR; the same command answers the rest"
        )


def _expected(run: EvalRun) -> str:
    """What differences a run of this size can show, before it costs anything; empty where nothing is known."""
    images = {task.name: len({sample.image_id for sample in task.samples}) for task in run.tasks.tasks}
    pope = run.tasks.pope
    questions = len(pope.samples) / images[pope.name] if pope is not None else 1.0
    return planned_lines(images, questions, methods=len(run.methods) - 1) if len(run.methods) > 1 else ""


def export_answers(run: EvalRun, answers: Mapping[str, Answers]) -> None:
    """Write every method's answers in the benchmarks' own formats, to be scored by others."""
    for spec in run.methods:
        folder = run.folder / EXPORT / safe_name(spec.label)
        for task in run.tasks.tasks:
            task.export(folder, answers[spec.label])


def answer_share(
    run: EvalRun,
    plan: AnswerPlan,
    known: Mapping[str, Mapping[str, Any]],
    shard: Shard,
    *,
    missing: int = 0,
    show: Callable[[str], None] | None = None,
) -> None:
    """Answer this process's batches into a file of its own, and wait for the others.

    Args:
        run: What to run.
        plan: Its batches and keys.
        known: Answers that were there before.
        shard: This process's place.
        missing: Answers that all processes are to give, for the progress.
        show: Takes lines on the progress; None shows none.
    """
    with AnswerLog(shard.part(run.folder), known=known) as part:
        mine = plan.missing_of(part, shard)
        shard.wait()  # everybody knows by now what was there before
        if mine:
            generate_answers(run, plan, part, missing, shard, show=show)
    shard.wait()


def _evaluate_share(options: EvalOptions, methods: Sequence[MethodSpec] | None, shard: Shard) -> dict[str, Any]:
    """What a process does that is not the main one: no output, no results."""
    run = plan_run(options, methods)
    plan = AnswerPlan(run)
    shard.wait()  # the main process has checked the folder and merged what earlier runs left
    answer_share(run, plan, read_records(run.folder / ANSWERS), shard)
    return {}


_ABOUT = """\
Evaluate methods against 'none', greedy decoding, with paired 95 % intervals.

  vlmfix eval                                      none, VHR and VAR on the embedded testbed, under 3 minutes on 2 cores
  vlmfix eval --method all --limit 100             every method the model takes, and which are worth having
  vlmfix eval --model llava-hf/llava-1.5-7b-hf --data COCO_DIR --limit 500 --dtype float16
                                                   COCO_DIR: instances_val2014.json, captions_val2014.json, val2014/

  vlmfix eval --method vhr --set alpha=1.5 --limit 100
  vlmfix eval --benchmark sycophancy               POPE's questions with hints and doubts
  vlmfix eval --model ... --benchmark amber mme --benchmark-data amber=AMBER_DIR mme=MME_DIR
  vlmfix eval --model ... --benchmark custom --benchmark-data custom=questions.jsonl
                                                   lines of {"image": ..., "question": ..., "answer": ...}

An interrupted run goes on when the same command is typed again. Every run evaluates 'none' on the same images.
"""


def add_eval(verbs: Any) -> argparse.ArgumentParser:
    """Add the verb to a command line's subparsers; import nothing heavy."""
    return add_verb(
        verbs,
        "eval",
        EvalOptions,
        help="evaluate methods against 'none' on CHAIR, POPE and other benchmarks",
        about=_ABOUT,
        help_of={
            "benchmarks": f"benchmarks: {', '.join(BENCHMARKS)} (default: {' '.join(DEFAULT_BENCHMARKS)})",
            "limit": "number of images per benchmark, drawn by seed; sets of figures for hallusionbench, images per "
            "task for mme (default: 500; testbed 400, POPE 200, sycophancy 100; all of amber, mme, hallusionbench, "
            "mmhal, custom)",
            "max_new_tokens": "longest caption (default: 128 testbed, else 512) and open answer (default: 256 mmhal, "
            "else 64), in tokens",
        },
        choices={"benchmarks": BENCHMARKS},
    )


def run(options: argparse.Namespace, *, show: Callable[[str], None]) -> None:
    """Evaluate as asked."""
    evaluate(EvalOptions.from_arguments(options), show=show)
