"""Lets a model answer: greedily or along a given answer, with watching methods beside those of its patch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel

from vlmfix.engine.calls import parameter_names
from vlmfix.engine.status import describe
from vlmfix.errors import MethodError, UnsupportedFeatureError
from vlmfix.methods.base import Method
from vlmfix.methods.none import NoMethod
from vlmfix.methods.selection import resolve_layers
from vlmfix.model.anatomy import FORWARD_KWARG, Anatomy, analyse
from vlmfix.observe.unfinished import answered_in_stages, can_drop
from vlmfix.patching import find_patch, patched

Answers = Sequence[Sequence[int]]
"""Token ids per sample of a batch."""


@dataclass(frozen=True)
class Answered:
    """What a model answered.

    Attributes:
        tokens: Generated (or given) ids per sample, an end token included.
        has_end: Whether a sample's last id is an end token; else the answer was cut off.
        logits: Per step, fp32 ``[batch, vocab]``, before any processor; empty unless asked for.
        rows: Per step, the samples that the model and its logits processors saw; empty where it was always all.
    """

    tokens: tuple[tuple[int, ...], ...]
    has_end: tuple[bool, ...]
    logits: tuple[torch.Tensor, ...] = ()
    rows: tuple[tuple[int, ...], ...] = ()

    @property
    def words(self) -> tuple[tuple[int, ...], ...]:
        """The ids without the end token."""
        return tuple(ids[:-1] if ended else ids for ids, ended in zip(self.tokens, self.has_end, strict=True))

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


def answer(
    model: Any,
    inputs: Mapping[str, Any],
    max_new_tokens: int = 1,
    *,
    answers: Answers | None = None,
    logits: bool = False,
    processors: Sequence[LogitsProcessor] = (),
    drop_ended: bool = False,
) -> Answered:
    """Let a model answer a batch by one beam without sampling, whatever its own generation settings are.

    Args:
        model: A Hugging Face model, patched or not.
        inputs: What ``model.generate`` takes, where the model reads it; left-padded.
        max_new_tokens: Limit of every answer; with ``answers``, their length counts.
        answers: Ids to give instead of the model's own choice.
        logits: Whether to keep the logits of every step.
        processors: Logits processors that act after the model's own.
        drop_ended: Whether samples whose answer has ended leave the batch, where model and patch allow it: the others
            come sooner, and equal up to rounding. Not with ``answers`` or ``logits``.

    Returns:
        What was answered.
    """
    if answers is not None:
        max_new_tokens = max(map(len, answers))
        processors = (*processors, GivenAnswer(answers, _padding_id(model)))
    ends = end_token_ids(model)
    seen: Sequence[tuple[int, ...]] = ()
    if drop_ended and can_drop(model, len(inputs["input_ids"])):
        go_on = partial(_generated, model, processors=processors)
        rows, seen = answered_in_stages(go_on, inputs, max_new_tokens, ends)
    else:
        out = _generated(model, inputs, max_new_tokens, processors=processors, output_logits=logits)
        # A decoder-only model repeats the prompt; an encoder-decoder model begins with one start token.
        rows = out.sequences[:, 1 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1] :].tolist()
    if answers is None:
        stops = [next((i + 1 for i, token in enumerate(row) if token in ends), len(row)) for row in rows]
    else:  # generate stops where every sample of the batch has ended
        rows = [list(each[: len(row)]) for each, row in zip(answers, rows, strict=True)]
        stops = list(map(len, rows))
    tokens = tuple(tuple(row[:stop]) for row, stop in zip(rows, stops, strict=True))
    has_end = tuple(ids[-1] in ends for ids in tokens)
    return Answered(tokens, has_end, tuple(each.float() for each in out.logits or ()) if logits else (), tuple(seen))


def _generated(
    model: Any, inputs: Mapping[str, Any], max_new_tokens: int, *, processors: Sequence[LogitsProcessor], **more: Any
) -> Any:
    return model.generate(
        **inputs,
        do_sample=False,
        num_beams=1,
        temperature=None,
        top_p=None,
        top_k=None,
        max_new_tokens=max_new_tokens,
        pad_token_id=_padding_id(model),
        logits_processor=LogitsProcessorList(processors),
        return_dict_in_generate=True,
        **more,
    )


def next_logits(model: Any, inputs: Mapping[str, Any], rows: int = 1, **options: Any) -> torch.Tensor:
    """Read a batch in one forward, without a cache, and return the logits of its last rows.

    Args:
        model: A Hugging Face model, patched or not.
        inputs: What ``model.forward`` takes; left-padded.
        rows: How many rows.
        **options: Further arguments of the forward.

    Returns:
        fp32 ``[batch, rows, vocab]``.
    """
    keep = {"logits_to_keep": rows} if "logits_to_keep" in parameter_names(model) else {}
    logits: torch.Tensor = model(**inputs, **{"use_cache": False, **keep, **options}).logits[:, -rows:]
    return logits.float()


def stock_logits(model: Any, inputs: Mapping[str, Any], rows: int = 1, **options: Any) -> torch.Tensor:
    """Return the same for the stock model; a patch that is on it stays there and does nothing."""
    stock = {} if find_patch(model) is None else {FORWARD_KWARG: None}
    with left_as_found(model):
        return next_logits(model, inputs, rows, **stock, **options)


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


def end_token_ids(model: Any) -> tuple[int, ...]:
    """Return the ids that end a generated sequence: those of the generation settings, else of the language model."""
    ids = model.generation_config.eos_token_id
    if ids is None:
        ids = model.config.get_text_config(decoder=True).eos_token_id
    return _listed(ids)


def _padding_id(model: Any) -> int:
    """Return the id behind answers that end before others; nothing reads it."""
    return next((each for each in _listed(model.generation_config.pad_token_id) if each >= 0), 0)


def _listed(ids: Any) -> tuple[int, ...]:
    if ids is None:
        return ()
    return tuple(int(i) for i in ids) if isinstance(ids, (list, tuple)) else (int(ids),)


@dataclass(frozen=True)
class Subject:
    """A model that is looked at, with the methods that act meanwhile.

    Attributes:
        anatomy: The model.
        methods: The methods of its patch; none for the stock model.
    """

    anatomy: Anatomy
    methods: tuple[Method, ...]

    @property
    def model(self) -> PreTrainedModel:
        """The model, free of wrappers."""
        return self.anatomy.model

    @property
    def patch(self) -> str | None:
        """What acts, described; ``None`` for the stock model."""
        return describe(self.methods) if self.methods else None

    def layers(self, wanted: Sequence[int] | str | None = None) -> tuple[int, ...]:
        """Return the layers with softmax attention among those wanted (``None``: all)."""
        there = sorted({site.layer_idx for site in self.anatomy.sites})
        if wanted is None:
            return tuple(there)
        chosen = set(resolve_layers(wanted, self.anatomy.num_layers, "layers"))
        if not chosen & set(there):
            raise MethodError(f"layers={wanted!r}: this model has softmax attention in layers {there} only.")
        return tuple(layer for layer in there if layer in chosen)

    @contextmanager
    def acting(self, *more: Method) -> Iterator[None]:
        """Let the subject's methods act, with more beside them, on the model in evaluation mode; then restore it."""
        first = [method for method in more if method.edits_heads]  # before those of the patch scale heads
        behind = [method for method in more if not method.edits_heads]
        # A patch of its own, so that nothing counts.
        with left_as_found(self.model), patched(self.model, [*first, *self.methods, *behind] or [NoMethod()]):
            yield

    def answer(
        self,
        inputs: Mapping[str, Any],
        *more: Method,
        max_new_tokens: int = 1,
        answers: Answers | None = None,
        logits: bool = False,
    ) -> Answered:
        """Let the model answer greedily, or give it the answers, by cached decoding.

        Args:
            inputs: What ``model.generate`` takes, left-padded.
            *more: Methods beside the subject's own: what watches, or cuts.
            max_new_tokens: Limit of the answers; with ``answers``, their length counts.
            answers: Ids to give instead of the model's own choice.
            logits: Whether to keep the logits of every step.

        Returns:
            What was answered.

        Raises:
            MethodError: ``max_new_tokens`` below 1, or ``answers`` that do not fit the batch or the vocabulary.
        """
        if answers is not None:
            answers = _checked(answers, len(inputs["input_ids"]), self.anatomy.text_config.vocab_size)
        elif max_new_tokens < 1:
            raise MethodError(f"max_new_tokens must be at least 1, got {max_new_tokens}.")
        with self.acting(*more):
            return answer(self.model, inputs, max_new_tokens, answers=answers, logits=logits)

    def next_logits(self, inputs: Mapping[str, Any], *more: Method) -> torch.Tensor:
        """Return the logits that predict the first new token, without a cache: fp32 ``[batch, vocab]``."""
        with self.acting(*more):
            return next_logits(self.model, inputs)[:, -1]


