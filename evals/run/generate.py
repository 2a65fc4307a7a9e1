"""Greedy answers of a model for batches of (image, question), with the logits the controls need."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from transformers import LogitsProcessor

from vlmfix.model.devices import input_device
from vlmfix.observe.ask import answer, end_token_ids
from vlmfix.observe.words import YesNo, yes_no_tokens

from ..data.samples import Answer, Records

#: Stands for a gap that is infinite (an end token that the generation settings forbid) or not a number.
LARGEST_GAP = 9999.0


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

    def gaps(self) -> list[list[float]]:
        """Return the end-token gaps, one list of steps per row (all rows as long as the longest)."""
        if not self._gaps:
            return []
        gaps = torch.stack(self._gaps, dim=1)
        gaps = gaps.nan_to_num(LARGEST_GAP, LARGEST_GAP, -LARGEST_GAP).clamp(max=LARGEST_GAP)
        return [[round(value, 5) for value in row] for row in gaps.tolist()]

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
        answered = answer(self.model, inputs, max_new_tokens, processors=[recorder])
        seconds = round((time.perf_counter() - start) / len(answered.tokens), 6)
        gaps, scores = recorder.gaps(), recorder.scores()
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
