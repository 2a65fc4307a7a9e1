"""Which answers a run needs: its samples in batches, their prompts, and the key of every answer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import groupby
from types import MappingProxyType
from typing import Any

from vlmfix.errors import DataError

from .cache import AnswerLog, digest
from .config import MethodSpec
from .generate import PromptBuilder
from .planning import EvalRun
from .samples import Answer, Answers, Sample
from .shards import Shard

#: Answers as the log keeps them, by key.
LoggedAnswers = Mapping[str, Mapping[str, Any]]


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
            (spec.label, sample.benchmark, sample.records, sample.max_new_tokens): ""
            for spec in run.methods
            for sample in run.tasks.samples()
        }
        for label, benchmark, records, limit in self._bases:
            self._bases[label, benchmark, records, limit] = digest(
                {
                    "benchmark": benchmark,
                    "records": records,  # An answer without what is to be noted beside it is another one.
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

    def prompt(self, spec: MethodSpec, sample: Sample, records: LoggedAnswers) -> str | None:
        """What the processor reads; None if the answer that a second turn follows is not in the log."""
        if sample.second is None:
            return self._prompts[_shape(sample)]
        before = records.get(str(self.key(spec, sample.first, records)))
        if before is None:
            return None
        turns = ((sample.question, str(before["text"])),)
        return self._builder(sample.second, image=sample.path is not None, before=turns)

    def key(self, spec: MethodSpec, sample: Sample, records: LoggedAnswers = MappingProxyType({})) -> str | None:
        """The key of one answer: everything that decides it; None where ``prompt`` is None."""
        prompt = self.prompt(spec, sample, records)
        if prompt is None:
            return None
        base = self._bases[spec.label, sample.benchmark, sample.records, sample.max_new_tokens]
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
