"""What every search needs: the stock model with its processor, means of per-head records, ranks, what was found."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from vlmfix.errors import DataError, MethodError, UnsupportedFeatureError, VlmfixError
from vlmfix.methods.base import Method
from vlmfix.model.anatomy import Anatomy, analyse
from vlmfix.observe.ask import Subject, left_as_found
from vlmfix.observe.prompts import PromptBuilder, encode, has_template
from vlmfix.observe.samples import CalibrationSample, Mentions
from vlmfix.observe.words import Mention, decode, locate_mentions

Head = tuple[int, int]


@dataclass(frozen=True)
class Session(Subject):
    """What every search needs. No method acts but those that a search names.

    Attributes:
        processor: The model's processor; its tokenizer pads on the left.
        prompt: Makes the prompt's text from a question.
        mentions: Finds the objects that a caption names, if the caller gave it.
        batch_size: Samples per forward.
        max_new_tokens: Limit of captions.
    """

    processor: Any
    prompt: Callable[[str], str]
    mentions: Mentions | None
    batch_size: int
    max_new_tokens: int

    @property
    def tokenizer(self) -> Any:
        """The processor's tokenizer."""
        return self.processor.tokenizer

    @property
    def heads(self) -> list[Head]:
        """All (layer, head) pairs."""
        return [(layer, head) for layer in self.layers() for head in range(self.anatomy.num_heads)]

    def batches(self, samples: Sequence[CalibrationSample]) -> Iterator[tuple[Sequence[CalibrationSample], Any]]:
        """Split samples into batches, each with the model's inputs."""
        for start in range(0, len(samples), self.batch_size):
            batch = samples[start : start + self.batch_size]
            yield batch, self.encode(batch)

    def encode(self, samples: Sequence[CalibrationSample]) -> Any:
        """Return left-padded model inputs on the model's device.

        Raises:
            DataError: The processor rejects a sample, or a prompt has no image token.
        """
        prompts = [self.prompt(sample.question) for sample in samples]
        inputs = encode(self.processor, prompts, [sample.load() for sample in samples], self.model)
        if not bool(self.anatomy.is_image(inputs["input_ids"]).any(1).all()):
            raise DataError(f"The prompt {prompts[0]!r} has no place for the image. Pass prompt=... to make it.")
        return inputs

    def captions(self, inputs: Any, *methods: Method) -> tuple[tuple[int, ...], ...]:
        """Answer a batch greedily under some methods: the generated ids of each sample, without the end token."""
        return self.answer(inputs, *methods, max_new_tokens=self.max_new_tokens).words

    def objects_in(
        self, sample: CalibrationSample, ids: Sequence[int], counts: Counter[str]
    ) -> list[tuple[Mention, bool]]:
        """Find the objects that a caption names.

        Args:
            sample: The sample that was described.
            ids: The caption.
            counts: Counts ``mentions``, words whose tokens are not clear (``unaligned``), and objects of which nobody
                says whether they are there (``unknown``).

        Returns:
            Those of which it is known, and whether they are there.
        """
        assert self.mentions is not None
        mentions, unaligned = locate_mentions(self.tokenizer, ids, self.mentions(decode(self.tokenizer, ids)))
        shown = [(mention, sample.shows(mention.name)) for mention in mentions]
        known = [(mention, is_there) for mention, is_there in shown if is_there is not None]
        counts.update(mentions=len(mentions), unaligned=unaligned, unknown=len(shown) - len(known))
        return known

    def need_answers(self, samples: Sequence[CalibrationSample], name: str) -> None:
        """Check that every sample is a yes/no question whose answer is known.

        Raises:
            DataError: One is not.
        """
        missing = sum(sample.answer is None for sample in samples)
        if missing:
            raise DataError(
                f"{name} learns from yes/no questions, and {missing} of {len(samples)} samples have no answer. Write "
                "CalibrationSample(image, 'Is there a dog in the image?', answer=True)."
            )

    def need_objects(self, samples: Sequence[CalibrationSample], name: str) -> None:
        """Check that every sample says what is in its image, and that objects can be found in captions.

        Raises:
            DataError: A sample does not.
            MethodError: The caller gave no function for it.
        """
        missing = sum(sample.objects is None for sample in samples)
        if missing:
            raise DataError(
                f"{name} learns from captions, and {missing} of {len(samples)} samples do not say what is in the "
                "image. Write CalibrationSample(image, 'Describe the image.', objects={'dog', 'person'})."
            )
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
    """Prepare a model and its processor; leave both as they were found, also after an exception.

    Raises:
        MethodError: A number below 1.
        UnsupportedFeatureError: The model reads no prompt with image tokens by self-attention.
        VlmfixError: There is no processor.
    """
    for name, value in (("batch_size", batch_size), ("max_new_tokens", max_new_tokens)):
        if value < 1:
            raise MethodError(f"{name} must be at least 1, got {value}.")
    anatomy = analyse(model)
    if not anatomy.reads_image_tokens:
        raise UnsupportedFeatureError(
            f"{type(anatomy.model).__name__} cannot be calibrated: its answers do not come from a prompt with image "
            "tokens that its text attention reads. Pass what the method needs yourself: heads=[(layer, head), ...]."
        )
    processor = _find_processor(model, anatomy, processor)
    if prompt is None:  # without a chat template, the question is the whole prompt
        prompt = PromptBuilder(processor) if has_template(processor) else str
    tokenizer = processor.tokenizer
    padding, pad_token = tokenizer.padding_side, tokenizer.pad_token
    try:
        tokenizer.padding_side = "left"  # the last row is each sample's last token
        if pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        with left_as_found(anatomy.model):
            yield Session(anatomy, (), processor, prompt, mentions, batch_size, max_new_tokens)
    finally:
        tokenizer.padding_side = padding
        if pad_token is None:
            tokenizer.pad_token = None


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


