"""Which answers a run needs, in which batches, and under which keys."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import groupby
from types import MappingProxyType
from typing import Any

from vlmfix.errors import DataError
from vlmfix.observe.prompts import PromptBuilder
from vlmfix.verification.ask import QUESTION

from ..benchmarks.base import SELF_VERIFICATION
from ..data.samples import Answer, Answers, Sample
from ..data.write import digest
from .answer_log import AnswerLog
from .methods import MethodSpec
from .plan import EvalRun
from .shards import Shard

LoggedAnswers = Mapping[str, Mapping[str, Any]]
"""Answers as the log keeps them, by key."""


class AnswerPlan:
    """The answers of a run.

    The batches do not depend on what is there already: an interrupted batch is generated again as a whole, so that a
    resumed run decodes exactly what an uninterrupted one does.

    Attributes:
        run: The run.
        batches: What is asked together: first turns, then the second turns behind their answers.
    """

    def __init__(self, run: EvalRun) -> None:
        self.run = run
        self._samples = tuple(run.tasks.samples())
        self._builder = PromptBuilder(run.source.processor, use_template=run.options.chat_template)
        firsts = {_shape(sample): sample for sample in self._samples}
        self._prompts = {shape: self._builder(s.question, image=s.path is not None) for shape, s in firsts.items()}
        self._bases = {
            (spec.label, *kind): self._base(spec, *kind)
            for spec in run.methods
            for kind in {(sample.benchmark, sample.records, sample.max_new_tokens) for sample in self._samples}
        }
        self.batches = list(self._batches())

    def _base(self, spec: MethodSpec, benchmark: str, records: str, max_new_tokens: int) -> str:
        """Return a digest of what decides an answer beside its prompt and image."""
        settings = self.run.settings
        return digest(
            {
                "benchmark": benchmark,
                "records": records,  # An answer without what is to be noted beside it is another one.
                "model": settings["model"],
                "method": settings["methods"][spec.label],
                "decoding": {**settings["decoding"], "max_new_tokens": max_new_tokens},
                "versions": settings["versions"],
            }
        )

    def _batches(self) -> Iterator[list[Sample]]:
        tokenizer = self.run.source.processor.tokenizer
        length = {shape: len(tokenizer(prompt)["input_ids"]) for shape, prompt in self._prompts.items()}
        for task in self.run.tasks.tasks:
            second = {sample.first: sample for sample in task.samples if sample.second is not None}
            # Questions about one image stand together, because they share what is read of it; of these and of those
            # without an image, prompts of one length, because they need no padding. Texts break ties.
            samples = sorted(
                (sample for sample in task.samples if sample.second is None),
                key=lambda s: (_kind(s), s.image_id, length[_shape(s)], s.question),
            )
            for _, alike in groupby(samples, _kind):
                group = list(alike)
                for start in range(0, len(group), self.run.batch_size):
                    batch = group[start : start + self.run.batch_size]
                    yield [*batch, *(second[sample] for sample in batch if sample in second)]

    def prompt(self, spec: MethodSpec, sample: Sample, records: LoggedAnswers) -> str | None:
        """Return what the processor reads; None if the answer that a second turn follows is not in the log."""
        if sample.second is None:
            return self._prompts[_shape(sample)]
        before = records.get(str(self.key(spec, sample.first, records)))
        if before is None:
            return None
        turns = ((sample.question, str(before["text"])),)
        return self._builder(sample.second, image=sample.path is not None, before=turns)

    def key(self, spec: MethodSpec, sample: Sample, records: LoggedAnswers = MappingProxyType({})) -> str | None:
        """Return the key of an answer: everything that decides it; None where ``prompt`` is None."""
        prompt = self.prompt(spec, sample, records)
        if prompt is None:
            return None
        base = self._bases[spec.label, sample.benchmark, sample.records, sample.max_new_tokens]
        return digest([base, prompt, self.run.tasks.image_digests[sample.path] if sample.path is not None else None])

    def asked_key(self, sample: Sample) -> str:
        """Return the key of what the unpatched model says about its answer to a sample."""
        return digest([self.key(self.run.methods[0], sample), QUESTION])

    def unasked(self, log: AnswerLog, shard: Shard | None = None) -> int:
        """Return how many answers the unpatched model is still to be asked about, of all or of those of a process."""
        if self.run.options.rescore:
            return 0
        return sum(
            self.run.is_asked_about(sample) and self.asked_key(sample) not in log.records
            for sample in self._owned(shard)
        )

    def _owned(self, shard: Shard | None) -> Iterator[Sample]:
        """Yield what is asked, by all processes or by one."""
        for number, batch in enumerate(self.batches):
            if shard is None or shard.owns(number):
                yield from batch

    def missing(self, log: AnswerLog, shard: Shard | None = None) -> int:
        """Return how many answers are not in the log: of all, or of those that a process is to give."""
        return sum(
            self.key(spec, sample, log.records) not in log.records
            for sample in self._owned(shard)
            for spec in self.run.methods
        )

    def answers(self, log: AnswerLog) -> dict[str, Answers]:
        """Return all answers by method label and ``Sample.key``."""
        found: dict[str, Answers] = {
            spec.label: {s.key: _answer(log.records[str(self.key(spec, s, log.records))]) for s in self._samples}
            for spec in self.run.methods
        }
        baseline = self.run.methods[0].label
        own = found[baseline] = dict(found[baseline])
        for sample in filter(self.run.is_asked_about, self._samples):
            told = log.records.get(self.asked_key(sample))
            if told is not None:
                own[sample.key] = replace(own[sample.key], asked=told["asked"], asked_seconds=told["seconds"])
        return found


def _shape(sample: Sample) -> tuple[str, bool]:
    """What a first turn's prompt depends on."""
    return sample.question, sample.path is not None


def _kind(sample: Sample) -> tuple[int, str, bool]:
    """What the samples of a batch have in common."""
    return sample.max_new_tokens, sample.records, sample.path is not None


def as_record(key: str, spec: MethodSpec, sample: Sample, answer: Answer) -> dict[str, Any]:
    """Return an answer as the log keeps it."""
    noted: dict[str, Any] = {} if sample.second is None else {"second": sample.second}
    if sample.records == "gaps":
        noted |= {"tokens": list(answer.tokens), "eos_gaps": list(answer.eos_gaps)}
    elif sample.records == "score":
        noted["score"] = answer.score
    if answer.rows is not None:
        noted["rows"] = answer.rows
    return {
        "key": key,
        "method": spec.label,
        "benchmark": sample.benchmark,
        "image_id": sample.image_id,
        "question": sample.question,
        "text": answer.text,
        "truncated": answer.truncated,
        **noted,
        "seconds": answer.seconds,
    }


def as_asked(key: str, sample: Sample, text: str, told: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the unpatched model says about its answer to a sample, as the log keeps it.

    Args:
        key: Its key.
        sample: What the answer is to.
        text: The answer.
        told: Of :meth:`~vlmfix.evals.run.mentions.Mentions.ask`.
    """
    where = {"benchmark": sample.benchmark, "image_id": sample.image_id, "question": sample.question}
    return {"key": key, "method": SELF_VERIFICATION, **where, "text": text, **told}


def _answer(record: Mapping[str, Any]) -> Answer:
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


def halved_batches(answers: Mapping[str, Answers]) -> list[dict[str, Any]]:
    """Return what ran in smaller batches than planned, because memory was full.

    Args:
        answers: Method label to its answers.

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
