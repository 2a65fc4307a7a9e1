"""A model while it is looked at: greedy or given answers under a watching method, and no trace left."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel

from vlmfix.activity import describe
from vlmfix.anatomy import Anatomy, analyse
from vlmfix.calibration.session import left_as_found
from vlmfix.errors import MethodError, UnsupportedFeatureError
from vlmfix.greedy import end_token_ids, greedy
from vlmfix.methods.base import Method, resolve_layers
from vlmfix.patching import find_patch, patched

Answers = Sequence[Sequence[int]]
"""Token ids per sample of a batch."""


@dataclass(frozen=True)
class Answered:
    """What a model answered.

    Attributes:
        tokens: Generated (or given) ids per sample, an end token included.
        logits: Per step, fp32 ``[batch, vocab]``, before any processor; empty unless asked for.
    """

    tokens: tuple[tuple[int, ...], ...]
    logits: tuple[torch.Tensor, ...] = ()

    @property
    def steps(self) -> int:
        """Length of the longest answer."""
        return max(map(len, self.tokens))

    @property
    def behind(self) -> torch.Tensor:
        """Which steps lie behind the end of a sample's answer: bool ``[batch, steps]``."""
        return torch.arange(self.steps) >= torch.tensor([[len(each)] for each in self.tokens])

    def log_probs(self) -> torch.Tensor:
        """Return the log probability of every token, fp32 ``[batch, steps]`` on the CPU, NaN behind the last."""
        rows = [[*each, *[0] * (self.steps - len(each))] for each in self.tokens]
        ids = torch.tensor(rows)
        by_step = [
            logits.log_softmax(-1).gather(1, ids[:, step, None].to(logits.device))[:, 0].cpu()
            for step, logits in enumerate(self.logits[: self.steps])
        ]
        return torch.stack(by_step, dim=1).masked_fill(self.behind, float("nan"))


@dataclass(frozen=True)
class Subject:
    """A model that is looked at, with the patch that is on it.

    Attributes:
        anatomy: The model.
        methods: The methods of its patch; none for a stock model.
        patch: Their description.
    """

    anatomy: Anatomy
    methods: tuple[Method, ...]
    patch: str | None

    @property
    def model(self) -> PreTrainedModel:
        """The model, free of wrappers."""
        return self.anatomy.model

    def layers(self, wanted: Sequence[int] | str | None) -> tuple[int, ...]:
        """Return the layers with softmax attention among those wanted (``None``: all)."""
        there = sorted({site.layer_idx for site in self.anatomy.sites})
        if wanted is None:
            return tuple(there)
        chosen = set(resolve_layers(wanted, self.anatomy.num_layers, "layers"))
        if not chosen & set(there):
            raise MethodError(f"layers={wanted!r}: this model has softmax attention in layers {there} only.")
        return tuple(layer for layer in there if layer in chosen)

    @contextmanager
    def watched(self, *watches: Method) -> Iterator[None]:
        """Put watching methods beside those of the patch, and take them off again."""
        with left_as_found(self.model):
            if not watches and not self.methods:
                yield
                return
            first = [watch for watch in watches if watch.edits_heads]  # before methods scale them in their own layer
            behind = [watch for watch in watches if not watch.edits_heads]
            with patched(self.model, [*first, *self.methods, *behind]):  # a patch of its own, so that nothing counts
                yield

    def answer(
        self,
        inputs: Mapping[str, Any],
        *watches: Method,
        max_new_tokens: int = 1,
        answers: Answers | None = None,
        logits: bool = False,
    ) -> Answered:
        """Let the model answer greedily, or give it the answers, by cached decoding.

        Args:
            inputs: What ``model.generate`` takes, left-padded.
            *watches: What watches.
            max_new_tokens: Limit of the answers; with ``answers``, their length counts.
            answers: Ids to give instead of the model's own choice.
            logits: Whether to keep the logits of every step.

        Returns:
            What was answered.
        """
        if answers is not None:
            answers = _checked(answers, len(inputs["input_ids"]), self.anatomy.text_config.vocab_size)
            max_new_tokens = max(map(len, answers))
        if max_new_tokens < 1:
            raise MethodError(f"max_new_tokens must be at least 1, got {max_new_tokens}.")
        filler = _first_id(self.model.generation_config.pad_token_id, 0)  # type: ignore[union-attr]
        given = None if answers is None else LogitsProcessorList([GivenAnswer(answers, filler)])
        with self.watched(*watches):
            out = self.model.generate(  # type: ignore[operator]
                **inputs,
                **greedy(max_new_tokens, filler),
                logits_processor=given,
                output_logits=logits,
                return_dict_in_generate=True,
            )
        told = out.sequences[:, inputs["input_ids"].shape[1] :].tolist()
        if answers is None:
            tokens = self._cut(told)
        else:  # generate stops where every sample of the batch has ended
            tokens = tuple(tuple(each[: len(row)]) for each, row in zip(answers, told, strict=True))
        return Answered(tokens, tuple(each.float() for each in out.logits or ()))

    def _cut(self, rows: list[list[int]]) -> tuple[tuple[int, ...], ...]:
        ends = end_token_ids(self.model)
        stops = [next((i + 1 for i, token in enumerate(row) if token in ends), len(row)) for row in rows]
        return tuple(tuple(row[:stop]) for row, stop in zip(rows, stops, strict=True))