@dataclass
class Contrast:
    """Running means of records ``[layers, num_heads]`` in two classes; summed up in double precision.

    Attributes:
        sums: The two sums, by class.
        counts: How many records each has.
        dropped: Records that were not finite.
    """

    sums: dict[bool, torch.Tensor] = field(default_factory=dict)
    counts: dict[bool, int] = field(default_factory=lambda: {True: 0, False: 0})
    dropped: int = 0

    def add(self, record: torch.Tensor, positive: bool) -> None:
        """Add a record to a class, or drop it if a number in it is not finite."""
        record = record.double().cpu()
        if not bool(record.isfinite().all()):
            self.dropped += 1
            return
        self.sums[positive] = self.sums[positive] + record if positive in self.sums else record
        self.counts[positive] += 1

    def mean(self, positive: bool) -> torch.Tensor:
        """Return the mean of a class."""
        return self.sums[positive] / self.counts[positive]

    def difference(self) -> torch.Tensor:
        """Return the mean of the positive class minus that of the other one."""
        return self.mean(True) - self.mean(False)


@dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes:
        method: The method with it.
        counts: What it rests on.
        scores: Tables ``[layers, num_heads]`` by name.
        layers: The layers of the tables.
        options: The search's options, resolved.
    """

    method: Method
    counts: dict[str, int]
    scores: dict[str, torch.Tensor]
    layers: tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict)


def ranked(scores: torch.Tensor, layers: Sequence[int]) -> list[Head]:
    """Return the heads of a table ``[layers, num_heads]`` by descending score; ties in model order."""
    order = scores.flatten().argsort(descending=True, stable=True).tolist()
    heads = scores.shape[1]
    return [(layers[index // heads], index % heads) for index in order]


def scaled_count(published: int, num_heads: int) -> int:
    """Scale a number of heads from a model of 1024 heads to one of ``num_heads``: a heuristic; at least 1."""
    return max(1, round(published / 1024 * num_heads))