@contextmanager
def left_as_found(model: PreTrainedModel) -> Iterator[None]:
    """Put a model into evaluation mode, and leave it as it was found, also after an exception."""
    training = [(module, module.training) for module in model.modules()]
    # Qwen's models keep positions of the last prompt beside their weights.
    kept = [(module, vars(module)["rope_deltas"]) for module in model.modules() if "rope_deltas" in vars(module)]
    try:
        model.eval()
        yield
    finally:
        for module, was_training in training:
            module.training = was_training
        for module, deltas in kept:
            vars(module)["rope_deltas"] = deltas


def look_at(model: object, probe: str, inputs: Mapping[str, Any]) -> Subject:
    """Prepare a model for a probe: what acts on it goes on acting.

    Raises:
        UnsupportedFeatureError: The model reads no prompt with image tokens by self-attention, a method that decodes
            from two branches or rewrites answers acts, or the inputs hold no ``input_ids`` or are padded on the right.
    """
    anatomy = analyse(model)
    if not anatomy.reads_image_tokens:
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
    for method in methods:
        if method.is_identity or not (method.replaces_logits or method.rewrites_answers):
            continue
        conflict = (
            f"the forwards that choose an answer's words, and {method.name} leaves words out of it afterwards"
            if method.rewrites_answers
            else f"one branch of an answer, and {method.name} decodes from two"
        )
        raise UnsupportedFeatureError(
            f"{probe} looks at {conflict}. Let the patched model answer, then give its words to the stock model: "
            f"vlmfix.unpatch(model); {probe}(..., answers=[ids])."
        )
    return Subject(anatomy, methods)


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
