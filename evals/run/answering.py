"""Generate what a run lacks, batch by batch, each batch by every method in turn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import vlmfix

from ..data.coco import load_image
from ..data.samples import Answer, Sample
from .answer_log import AnswerLog
from .batches import Answerer, AnswerPlan, EncodedBatch
from .features import ImageFeatures
from .generate import Generator
from .methods import MethodSpec
from .models import fitting_threads, load_model
from .plan import EvalRun, write_config
from .progress import Progress
from .provenance import runtime_info
from .shards import Elsewhere, Shard


def load_run_model(run: EvalRun, shard: Shard) -> Any:
    """Load a run's model, for one of its processes.

    Raises:
        VlmfixError: Loading failed.
    """
    return load_model(
        run.source,
        dtype=run.settings["model"]["dtype"],
        device=shard.device(run.device),
        attn_implementation=run.options.attn_implementation,
    )


def generate_answers(
    run: EvalRun,
    plan: AnswerPlan,
    log: AnswerLog,
    missing: int,
    shard: Shard,
    model: Any = None,
    *,
    show: Callable[[str], None] | None = None,
) -> None:
    """Load the model and generate every answer the log lacks; each batch is answered by all methods in turn.

    With several processes, those of this one's batches.

    Args:
        run: What to run.
        plan: Its batches and keys.
        log: What is there, and where answers go.
        missing: Answers to come, those of all processes.
        shard: This process's place.
        model: The model, if it is loaded already; it is used as it is.
        show: Takes lines on the progress; None shows none.

    Raises:
        VlmfixError: Loading or patching failed, memory or the disk is full; the answers so far are kept.
    """
    if model is None:
        model = load_run_model(run, shard)
    with fitting_threads(model):
        share = _Share(run, plan, log, model)
        if shard.is_main:
            share.describe()
        with Progress(missing, say=show, elsewhere=Elsewhere(run.folder, shard)) as progress:
            for index, batch in enumerate(plan.batches):
                if shard.owns(index):
                    share.answer(batch, f"{index + 1}/{len(plan.batches)}", progress)
        if shard.is_main:
            share.describe()


@dataclass(frozen=True)
class _Row:
    """A method of the run, and the same bound to the model: layers and sinks are looked up once, not in every batch."""

    spec: MethodSpec
    method: Any


class _Share:
    """What this process answers, with one model."""

    def __init__(self, run: EvalRun, plan: AnswerPlan, log: AnswerLog, model: Any) -> None:
        self._run, self._plan, self._log = run, plan, log
        self._generator = Generator(model, run.source.processor)
        self._features = ImageFeatures(model) if run.options.reuse_images else None
        self._answerer = Answerer(self._generator, self._features)
        self._rows: list[_Row] = []
        self._resolved: dict[str, Any] = {}
        for spec in run.methods:
            with vlmfix.patched(model, spec.build()):
                status = vlmfix.status(model)
            assert status is not None
            method = status.methods[0]
            self._rows.append(_Row(spec, method))
            self._resolved[spec.label] = {"params": method.to_dict(), "layers": status.layers, "notes": status.notes}

    def describe(self) -> None:
        """Write ``config.json`` with what is known of the model and the machine."""
        model = self._generator.model
        runtime = {
            **runtime_info(self._run.options, self._run.batch_size, model),
            "image_features": {"reused": False} if self._features is None else self._features.summary(),
            "generation_config": model.generation_config.to_diff_dict(),
        }
        write_config(self._run, runtime=runtime, resolved=self._resolved)

    def answer(self, batch: Sequence[Sample], place: str, progress: Progress) -> None:
        """Answer what the log lacks of a batch: first turns, then second ones, which follow a method's own answers."""
        for turn in ([s for s in batch if s.second is None], [s for s in batch if s.second is not None]):
            lacking = [(row, wanted) for row in self._rows if any(wanted := self._wanted(row.spec, turn))]
            if lacking:
                self._answer_turn(turn, lacking, place, progress)

    def _wanted(self, spec: MethodSpec, samples: Sequence[Sample]) -> list[bool]:
        known = self._log.records
        return [self._plan.key(spec, sample, known) not in known for sample in samples]

    def _answer_turn(
        self, turn: Sequence[Sample], lacking: Sequence[tuple[_Row, list[bool]]], place: str, progress: Progress
    ) -> None:
        plan, log, first = self._plan, self._log, turn[0]
        read = {path: load_image(path) for path in dict.fromkeys(s.path for s in turn) if path is not None}
        images = [None if sample.path is None else read[sample.path] for sample in turn]
        if self._features is not None:
            self._features.forget(len(turn))
        encoded = None
        for row, wanted in lacking:
            prompts = [str(plan.prompt(row.spec, sample, log.records)) for sample in turn]
            if encoded is None or prompts != encoded.prompts:
                encoded = EncodedBatch(self._generator, prompts, images)
            if not progress.done:  # The first pass through a model is slow for reasons that are no method's fault.
                self._answerer.answer(encoded, self._rows[0].spec.label, None, first.records, 1)
            what = f"{first.benchmark} {place} {row.spec.label}"
            progress.begin(what)
            answers = self._answerer.answer(encoded, row.spec.label, row.method, first.records, first.max_new_tokens)
            log.append(
                _record(str(plan.key(row.spec, sample, log.records)), row.spec, sample, answer)
                for sample, answer, want in zip(turn, answers, wanted, strict=True)
                if want
            )
            progress.add(sum(wanted), what)


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
    if sample.second is not None:
        record["second"] = sample.second
    if sample.records == "gaps":
        record |= {"tokens": list(answer.tokens), "eos_gaps": list(answer.eos_gaps)}
    elif sample.records == "score":
        record["score"] = answer.score
    if answer.rows is not None:
        record["rows"] = answer.rows
    return {**record, "seconds": answer.seconds}
