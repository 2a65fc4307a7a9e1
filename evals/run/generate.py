"""Greedy answers of a model to batches of (image, question), with the logits the controls need.

A batch that does not fit into memory is halved, and what did not fit is not tried again.
"""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from transformers import LogitsProcessor

import vlmfix
from vlmfix.errors import VlmfixError
from vlmfix.model.devices import input_device
from vlmfix.observe.ask import answer, end_token_ids
from vlmfix.observe.prompts import encode
from vlmfix.observe.words import YesNo, yes_no_tokens

from ..data.samples import Answer, Records
from .features import ImageFeatures
from .prefixes import Prefixes

#: Stands for a gap that is infinite (an end token that the generation settings forbid) or not a number.
LARGEST_GAP = 9999.0

logger = logging.getLogger("vlmfix.evals")

_MESSAGES = ("DefaultCPUAllocator: can't allocate memory", "MPS backend out of memory", "CUDA error: out of memory")
"""How devices without an error class of their own say that memory is full."""


class StepRecorder(LogitsProcessor):  # type: ignore[misc]
    """A logits processor that changes nothing and records two figures of every row.

    It runs behind the model's own logits processors, so it sees what greedy decoding takes the maximum of.
    """

    def __init__(self, end_ids: Sequence[int] = (), words: YesNo | None = None) -> None:
        """Record the end-token gap (where there are ``end_ids``) and the first step's log odds of yes."""
        self._end_ids = list(end_ids)
        self._words = words
        self._gaps: list[torch.Tensor] = []
        self._score: torch.Tensor | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Record from ``scores`` [B, V] (float) and return it unchanged."""
        if self._end_ids:
            self._gaps.append(scores.amax(-1).float() - scores[:, self._end_ids].amax(-1).float())
        if self._words is not None and self._score is None:
            self._score = self._words.log_odds(scores)
        return scores

    def gaps(self, rows: Sequence[Sequence[int]] = ()) -> list[list[float]]:
        """Return the end-token gaps, a list of steps per sample.

        Args:
            rows: Per step, the samples that were there; by default all of them in all steps.
        """
        if not self._gaps:
            return []
        known = torch.cat(self._gaps).nan_to_num(LARGEST_GAP, LARGEST_GAP, -LARGEST_GAP).clamp(max=LARGEST_GAP)
        found: list[list[float]] = [[] for _ in self._gaps[0]]
        samples = [sample for step in rows or [range(len(found))] * len(self._gaps) for sample in step]
        for sample, value in zip(samples, known.tolist(), strict=True):
            found[sample].append(round(value, 5))
        return found

    def scores(self) -> list[float | None]:
        """Return yes minus no of the first step, one per row; None where it is not finite."""
        if self._score is None:
            return []
        return [round(value, 5) if abs(value) < float("inf") else None for value in self._score.tolist()]


class Generator:
    """Greedy batched generation with one model and processor."""

    def __init__(self, model: Any, processor: Any) -> None:
        """Look up the end tokens and the yes/no tokens once."""
        self.model = model
        self.processor = processor
        self._end_ids = end_token_ids(model)
        self._words = yes_no_tokens(processor.tokenizer)

    def generate(self, inputs: Any, records: Records, max_new_tokens: int) -> list[Answer]:
        """Answer a batch.

        Args:
            inputs: From ``vlmfix.observe.prompts.encode``, on the CPU.
            records: What is noted beside the text (see ``Sample.records``).
            max_new_tokens: Limit of generated tokens per row.
        """
        recorder = {
            "gaps": StepRecorder(self._end_ids),
            "score": StepRecorder(words=self._words),
            "text": StepRecorder(),
        }[records]
        start = time.perf_counter()
        inputs = inputs.to(input_device(self.model), self.model.dtype)
        answered = answer(self.model, inputs, max_new_tokens, processors=[recorder], drop_ended=True)
        seconds = round((time.perf_counter() - start) / len(answered.tokens), 6)
        gaps, scores = recorder.gaps(answered.rows), recorder.scores()
        return [
            Answer(
                self.processor.tokenizer.decode(words, skip_special_tokens=True).strip(),
                words,
                truncated=not answered.has_end[index],
                eos_gaps=tuple(gaps[index][: len(answered.tokens[index])]) if gaps else (),
                score=scores[index] if scores else None,
                seconds=seconds,
            )
            for index, words in enumerate(answered.words)
        ]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device (or the CPU) has too little memory left."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(message in str(error) for message in _MESSAGES)


class EncodedBatch:
    """Prompts with one image each (or all without), and their model inputs, also of parts of the batch.

    Nothing is encoded before it is asked for: a part that a batch was split into is padded to its own longest prompt.

    Attributes:
        prompts: What the processor reads.
        images: Per prompt; the very same object for the same image.
    """

    def __init__(self, generator: Generator, prompts: Sequence[str], images: Sequence[Any]) -> None:
        self.prompts = prompts
        self.images = images
        self._generator = generator
        self._inputs: dict[tuple[int, int], Any] = {}

    def __len__(self) -> int:
        return len(self.prompts)

    def inputs(self, start: int, stop: int) -> Any:
        """Return the model inputs of the rows from ``start`` to ``stop``, on the CPU; kept for the next method."""
        if (start, stop) not in self._inputs:
            self._inputs[start, stop] = encode(
                self._generator.processor, self.prompts[start:stop], self.images[start:stop]
            )
        return self._inputs[start, stop]


class Answerer:
    """Answers batches, in halves where memory is too small for the whole.

    What did not fit is remembered per method (some need more than others): a batch of as many rows or more, and as many
    tokens or more, is halved without trying. So the parts that answer a batch do not depend on which batches were
    answered before it, as long as memory decides by rows and tokens alone.

    Args:
        generator: Gives the answers.
        features: Encodes every image of a batch once; None encodes them as the model does.
        prefixes: Reads what the questions about an image share once; None reads whole prompts.
    """

    def __init__(
        self, generator: Generator, features: ImageFeatures | None = None, prefixes: Prefixes | None = None
    ) -> None:
        self._generator = generator
        self._features = features
        self._prefixes = prefixes
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
        answers: list[Answer] = []
        parts = [(0, len(batch))]  # from the last to the next
        while parts:
            start, stop = parts.pop()
            rows = stop - start
            tokens = batch.inputs(start, stop)["input_ids"].shape[1] + max_new_tokens
            if not self._is_too_large(label, rows, tokens):
                found = self._attempt(batch, start, stop, label, method, records, max_new_tokens)
                if found is not None:
                    answers += found if rows == len(batch) else [replace(each, rows=rows) for each in found]
                    continue
                self._make_room(label, rows, tokens)
            if rows == 1:
                raise VlmfixError(
                    f"out of memory with a single sample ({label}, {tokens} tokens): free some memory, or type "
                    "--dtype float16, --device auto or a smaller --max-new-tokens; the answers written so far are kept"
                )
            middle = start + (rows + 1) // 2
            parts += [(middle, stop), (start, middle)]
        return answers

    def _is_too_large(self, label: str, rows: int, tokens: int) -> bool:
        return any(rows >= other and tokens >= length for other, length in self._too_large.get(label, ()))

    def _make_room(self, label: str, rows: int, tokens: int) -> None:
        """Remember what did not fit. The error is gone by now, and with it its frames, which held the tensors."""
        for kept in (self._features, self._prefixes):
            if kept is not None:
                kept.forget()
        gc.collect()
        torch.cuda.empty_cache()
        self._too_large.setdefault(label, []).append((rows, tokens))
        if rows > 1:
            logger.warning("%s: %d rows of %d tokens do not fit into memory; half as many", label, rows, tokens)

    def _attempt(
        self,
        batch: EncodedBatch,
        start: int,
        stop: int,
        label: str,
        method: Any,
        records: Records,
        max_new_tokens: int,
    ) -> list[Answer] | None:
        """Return the answers of some rows, or None where memory was too small; the model is as before either way."""
        try:
            with ExitStack() as stack:
                if method is not None:
                    stack.enter_context(vlmfix.patched(self._generator.model, method))
                if self._features is not None:
                    stack.enter_context(self._features.reused())
                inputs, seconds = batch.inputs(start, stop), None
                if self._prefixes is not None:
                    inputs, seconds = self._prefixes.shared(
                        label, method, batch.prompts[start:stop], batch.images[start:stop], inputs
                    )
                if self._features is not None:
                    self._features.saved = 0.0
                answers = self._generator.generate(inputs, records, max_new_tokens)
                if seconds is None:  # Times count as if every answer had read its own image.
                    seconds = 0.0 if self._features is None else self._features.saved / len(answers)
                return [replace(each, seconds=round(each.seconds + seconds, 6)) for each in answers]
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return None
