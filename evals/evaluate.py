"""``vlmfix eval``: plan a run, generate the answers its folder lacks, score them, write the report."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .benchmarks.registry import benchmark_names
from .flags import add_verb
from .options import DEFAULT_BENCHMARKS, EvalOptions

if TYPE_CHECKING:
    from .data.samples import Answers
    from .run.methods import MethodSpec
    from .run.plan import EvalRun

EXPORT = "official"
"""The folder of a run that holds the answers in the benchmarks' own formats."""

logger = logging.getLogger("vlmfix.evals")


def evaluate(
    options: EvalOptions,
    *,
    methods: Sequence[MethodSpec] | None = None,
    show: Callable[[str], None] = logger.info,
) -> dict[str, Any]:
    """Run (or resume, or only re-score) an evaluation.

    Args:
        options: As typed.
        methods: The rows, the baseline first, for example one method at many strengths
            (``run.methods.method_specs``); by default what the options name, with controls.
        show: Called with the lines before the run and with the final table.

    Returns:
        The content of ``results.json``; empty in a process that only answers its share.

    Raises:
        VlmfixError: See the message; answers written so far are kept.
        EvalInterrupted: Ctrl-C; likewise.
    """
    # Imported here, so that the verb's --help does not wait for torch.
    from .data.thinking import without_traces
    from .data.write import write_json, write_text
    from .report.html import html_report
    from .report.text import brief_report, markdown_report, text_report
    from .run.answering import answer_run, answer_share
    from .run.batches import AnswerPlan
    from .run.folder import CONFIG, as_it_was, check_folder, with_batch_note
    from .run.plan import plan_run
    from .run.shards import Shard
    from .scores.counts import COUNTS, image_digests, write_counts

    shard, run = Shard.here(), plan_run(options, methods)
    if not shard.is_main:
        answer_share(AnswerPlan(run), shard)
        return {}
    if options.rescore:
        run = as_it_was(run)
    check_folder(run)
    run = with_batch_note(run)
    show(f"{run.source.name} on {run.tasks.description}: {len(run.methods)} methods, {run.total} answers, {run.folder}")
    for note in run.notes:
        show(f"note: {note}")
    answers = answer_run(run, shard, show, before=lambda: _expected(run))
    answers, thinking = without_traces(answers, options.thinking)
    results = _scored(run, answers, thinking)
    counts = results.pop("counts")
    write_counts(run.folder / COUNTS, results["settings_digest"], image_digests(run.tasks), counts)
    export_answers(run, answers)
    write_json(run.folder / "results.json", results)
    write_text(run.folder / "report.md", markdown_report(results))
    write_text(run.folder / "report.html", html_report(results, run.methods, run.tasks.tasks, answers))
    if options.verbose:
        show(text_report(results))
    else:
        for note in results["notes"][len(run.notes) :]:  # the others were shown before the run
            show(f"note: {note}")
        show(f"\n{brief_report(results)}\n\nEverything else is in the report: {run.folder / 'report.html'}")
    show(f"written: {run.folder}/{CONFIG} answers.jsonl results.json counts.json report.md report.html {EXPORT}/")
    return results


def _expected(run: EvalRun) -> str:
    """What differences a run of this size can show, before it costs anything; empty where nothing is known."""
    from .power import planned_lines

    images = {task.name: len({sample.image_id for sample in task.samples}) for task in run.tasks.tasks}
    from .benchmarks.pope.task import Pope

    pope = run.tasks.find(Pope)
    questions = len(pope.samples) / images[pope.name] if pope is not None else 1.0
    return planned_lines(images, questions, methods=len(run.methods) - 1) if len(run.methods) > 1 else ""


def _scored(run: EvalRun, answers: Mapping[str, Answers], thinking: Sequence[str]) -> dict[str, Any]:
    """The content of ``results.json``, and the ``counts`` of every image.

    Args:
        run: What was asked.
        answers: Method to its answers, without the thinking before them.
        thinking: What the reader must know about that.
    """
    from .data.thinking import without_thinking
    from .data.write import SCHEMA_VERSION, digest
    from .run.batches import halved_batches
    from .run.folder import last_batch_size, read_config
    from .scores.score_run import score_run

    def decode(tokens: Sequence[int]) -> str:
        text = str(run.source.processor.tokenizer.decode(tokens, skip_special_tokens=True)).strip()
        return text if options.thinking == "keep" else without_thinking(text).answer

    options = run.options
    resolved = read_config(run.folder)["resolved"] or {}
    halved = halved_batches(answers)
    notes = [*run.notes, *dict.fromkeys(note for part in resolved.values() for note in part["notes"])]
    notes += thinking
    notes += _unverified(run, answers[run.methods[0].label])
    notes += [
        f"memory was too small for batches of {run.batch_size}: {each['answers']} answers of {each['method']} to "
        f"{each['benchmark']} came in smaller ones, down to {each['rows']}"
        for each in halved
    ]
    return {
        "schema_version": SCHEMA_VERSION,
        "settings_digest": digest(run.settings),
        "command": options.command_line,
        "model": run.source.name,
        "data": run.tasks.description,
        "settings": run.settings,
        "batch_size": last_batch_size(run),
        "halved_batches": halved,
        "notes": notes,
        "resolved": resolved,
        **score_run(run.tasks, run.methods, answers, decode=decode, controls=options.controls, seed=options.seed),
    }


def _unverified(run: EvalRun, answers: Answers) -> list[str]:
    """Why the self-verification control is lacking, where it is wanted."""
    from .run.folder import read_config

    if all(answers[sample.key].asked is not None for sample in run.tasks.samples() if run.is_asked_about(sample)):
        return []
    told = (read_config(run.folder).get("runtime") or {}).get("self_verification", {})
    remedy = "the unpatched model was not asked about its captions; the same command without --rescore asks it"
    return [f"no self-verification control: {told.get('reason', remedy)}"]


def export_answers(run: EvalRun, answers: Mapping[str, Answers]) -> None:
    """Write every method's answers in the benchmarks' own formats, to be scored by others."""
    from .benchmarks.base import safe_name

    for spec in run.methods:
        for task in run.tasks.tasks:
            task.export(run.folder / EXPORT / safe_name(spec.label), answers[spec.label])


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
        about=_ABOUT,
        help_of={
            "benchmarks": f"benchmarks: {', '.join(benchmark_names())} (default: {' '.join(DEFAULT_BENCHMARKS)})",
            "limit": "number of images per benchmark, drawn by seed; sets of figures for hallusionbench, groups for "
            "naturalbench, pairs for mmvp, images per task for mme, images per right answer for dashb (default: 500; "
            "testbed 400, POPE 200, sycophancy 100; all of the others)",
            "max_new_tokens": "longest caption (default: 128 testbed, else 512) and open answer (default: 256 mmhal, "
            "else 64), in tokens",
        },
        choices={"benchmarks": benchmark_names()},
    )


def run(options: argparse.Namespace, *, show: Callable[[str], None]) -> None:
    """Evaluate as asked."""
    evaluate(EvalOptions.from_arguments(options), show=show)