class GivenAnswer(LogitsProcessor):  # type: ignore[misc]
    """Makes ``generate`` choose given tokens, and a filler behind them."""

    def __init__(self, answers: Answers, filler: int) -> None:
        self._answers = answers
        self._filler = filler
        self._step = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Leave one token possible in each row of ``[batch, vocab]``."""
        step, self._step = self._step, self._step + 1
        wanted = [each[step] if step < len(each) else self._filler for each in self._answers]
        ids = torch.tensor(wanted, device=scores.device)[:, None]
        return torch.full_like(scores, -torch.inf).scatter(1, ids, 0.0)


def look_at(model: object, probe: str, inputs: Mapping[str, Any]) -> Subject:
    """Prepare a model for a probe.

    Raises:
        UnsupportedFeatureError: The model reads no prompt with image tokens by self-attention, or the inputs hold no
            ``input_ids``.
    """
    anatomy = analyse(model)
    if anatomy.kinds != {"joint"} or anatomy.projector is not None:
        raise UnsupportedFeatureError(
            f"{probe} looks at self-attention over a prompt that holds the image's tokens, which "
            f"{type(anatomy.model).__name__} has not: {_reason(anatomy)}. Use a model whose prompt holds image tokens "
            "(LLaVA, Qwen-VL, InternVL, Gemma 3, Idefics 3, ...)."
        )
    ids = inputs.get("input_ids") if isinstance(inputs, Mapping) else None
    if not isinstance(ids, torch.Tensor) or ids.dim() != 2:
        raise UnsupportedFeatureError(
            f"{probe} needs the processor's output with input_ids [batch, length]: {probe}(model, processor(...))."
        )
    mask = inputs.get("attention_mask")
    if isinstance(mask, torch.Tensor) and mask.dim() == 2 and not bool(mask[:, -1].all()):
        raise UnsupportedFeatureError(
            f"{probe} lets the model answer, so prompts must end in the last column. Pad on the left: "
            "processor.tokenizer.padding_side = 'left'."
        )
    patch = find_patch(model)
    methods = () if patch is None else patch.methods
    decoding = [method.name for method in methods if method.replaces_logits and not method.is_identity]
    if decoding:
        raise UnsupportedFeatureError(
            f"{probe} looks at one branch of an answer, and {decoding[0]} decodes from two. Let the patched model "
            f"answer, then give its words to the stock model: vlmfix.unpatch(model); {probe}(..., answers=[ids])."
        )
    return Subject(anatomy, methods, describe(methods) if methods else None)


def _reason(anatomy: Anatomy) -> str:
    if anatomy.encoder is not None:
        return "an encoder reads its prompt"
    if anatomy.projector is not None:
        return "its image features are merged into the prompt before the language model sees any ids"
    return "its image features are keys of cross-attention"


def _checked(answers: Answers, batch: int, vocab_size: int) -> Answers:
    answers = [[int(token) for token in each] for each in answers]
    if len(answers) != batch or not all(answers):
        raise MethodError(f"answers must hold at least one token id for each of {batch} samples, got {answers!r}.")
    outside = [token for each in answers for token in each if not 0 <= token < vocab_size]
    if outside:
        raise MethodError(f"answers hold ids outside the vocabulary of {vocab_size}: {outside[:5]}.")
    return answers


def _first_id(ids: Any, default: int) -> int:
    if isinstance(ids, (list, tuple)):
        return int(ids[0])
    return default if ids is None else int(ids)
