"""A model that answers samples while it is calibrated, and is left as it was found."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from vlmfix.anatomy import Anatomy, analyse
from vlmfix.calibration.samples import CalibrationSample, Mentions
from vlmfix.calibration.words import Mention, decode, locate_mentions
from vlmfix.devices import input_device
from vlmfix.errors import DataError, MethodError, UnsupportedFeatureError, VlmfixError
from vlmfix.greedy import end_token_ids, greedy
from vlmfix.methods.base import Method
from vlmfix.patching import patched


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
