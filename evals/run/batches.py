"""Batches that fit into memory: one that does not is halved, and what did not fit is not tried again."""

from __future__ import annotations

import dataclasses
import gc
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import groupby
from types import MappingProxyType
from typing import Any

import torch

import vlmfix
from vlmfix.errors import DataError, VlmfixError

from ..data.samples import Answer, Answers, Records, Sample
from ..data.write import digest
from .answer_log import AnswerLog
from .features import ImageFeatures
from .generate import Generator, PromptBuilder
from .methods import MethodSpec
from .plan import EvalRun
from .shards import Shard

logger = logging.getLogger("vlmfix.evals")


#: How devices without an error class of their own say that memory is full.
_MESSAGES = ("DefaultCPUAllocator: can't allocate memory", "MPS backend out of memory", "CUDA error: out of memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device (or the CPU) has too little memory left."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(message in str(error) for message in _MESSAGES)


class EncodedBatch:
    """Prompts with one image each (or all without), and their model inputs, also of parts of the batch.

    Attributes:
        prompts: What the processor reads.
    """

    def __init__(self, generator: Generator, prompts: Sequence[str], images: Sequence[Any]) -> None:
        """Encode nothing yet: a part that a batch was split into is padded to its own longest prompt."""
        self.prompts = prompts
        self._generator = generator
        self._images = images
        self._inputs: dict[tuple[int, int], Any] = {}

    def __len__(self) -> int:
        return len(self.prompts)

    def inputs(self, start: int, stop: int) -> Any:
        """Model inputs of the rows from ``start`` to ``stop``, on the CPU; kept for the next method."""
        if (start, stop) not in self._inputs:
            self._inputs[start, stop] = self._generator.encode(self.prompts[start:stop], self._images[start:stop])
        return self._inputs[start, stop]


class Answerer:
    """Answers batches, in halves where memory is too small for the whole.

    What did not fit is remembered per method (some need more than others): a batch of as many rows or more, and as many
    tokens or more, is halved without trying. So the parts that answer a batch do not depend on which batches were
    answered before it, as long as memory decides by rows and tokens alone.
    """

    def __init__(self, generator: Generator, features: ImageFeatures | None = None) -> None:
        """Answer with ``generator``, and with ``features`` encode every image of a batch once."""
        self._generator = generator
        self._features = features
        self._too_large: dict[str, list[tuple[int, int]]] = {}

    def answer(
        self, batch: EncodedBatch, label: str, method: Any, records: Records, max_new_tokens: int
    ) -> list[Answer]:
        """Answer every row of a batch, in its order.

        Args:
            batch: What to answer.
            label: Under which to remember what did not fit.
            method: What to patch the model with; None leaves it alone.
            records: What is noted beside the text (see ``Sample.records``).
            max_new_tokens: Limit of generated tokens per row.

        Raises:
            VlmfixError: One row alone does not fit.
        """
        attempt = partial(self._attempt, batch, method, records, max_new_tokens)
        return self._answer(batch, label, attempt, max_new_tokens, 0, len(batch))

    def _answer(
        self,
        batch: EncodedBatch,
        label: str,
        attempt: Callable[[int, int], list[Answer] | None],
        max_new_tokens: int,
        start: int,
        stop: int,
    ) -> list[Answer]:
        rows = stop - start
        tokens = batch.inputs(start, stop)["input_ids"].shape[1] + max_new_tokens
        if not any(rows >= known_rows and tokens >= known for known_rows, known in self._too_large.get(label, ())):
            answers = attempt(start, stop)
            if answers is not None:
                return answers if rows == len(batch) else [dataclasses.replace(a, rows=rows) for a in answers]
            # Out here the error is gone, and with it its frames, which held the tensors.
            if self._features is not None:
                self._features.forget()
            gc.collect()
            torch.cuda.empty_cache()
            self._too_large.setdefault(label, []).append((rows, tokens))
            if rows > 1:
                logger.warning("%s: %d rows of %d tokens do not fit into memory; half as many", label, rows, tokens)
        if rows == 1:
            raise VlmfixError(
                f"out of memory with a single sample ({label}, {tokens} tokens): free some memory, "
                "or type --dtype float16, --device auto or a smaller --max-new-tokens; the answers written so far are "
                "kept"
            )
        middle = start + (rows + 1) // 2
        parts = ((start, middle), (middle, stop))
        return [answer for part in parts for answer in self._answer(batch, label, attempt, max_new_tokens, *part)]

    def _attempt(
        self, batch: EncodedBatch, method: Any, records: Records, max_new_tokens: int, start: int, stop: int
    ) -> list[Answer] | None:
        """The answers of some rows, or None where memory was too small; the model is as before either way."""
        inputs = batch.inputs(start, stop)
        try:
            with ExitStack() as stack:
                if method is not None:
                    stack.enter_context(vlmfix.patched(self._generator.model, method))
                if self._features is None:
                    return self._generator.generate(inputs, records, max_new_tokens)
                stack.enter_context(self._features.reused())
                self._features.saved = 0.0
                answers = self._generator.generate(inputs, records, max_new_tokens)
                saved = self._features.saved / len(answers)
                return [dataclasses.replace(a, seconds=round(a.seconds + saved, 6)) for a in answers]
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return None


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
