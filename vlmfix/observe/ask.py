"""A model that answers samples while it is calibrated, and is left as it was found."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel

from vlmfix.engine.status import describe
from vlmfix.errors import DataError, MethodError, UnsupportedFeatureError, VlmfixError
from vlmfix.methods.base import Method
from vlmfix.methods.selection import resolve_layers
from vlmfix.model.anatomy import Anatomy, analyse, input_device
from vlmfix.observe.samples import CalibrationSample, Mentions
from vlmfix.observe.words import Mention, decode, locate_mentions
from vlmfix.patching import find_patch, patched


def greedy(max_new_tokens: int, pad_token_id: int | None) -> dict[str, Any]:
    """Return the keyword arguments of ``generate`` for one beam without sampling."""
    return {
        "do_sample": False,
        "num_beams": 1,
        "temperature": None,
        "top_p": None,
        "top_k": None,
        "max_new_tokens": max_new_tokens,
        "pad_token_id": pad_token_id,
    }


def end_token_ids(model: Any) -> tuple[int, ...]:
    """Return the ids that end a generated sequence: those of the generation settings, else of the language model."""
    ids = model.generation_config.eos_token_id
    if ids is None:
        ids = model.config.get_text_config(decoder=True).eos_token_id
    if ids is None:
        return ()
    return tuple(int(i) for i in ids) if isinstance(ids, (list, tuple)) else (int(ids),)


@dataclass(frozen=True)
class Session:
    """What every search needs.

    Attributes:
        anatomy: The model.
        processor: Its processor; the tokenizer pads on the left.
        prompt: Makes the prompt's text from a question.
        mentions: Finds the objects that a caption names, if the caller gave it.
        batch_size: Samples per forward.
        max_new_tokens: Limit of captions.
    """

    anatomy: Anatomy
    processor: Any
    prompt: Callable[[str], str]
    mentions: Mentions | None
    batch_size: int
    max_new_tokens: int

    @property
    def model(self) -> PreTrainedModel:
        """The model, free of wrappers."""
        return self.anatomy.model

    @property
    def tokenizer(self) -> Any:
        """The processor's tokenizer."""
        return self.processor.tokenizer

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers with softmax attention."""
        return tuple(sorted({site.layer_idx for site in self.anatomy.sites}))

    @property
    def heads(self) -> list[tuple[int, int]]:
        """All (layer, head) pairs."""
        return [(layer, head) for layer in self.layers for head in range(self.anatomy.num_heads)]

    def batches(self, samples: Sequence[CalibrationSample]) -> Iterator[Sequence[CalibrationSample]]:
        """Split samples into batches."""
        for start in range(0, len(samples), self.batch_size):
            yield samples[start : start + self.batch_size]

    def encode(self, samples: Sequence[CalibrationSample]) -> Any:
        """Return left-padded model inputs on the model's device.

        Raises:
            DataError: The processor rejects a sample, or a prompt has no image token.
        """
        prompts = [self.prompt(sample.question) for sample in samples]
        bos = self.tokenizer.bos_token
        try:
            inputs = self.processor(
                images=[[sample.load()] for sample in samples],
                text=prompts,
                padding=True,
                add_special_tokens=not (bos and prompts[0].startswith(bos)),  # a template may have written it already
                return_tensors="pt",
            )
        except (ValueError, TypeError) as error:
            raise DataError(f"The processor rejects the prompt {prompts[0]!r}: {error}") from error
        ids = torch.tensor(self.anatomy.image_token_ids)
        if not bool(torch.isin(inputs["input_ids"], ids).any(1).all()):
            raise DataError(f"The prompt {prompts[0]!r} has no place for the image. Pass prompt=... to make it.")
        return inputs.to(input_device(self.model), self.model.dtype)

    def first_logits(self, inputs: Any, method: Method | str = "none") -> torch.Tensor:
        """Return the logits that predict the first new token under a method: fp32 ``[batch, vocab]``."""
        last = "logits_to_keep" in inspect.signature(self.model.forward).parameters
        with patched(self.model, method):
            logits = self.model(**inputs, use_cache=False, **({"logits_to_keep": 1} if last else {})).logits
        result: torch.Tensor = logits[:, -1].float()
        return result

    def captions(self, inputs: Any, method: Method | str = "none") -> list[list[int]]:
        """Answer a batch greedily under a method: the generated ids of each row, without the end token."""
        with patched(self.model, method):
            output = self.model.generate(  # type: ignore[operator]
                **inputs, **greedy(self.max_new_tokens, self.tokenizer.pad_token_id)
            )
        ends = end_token_ids(self.model)
        rows = output[:, inputs["input_ids"].shape[1] :].tolist()
        return [row[: next((i for i, token in enumerate(row) if token in ends), None)] for row in rows]

    def locate(self, ids: Sequence[int]) -> tuple[list[Mention], int]:
        """Find the objects a caption names, see ``locate_mentions``."""
        assert self.mentions is not None
        return locate_mentions(self.tokenizer, ids, self.mentions(decode(self.tokenizer, ids)))

    def need_mentions(self, name: str) -> None:
        """Check that objects can be found in captions.

        Raises:
            MethodError: The caller gave no function for it.
        """
        if self.mentions is None:
            raise MethodError(
                f"{name} learns from the objects that captions name. Pass mentions=..., a function from a caption to "
                "(word, object) pairs in its order, such as lambda text: [('puppy', 'dog')]."
            )


@contextmanager
def open_session(
    model: object,
    processor: Any,
    prompt: Callable[[str], str] | None,
    mentions: Mentions | None,
    batch_size: int,
    max_new_tokens: int,
) -> Iterator[Session]:
    """Prepare a model and its processor; leave both as they were found, also after an exception."""
    for name, value in (("batch_size", batch_size), ("max_new_tokens", max_new_tokens)):
        if value < 1:
            raise MethodError(f"{name} must be at least 1, got {value}.")
    anatomy = analyse(model)
    if anatomy.projector is not None or any(site.kind != "joint" for site in anatomy.sites):
        raise UnsupportedFeatureError(
            f"{type(anatomy.model).__name__} cannot be calibrated: its answers do not come from a prompt with image "
            "tokens that its text attention reads. Pass what the method needs yourself: heads=[(layer, head), ...]."
        )
    processor = _find_processor(model, anatomy, processor)
    tokenizer = processor.tokenizer
    padding, pad_token = tokenizer.padding_side, tokenizer.pad_token
    try:
        tokenizer.padding_side = "left"  # the last row is each sample's last token
        if pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        with left_as_found(anatomy.model):
            yield Session(anatomy, processor, prompt or _make_prompt(processor), mentions, batch_size, max_new_tokens)
    finally:
        tokenizer.padding_side = padding
        if pad_token is None:
            tokenizer.pad_token = None


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


def _find_processor(model: object, anatomy: Anatomy, processor: Any) -> Any:
    if processor is None and not isinstance(model, torch.nn.Module):
        processor = getattr(model, "processor", None)  # a pipeline's
    name = anatomy.model.config._name_or_path
    if processor is None and name:
        from transformers import AutoProcessor

        try:
            processor = AutoProcessor.from_pretrained(name)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise VlmfixError(f"Cannot load the processor of {name!r} ({error}). Pass processor=...") from error
    if getattr(processor, "tokenizer", None) is None:
        raise VlmfixError(
            f"Calibration needs the model's processor, with a tokenizer; got {type(processor).__name__}. Pass "
            "processor=transformers.AutoProcessor.from_pretrained(...)."
        )
    return processor


def _make_prompt(processor: Any) -> Callable[[str], str]:
    """Wrap a question into the chat template; without one, the question is the whole prompt."""
    if not getattr(processor, "chat_template", None):
        return str

    def prompt(question: str) -> str:
        content = [{"type": "image"}, {"type": "text", "text": question}]
        return str(processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True))

    return prompt


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
