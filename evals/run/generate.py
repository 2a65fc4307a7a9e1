"""Greedy answers of a model for batches of (image, question), with the logits the controls need."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList

from vlmfix.errors import VlmfixError
from vlmfix.model.anatomy import input_device
from vlmfix.observe.ask import end_token_ids, greedy

from ..data.samples import Answer, Records
from .models import answer_token_ids

#: Stands for a gap that is infinite (an end token that the generation settings forbid) or not a number.
LARGEST_GAP = 9999.0


class StepRecorder(LogitsProcessor):  # type: ignore[misc]
    """A logits processor that changes nothing and keeps two figures of every row.

    It runs behind the model's own logits processors, so it sees what greedy decoding takes the maximum of.
    """

    def __init__(self, end_ids: Sequence[int], yes_ids: Sequence[int] = (), no_ids: Sequence[int] = ()) -> None:
        """Record the end-token gap (where ``end_ids`` is not empty) and the first step's yes-minus-no score."""
        self._end_ids = list(end_ids)
        self._yes_ids = list(yes_ids)
        self._no_ids = list(no_ids)
        self._gaps: list[torch.Tensor] = []
        self._score: torch.Tensor | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Record from ``scores`` [B, V] (float) and hand it back untouched."""
        if self._end_ids:
            self._gaps.append(scores.amax(-1).float() - scores[:, self._end_ids].amax(-1).float())
        if self._yes_ids and self._score is None:
            logits = scores.float()
            self._score = logits[:, self._yes_ids].logsumexp(-1) - logits[:, self._no_ids].logsumexp(-1)
        return scores

    def gaps(self) -> list[list[float]]:
        """End-token gaps, one list of steps per row (all rows as long as the longest)."""
        if not self._gaps:
            return []
        gaps = torch.stack(self._gaps, dim=1)
        gaps = gaps.nan_to_num(LARGEST_GAP, LARGEST_GAP, -LARGEST_GAP).clamp(max=LARGEST_GAP)
        return [[round(value, 5) for value in row] for row in gaps.tolist()]

    def scores(self) -> list[float | None]:
        """Yes-minus-no of the first step, one per row; None where it is not finite."""
        if self._score is None:
            return []
        return [round(value, 5) if abs(value) < float("inf") else None for value in self._score.tolist()]


class PromptBuilder:
    """Turns a question into the text a processor expects.

    Args:
        processor: A transformers processor.
        use_template: Wrap the question into the processor's chat template (one user turn: image, then text).
            Otherwise the question must hold the processor's image placeholder itself, and there is one turn only.

    Raises:
        VlmfixError: A template is wanted and the processor has none.
    """

    def __init__(self, processor: Any, *, use_template: bool = True) -> None:
        self._processor = processor
        self.use_template = use_template
        if use_template and not getattr(processor, "chat_template", None):
            raise VlmfixError(
                f"this model's {type(processor).__name__} has no chat template; type --no-chat-template and give the "
                "whole prompt, such as --prompt 'USER: <image>\\nDescribe the image. ASSISTANT:' and "
                "--pope-prompt 'USER: <image>\\n{question} ASSISTANT:'"
            )

    def __call__(self, question: str, *, image: bool = True, before: Sequence[tuple[str, str]] = ()) -> str:
        """The prompt text of one question.

        Args:
            question: What the user says.
            image: Whether there is an image, which the first turn shows.
            before: Earlier turns: what the user said, and what was answered.

        Raises:
            VlmfixError: Without a template, when the text has no place for the image, or there are earlier turns.
        """
        if self.use_template:
            messages: list[dict[str, Any]] = []
            for said, answer in (*before, (question, "")):
                content = [{"type": "image"}] if image and not messages else []
                messages.append({"role": "user", "content": [*content, {"type": "text", "text": said}]})
                messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
            return str(self._processor.apply_chat_template(messages[:-1], add_generation_prompt=True))
        if before:
            raise VlmfixError("a second turn needs the chat template; leave --no-chat-template out")
        image_token = getattr(self._processor, "image_token", None)
        if not image:
            return question.replace(f"{image_token}\n", "").replace(str(image_token), "") if image_token else question
        if image_token and image_token not in question:
            raise VlmfixError(f"the prompt {question!r} has no place for the image; put {image_token} where it belongs")
        return question


class Generator:
    """Greedy batched generation with one model and processor."""

    def __init__(self, model: Any, processor: Any) -> None:
        """Look up the end tokens and the yes/no tokens once."""
        self.model = model
        self.processor = processor
        self._end_ids = end_token_ids(model)
        answers = answer_token_ids(processor.tokenizer)
        self._yes_ids, self._no_ids = answers["yes"], answers["no"]

    def encode(self, prompts: Sequence[str], images: Sequence[Any]) -> Any:
        """Left-padded model inputs on the CPU, for prompts with one image each, or all without (None)."""
        bos = self.processor.tokenizer.bos_token
        # A chat template that already wrote the first token must not get a second one.
        special = not (bos and prompts[0].startswith(bos))
        pictures = {} if images[0] is None else {"images": [[image] for image in images]}
        try:
            return self.processor(
                **pictures,
                text=list(prompts),
                padding=True,
                add_special_tokens=special,
                return_tensors="pt",
            )
        except (ValueError, TypeError) as error:
            raise VlmfixError(f"the processor rejects the prompt {prompts[0]!r}: {error}") from error

    def generate(self, inputs: Any, records: Records, max_new_tokens: int) -> list[Answer]:
        """Answer a batch.

        Args:
            inputs: From ``encode``.
            records: What is noted beside the text (see ``Sample.records``).
            max_new_tokens: Limit of generated tokens per row.
        """
        recorder = {
            "gaps": StepRecorder(self._end_ids),
            "score": StepRecorder((), self._yes_ids, self._no_ids),
            "text": StepRecorder(()),
        }[records]
        start = time.perf_counter()
        output = self.model.generate(
            **inputs.to(input_device(self.model), self.model.dtype),
            **self.decoding(max_new_tokens),
            logits_processor=LogitsProcessorList([recorder]),
        )
        # A decoder-only model repeats the prompt; an encoder-decoder model begins with one start token.
        start_token = 1 if self.model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
        rows = output[:, start_token:].tolist()
        seconds = round((time.perf_counter() - start) / len(rows), 6)
        gaps, scores = recorder.gaps(), recorder.scores()
        answers = []
        for index, row in enumerate(rows):
            length = next((i for i, token in enumerate(row) if token in self._end_ids), None)
            tokens = tuple(row[:length])
            text = self.processor.tokenizer.decode(tokens, skip_special_tokens=True).strip()
            steps = len(row) if length is None else length + 1
            answers.append(
                Answer(
                    text,
                    tokens,
                    truncated=length is None,
                    eos_gaps=tuple(gaps[index][:steps]) if gaps else (),
                    score=scores[index] if scores else None,
                    seconds=seconds,
                )
            )
        return answers

    def decoding(self, max_new_tokens: int) -> dict[str, Any]:
        """The keyword arguments of ``generate``: greedy, one beam, whatever the model's own settings are."""
        return greedy(max_new_tokens, self.processor.tokenizer.pad_token_id)
