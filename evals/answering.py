"""Generate what a run lacks, batch by batch, each batch by every method in turn."""

from __future__ import annotations

from typing import Any

import vlmfix

from .batches import Answerer, EncodedBatch
from .cache import AnswerLog
from .config import MethodSpec, runtime_info
from .generate import Generator
from .models import fitting_threads, load_model
from .planning import AnswerPlan, EvalRun, write_config
from .samples import Answer, Sample
from .shards import Shard


def generate_answers(
    run: EvalRun, plan: AnswerPlan, log: AnswerLog, missing: int, shard: Shard, model: Any = None
) -> None:
    """Load the model and generate every answer the log lacks; each batch is answered by all methods in turn.

    With several processes, those of this one's batches. A model that is loaded already is used as it is.

    Raises:
        VlmfixError: Loading or patching failed, memory or the disk is full; the answers so far are kept.
    """
    if model is None:
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
    answerer = Answerer(generator)
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
            for turn in ([s for s in batch if s.second is None], [s for s in batch if s.second is not None]):
                lacking = [
                    (spec, method, wanted)
                    for spec, method in methods
                    if (wanted := [plan.key(spec, s, log.records) not in log.records for s in turn]) and any(wanted)
                ]
                if not lacking:
                    continue
                read = {path: load_image(path) for path in dict.fromkeys(s.path for s in turn) if path is not None}
                images = [None if s.path is None else read[s.path] for s in turn]
                first, encoded = turn[0], None
                for spec, method, wanted in lacking:
                    prompts = [str(plan.prompt(spec, s, log.records)) for s in turn]
                    if encoded is None or prompts != encoded.prompts:  # A second turn holds the method's own answers.
                        encoded = EncodedBatch(generator, prompts, images)
                    if bar.n == 0:  # The first pass through a model is slow for reasons that are no method's fault.
                        answerer.answer(encoded, methods[0][0].label, None, first.records, 1)
                    place = f"{first.benchmark} {index + 1}/{len(plan.batches)}"
                    bar.set_description(f"{place} {spec.label}", refresh=False)
                    answers = answerer.answer(encoded, spec.label, method, first.records, first.max_new_tokens)
                    log.append(
                        _record(str(plan.key(spec, sample, log.records)), spec, sample, answer)
                        for sample, answer, want in zip(turn, answers, wanted, strict=True)
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
    if sample.second is not None:
        record["second"] = sample.second
    if sample.records == "gaps":
        record |= {"tokens": list(answer.tokens), "eos_gaps": list(answer.eos_gaps)}
    elif sample.records == "score":
        record["score"] = answer.score
    if answer.rows is not None:
        record["rows"] = answer.rows
    return {**record, "seconds": answer.seconds}
