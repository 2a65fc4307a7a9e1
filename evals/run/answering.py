"""Generate what a run lacks, batch by batch, each batch by every method in turn."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

import vlmfix
from vlmfix.errors import VlmfixError
from vlmfix.model.products import ProductsByOneDnn, fast_products

from ..data.coco import load_image
from ..data.samples import Answers, Sample
from ..data.write import remove_unfinished
from .answer_log import AnswerLog, read_records
from .batches import AnswerPlan, as_asked, as_record
from .features import ImageFeatures
from .folder import ANSWERS, CONFIG, write_config
from .generate import Answerer, EncodedBatch, Generator
from .mentions import Mentions
from .methods import MethodSpec
from .models import fitting_threads, load_model, placement
from .plan import EvalRun
from .prefixes import Prefixes
from .progress import Progress
from .shards import Elsewhere, Shard, merge_parts

Show = Callable[[str], None]


def answer_run(run: EvalRun, shard: Shard, show: Show, *, before: Callable[[], str] = str) -> dict[str, Answers]:
    """Generate what a run's folder lacks, and return every method's answers.

    Args:
        run: The run; its folder was checked.
        shard: This process's place; the main one.
        show: Takes lines on the progress.
        before: Makes a line for a run that has no answer yet; empty for none.

    Raises:
        VlmfixError: See the message; answers written so far are kept.
        EvalInterrupted: Ctrl-C; likewise.
    """
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
        if missing == run.total and (line := before()):
            show(line)
        with _interruptible(plan, log):
            if shard.world > 1:
                show(f"{shard.world} processes share the batches")
                shard.wait()
                answer_share(plan, shard, known=log, missing=missing, show=show)
            elif missing or plan.unasked(log):
                generate_answers(plan, log, missing, show=show)
        merge_parts(run.folder, log)
        if missing := plan.missing(log):
            raise VlmfixError(
                f"{missing} of {run.total} answers are not in {run.folder}: a process failed, or runs on a machine "
                "that does not share this folder. Name a shared one with --out DIR; the same command answers the rest"
            )
        return plan.answers(log)


class EvalInterrupted(KeyboardInterrupt):
    """Ctrl-C during a run; its text says how many answers are kept and how to go on."""


@contextmanager
def _interruptible(plan: AnswerPlan, log: AnswerLog) -> Iterator[None]:
    """Say on Ctrl-C what is kept and how to go on."""
    try:
        yield
    except KeyboardInterrupt as error:
        run = plan.run
        raise EvalInterrupted(
            f"interrupted: {run.total - plan.missing(log)} of {run.total} answers are kept in {run.folder}; "
            f"to go on, type: {run.options.resume_line}"
        ) from error


def answer_share(
    plan: AnswerPlan, shard: Shard, *, known: AnswerLog | None = None, missing: int = 0, show: Show | None = None
) -> None:
    """Answer this process's batches into a file of its own, and wait for the others.

    Args:
        plan: The batches and keys of the run.
        shard: This process's place.
        known: Answers that were there before; a process that is not the main one reads them, once the main one has
            checked the folder and merged what earlier runs left.
        missing: Answers that all processes are to give, for the progress.
        show: Takes lines on the progress; None shows none.
    """
    folder = plan.run.folder
    if known is None:
        shard.wait()
    records = read_records(folder / ANSWERS) if known is None else known.records
    with AnswerLog(shard.part(folder), known=records) as part:
        mine = plan.missing(part, shard) + plan.unasked(part, shard)
        shard.wait()  # everybody knows by now what was there before
        if mine:
            generate_answers(plan, part, missing, shard, show=show)
    shard.wait()


def load_run_model(run: EvalRun, shard: Shard | None = None) -> Any:
    """Load a run's model, for one of its processes.

    Raises:
        VlmfixError: Loading failed.
    """
    return load_model(
        run.source,
        dtype=run.settings["model"]["dtype"],
        device=(shard or Shard()).device(run.device),
        attn_implementation=run.options.attn_implementation,
    )


def generate_answers(
    plan: AnswerPlan,
    log: AnswerLog,
    missing: int,
    shard: Shard | None = None,
    model: Any = None,
    *,
    show: Show | None = None,
) -> None:
    """Load the model and generate every answer the log lacks; each batch is answered by all methods in turn.

    Args:
        plan: The batches and keys of the run.
        log: What is there, and where answers go.
        missing: Answers to come, those of all processes.
        shard: This process's place among several: only its batches are answered.
        model: The model, if it is loaded already; it is used as it is.
        show: Takes lines on the progress; None shows none.

    Raises:
        VlmfixError: Loading or patching failed, memory or the disk is full; the answers so far are kept.
    """
    shard = shard or Shard()
    if model is None:
        model = load_run_model(plan.run, shard)
    with fitting_threads(model), fast_products(model):
        share = _Share(plan, log, model)
        if shard.is_main:
            share.describe()
        with Progress(missing, say=show, elsewhere=Elsewhere(plan.run.folder, shard)) as progress:
            for index, batch in enumerate(plan.batches):
                if shard.owns(index):
                    share.answer(batch, f"{index + 1}/{len(plan.batches)}", progress)
        if shard.is_main:
            share.describe()


class _Share:
    """What this process answers, with one model."""

    def __init__(self, plan: AnswerPlan, log: AnswerLog, model: Any) -> None:
        run = plan.run
        self._plan, self._log = plan, log
        self._generator = Generator(model, run.source.processor)
        self._features = ImageFeatures(model) if run.options.reuse_images else None
        self._prefixes = Prefixes(model, run.source.processor) if run.options.share_prefixes else None
        self._answerer = Answerer(self._generator, self._features, self._prefixes)
        self._mentions = Mentions(model, run.source.processor, run.batch_size)
        self._is_warm = False
        self._bound: dict[str, Any] = {}  # Layers and sinks are looked up once, not in every batch.
        self._resolved: dict[str, Any] = {}
        for spec in run.methods:
            with vlmfix.patched(model, spec.build()):
                status = vlmfix.status(model)
            assert status is not None
            method = status.methods[0]
            self._bound[spec.label] = method
            self._resolved[spec.label] = {"params": method.to_dict(), "layers": status.layers, "notes": status.notes}

    def describe(self) -> None:
        """Write ``config.json`` with what is worth knowing without being part of the run's identity."""
        run, model = self._plan.run, self._generator.model
        runtime = {
            "command": run.options.command_line,
            "batch_size": run.batch_size,
            "device": placement(model),
            "model_class": type(model).__name__,
            "attn_implementation": model.config._attn_implementation,
            "threads": torch.get_num_threads(),
            "fp32_products": "oneDNN" if isinstance(fast_products(model), ProductsByOneDnn) else "torch",
            "python": platform.python_version(),
            "platform": platform.platform(terse=True),
            "image_features": {"reused": False} if self._features is None else self._features.summary(),
            "prefixes": {"shared": False} if self._prefixes is None else self._prefixes.summary(),
            "self_verification": self._mentions.summary(),
            "generation_config": model.generation_config.to_diff_dict(),
        }
        write_config(run, runtime=runtime, resolved=self._resolved)

    def answer(self, batch: Sequence[Sample], place: str, progress: Progress) -> None:
        """Answer what the log lacks of a batch: first turns, then second ones, which follow a method's own answers."""
        images = {path: load_image(path) for path in dict.fromkeys(s.path for s in batch) if path is not None}
        for kept in (self._features, self._prefixes):
            if kept is not None:
                kept.forget(len(batch))
        for turn in ([s for s in batch if s.second is None], [s for s in batch if s.second is not None]):
            lacking = [(spec, wanted) for spec in self._plan.run.methods if any(wanted := self._wanted(spec, turn))]
            if lacking:
                self._answer_turn(turn, [s.path and images[s.path] for s in turn], lacking, place, progress)
        self._ask(batch, images, place, progress)

    def _ask(self, batch: Sequence[Sample], images: Mapping[Path, Any], place: str, progress: Progress) -> None:
        """Ask the unpatched model for the objects that its answers name, where the log lacks some of a batch."""
        plan, log = self._plan, self._log
        asked = [sample for sample in batch if plan.run.is_asked_about(sample)]
        if all(plan.asked_key(sample) in log.records for sample in asked):
            return
        baseline = plan.run.methods[0]
        progress.begin(f"{asked[0].benchmark} {place} {baseline.label}, asked about its answers")
        texts = [str(log.records[str(plan.key(baseline, sample))]["text"]) for sample in asked]
        with nullcontext() if self._features is None else self._features.reused():
            told = self._mentions.ask([images[sample.path] for sample in asked if sample.path is not None], texts)
        log.append(
            as_asked(plan.asked_key(sample), sample, text, each)
            for sample, text, each in zip(asked, texts, told, strict=True)
        )

    def _wanted(self, spec: MethodSpec, samples: Sequence[Sample]) -> list[bool]:
        known = self._log.records
        return [self._plan.key(spec, sample, known) not in known for sample in samples]

    def _answer_turn(
        self,
        turn: Sequence[Sample],
        images: Sequence[Any],
        lacking: Sequence[tuple[MethodSpec, list[bool]]],
        place: str,
        progress: Progress,
    ) -> None:
        plan, log, first = self._plan, self._log, turn[0]
        encoded = None
        for spec, wanted in lacking:
            prompts = [str(plan.prompt(spec, sample, log.records)) for sample in turn]
            if encoded is None or prompts != encoded.prompts:
                encoded = EncodedBatch(self._generator, prompts, images)
            if not self._is_warm:  # The first pass through a model is slow for reasons that are no method's fault.
                self._answerer.answer(encoded, plan.run.methods[0].label, None, first.records, 1)
                self._is_warm = True
            progress.begin(f"{first.benchmark} {place} {spec.label}")
            answers = self._answerer.answer(
                encoded, spec.label, self._bound[spec.label], first.records, first.max_new_tokens
            )
            log.append(
                as_record(str(plan.key(spec, sample, log.records)), spec, sample, answer)
                for sample, answer, want in zip(turn, answers, wanted, strict=True)
                if want
            )
            progress.add(sum(wanted))
