"""Measures what vlmfix does on a family: every cell of the capability matrix comes from running its tiny model.

A cell is ``yes`` or a word that says what else happened; the note behind it becomes a footnote. When something fails
under a patch, the unpatched model is run in the same way: if that fails too, the cell says ``upstream``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from method_parameters import IN_FORWARDS, parameters_of
from PIL import Image
from transformers import AttentionInterface, BatchFeature

import vlmfix
from families import Family
from families.precision import double_precision
from families.tiny_llava import Sample, generate
from vlmfix.engine.attention_function import ATTENTION_NAME
from vlmfix.methods.base import Method
from vlmfix.model.anatomy import analyse

TOLERANCE = 1e-5
DOUBLE_TOLERANCE = 1e-11
VISIBLE = 1e-3
"""Least change of a logit that counts as an effect."""
TOKENS = 5
LONG = 14
"""Tokens after which a window of 12 has left the image behind."""
REFUSALS = (vlmfix.UnsupportedModelError, vlmfix.UnsupportedFeatureError, vlmfix.MethodError)


@dataclass(frozen=True)
class Cell:
    """One cell of the matrix.

    Attributes:
        mark: One word.
        note: Why, if not plainly ``yes``.
    """

    mark: str
    note: str = ""


YES = Cell("yes")


@dataclass(frozen=True)
class Probe(Method):
    """Doubles the weights of image keys: no choice, nothing learned, visible wherever the image mask is right.

    It tells whether masks, caches and batches line up, whatever methods are registered.
    """

    name: ClassVar[str] = "probe"
    edits_weights: ClassVar[bool] = True
    needs_text_keys: ClassVar[bool] = False

    def edit_weights(self, attn_weights: torch.Tensor, layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
        image = layer.keys("image", attn_weights)
        rows = image.any(1)[:, None, None].expand(attn_weights.shape[:3])
        return attn_weights * (1 + image[:, None, None].to(attn_weights.dtype)), rows


class Trial:
    """A family's model, with what the unpatched model answers."""

    def __init__(self, family: Family) -> None:
        self.family = family
        self.model = family.build()

    # Prompts.

    @cached_property
    def single(self) -> dict[str, torch.Tensor]:
        """A batch of one prompt with one image."""
        return self.family.collate([self.family.single()])

    def alone(self, samples: Sequence[Sample]) -> list[dict[str, torch.Tensor]]:
        """Each prompt by itself."""
        return [self.family.collate([sample]) for sample in samples]

    # Runs.

    def logits(self, inputs: dict[str, torch.Tensor], tokens: int = TOKENS, **options: Any) -> torch.Tensor:
        """Logits of every greedy step ``[batch, tokens, vocab]``."""
        return generate(self.model, inputs, tokens, **options)[1]

    @cached_property
    def stock(self) -> torch.Tensor:
        """What the unpatched model answers to the single prompt."""
        assert vlmfix.status(self.model) is None
        return self.logits(self.single)

    @cached_property
    def text(self) -> dict[str, torch.Tensor]:
        """A prompt without an image."""
        return self.family.collate([self.family.text()])

    @cached_property
    def stock_text(self) -> torch.Tensor:
        """What the unpatched model answers to it."""
        assert vlmfix.status(self.model) is None
        return self.logits(self.text)

    @contextmanager
    def patched(self, method: str | Method, **parameters: Any) -> Iterator[Any]:
        """The model under a method; stock afterwards."""
        vlmfix.patch(self.model, method, **parameters)
        try:
            yield self.model
        finally:
            vlmfix.unpatch(self.model)

    def acting(self, *methods: tuple[str | Method, dict[str, Any]]) -> Iterator[tuple[str | Method, dict[str, Any]]]:
        """Those methods, with their parameters, that the model is not refused."""
        for method, parameters in methods:
            try:
                vlmfix.patch(self.model, method, **parameters)
            except REFUSALS:
                continue
            vlmfix.unpatch(self.model)
            yield method, parameters

    def batch_error(self, samples: Sequence[Sample]) -> float:
        """How far a padded batch is from its prompts one by one."""
        together = self.logits(self.family.collate(samples), 4)
        apart = [self.logits(inputs, 4) for inputs in self.alone(samples)]
        return max(difference(each[0], together[row]) for row, each in enumerate(apart))

    def is_batch_error_rounding(self, samples: Sequence[Sample]) -> bool:
        """Whether nothing of it is left in double precision."""
        doubled = [replace(each, pixels=None if each.pixels is None else each.pixels.double()) for each in samples]
        with double_precision(self.model):
            return self.batch_error(doubled) <= DOUBLE_TOLERANCE

    @cached_property
    def batchable(self) -> tuple[str, tuple[Sample, ...]] | None:
        """The most varied prompts for which the unpatched model's batch equals its prompts one by one, by name."""
        for name, samples in (("ragged", self.family.ragged()), ("even", self.family.even())):
            if self.batch_error(samples) <= TOLERANCE:
                return name, samples
        return None

    @cached_property
    def refusal(self) -> Cell | None:
        """Why the family is refused as a whole, if it is."""
        try:
            with self.patched("none"):
                return None
        except REFUSALS as error:
            return refused(error)

    # The columns.

    def sites(self) -> Cell:
        """Text attention modules that reach vlmfix, of those there are."""
        with self.patched("none"), watched() as seen:
            self.logits(self.single)
            found = {id(site.module) for site in analyse(self.model).sites}
        mark = f"{len(seen.modules & found)}/{self.family.attention}"
        if seen.modules != found:
            return Cell(mark, "attention modules that dispatch and those found by structure differ")
        return Cell(mark)

    def identity(self) -> Cell:
        """Whether a patch of strength zero, and taking a patch off, leave every bit.

        And whether what VHR does beside its edits, an image-free pass through the model, leaves no trace: next to
        strength zero, answers are next to those of the stock model.
        """
        forward = self.family.forward(self.model, self.single).logits
        stock = self.stock
        with self.patched("none"):
            same = torch.equal(self.family.forward(self.model, self.single).logits, forward)
            same &= torch.equal(self.logits(self.single), stock)
        with self.patched(Probe()):
            self.logits(self.single, 2)
        traceless = True
        for method, parameters in self.acting(("vhr", {"layers": ":", "alpha": 1 + 1e-6})):
            with self.patched(method, **parameters):
                traceless = difference(self.logits(self.single), stock) < 1e-4
        same &= torch.equal(self.family.forward(self.model, self.single).logits, forward)
        same &= torch.equal(self.logits(self.single), stock)
        if not same:
            return Cell("no")
        return YES if traceless else Cell("no", "the image-free pass of vhr changes the answer by itself")

    def image_mask(self) -> Cell:
        """Whether the image tokens found are those whose embedding the model replaces."""
        inputs = self.family.collate(self.family.ragged())
        expected = self.family.visual_mask(inputs["input_ids"]) & inputs["attention_mask"].bool()
        with self.patched("none"), watched() as seen:
            self.logits(inputs, 1)
        masks = [mask for mask in seen.masks if mask.shape == expected.shape]
        if not self.family.visual_ids:
            return Cell("-", "no token of the prompt stands for an image")
        if not masks:
            return Cell("no", "no image mask of the prompt's shape was seen")
        return YES if all(torch.equal(mask, expected) for mask in masks) else Cell("no")

    def text_only(self) -> Cell:
        """Whether a prompt without an image is answered bit for bit by the stock model."""
        if not self.family.text_only:
            return Cell("-", "takes no prompt without an image")
        stock = self.stock_text
        for method, parameters in self.acting((Probe(), {}), ("vhr", {"layers": ":"})):
            with self.patched(method, **parameters):
                if not torch.equal(self.logits(self.text), stock):
                    return Cell("no")
        return YES

    def generation(self) -> Cell:
        """Whether ``generate`` reads one prompt, decodes step by step and shows the edits."""
        stock = self.stock
        with self.patched(Probe()):
            changed = difference(self.logits(self.single), stock) > VISIBLE
            status = vlmfix.status(self.model)
        assert status is not None
        if (status.prompts, status.prompts_without_image, status.decode_steps) != (1, 0, TOKENS - 1):
            return Cell("no", f"status counts {status.prompts} prompts and {status.decode_steps} decode steps")
        return YES if changed and status.edited[0] > 0 else Cell("no effect")

    def pipeline(self) -> Cell:
        """Whether a pipeline around the model can be patched, and answers what ``generate`` answers."""
        from transformers import ImageTextToTextPipeline

        pipe = ImageTextToTextPipeline(model=self.model, processor=StandInProcessor(self.single), device="cpu")
        options = {"max_new_tokens": TOKENS, "generate_kwargs": {"do_sample": False}, "return_tensors": True}
        with self.patched(Probe()):
            expected = self.model.generate(**self.single, max_new_tokens=TOKENS, do_sample=False)
        vlmfix.patch(pipe, Probe())
        try:
            (found,) = pipe(images=Image.new("RGB", (8, 8)), text="?", **options)
            status = vlmfix.status(pipe)
        finally:
            vlmfix.unpatch(pipe)
        assert status is not None
        if status.edited[0] == 0:
            return Cell("no effect")
        return YES if torch.equal(found["generated_token_ids"], expected[0]) else Cell("no")

    def batch(self) -> Cell:
        """Whether a left-padded batch of unequal prompts equals its prompts one by one."""
        if self.batchable is None:
            return Cell("upstream", "the unpatched model's batch differs from its prompts one by one")
        name, samples = self.batchable
        with self.patched(Probe()):
            same = self.batch_error(samples) <= TOLERANCE
        if not same:
            return Cell("no")
        return (
            YES if name == "ragged" else Cell("yes", "one image per prompt: else the unpatched model's batch differs")
        )

    def cache(self) -> Cell:
        """Whether decoding with a cache agrees with recomputing everything at every step."""
        return self._agrees({}, {"use_cache": False})

    def static_cache(self) -> Cell:
        """Whether a static cache agrees with a dynamic one."""
        return self._agrees({}, {"cache_implementation": "static"})

    def sliding(self) -> Cell:
        """Whether that holds beyond the window of sliding layers."""
        config = self.model.config.get_text_config(decoder=True)
        kinds = set(getattr(config, "layer_types", None) or ())
        if getattr(config, "sliding_window", None) is None or kinds == {"full_attention"}:
            if "chunked_attention" not in kinds:
                return Cell("-")
        return self._agrees({}, {"use_cache": False}, LONG)

    def _agrees(self, first: dict[str, Any], second: dict[str, Any], tokens: int = TOKENS) -> Cell:
        """Whether two ways of generating agree under the probe, if they do without."""
        stock = self.stock if tokens == TOKENS and not first else self.logits(self.single, tokens, **first)
        try:
            if difference(self.logits(self.single, tokens, **second), stock) > TOLERANCE:
                return Cell("upstream", "the unpatched model's answers differ in the same way")
        except Exception as error:
            return Cell("upstream", f"the unpatched model fails: {brief(error)}")
        with self.patched(Probe()):
            one, two = self.logits(self.single, tokens, **first), self.logits(self.single, tokens, **second)
        if difference(one, stock) <= VISIBLE:
            return Cell("no effect")
        return YES if difference(one, two) <= TOLERANCE else Cell("no")

    def beams(self) -> Cell:
        """Whether beam search on a batch finds what it finds prompt by prompt."""
        if self.batchable is None:
            return Cell("upstream", "the unpatched model's batch differs from its prompts one by one")
        samples = self.batchable[1]
        try:
            if not self._beams_agree(samples):
                return Cell("upstream", "the unpatched model's beams of a batch differ from those one by one")
        except Exception as error:
            return Cell("upstream", f"the unpatched model fails: {brief(error)}")
        with self.patched(Probe()):
            return YES if self._beams_agree(samples) else Cell("no")

    def _beams_agree(self, samples: Sequence[Sample]) -> bool:
        ids, scores = self._beams(self.family.collate(samples))
        for row, inputs in enumerate(self.alone(samples)):
            alone_ids, alone_scores = self._beams(inputs)
            if not torch.equal(ids[row], alone_ids[0]) or difference(scores[row], alone_scores[0]) > 10 * TOLERANCE:
                return False
        return True

    def _beams(self, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        options = {"max_new_tokens": 4, "num_beams": 3, "do_sample": False, "return_dict_in_generate": True}
        with torch.no_grad():
            out = self.model.generate(**inputs, **options, output_scores=True)
        return out.sequences[:, -4:], out.sequences_scores

    def method(self, name: str) -> Cell:
        """Whether a method acts: edits are counted and the answer changes.

        A batch must equal its prompts one by one, and a prompt without an image be answered by the stock model.
        """
        if vlmfix.list_methods()[name].searches:
            return self.search(name)
        stock = self.stock
        samples = None if self.batchable is None else self.batchable[1]
        stock_text = self.stock_text if self.family.text_only else None
        with self.patched(name, **parameters_of(name, self.model)):
            changed = difference(self.logits(self.single), stock) > TOLERANCE
            status = vlmfix.status(self.model)
            same = samples is None or self.batch_error(samples) <= TOLERANCE
            is_rounding = not same and self.is_batch_error_rounding(samples)
            edits_text = stock_text is not None and not torch.equal(self.logits(self.text), stock_text)
        assert status is not None
        if edits_text:
            return Cell("edits text", "a prompt without an image is not answered by the stock model")
        if status.edited[0] == 0 or not changed:
            return Cell(
                "no-op", "edits are counted, answers do not change" if status.edited[0] else "nothing is edited"
            )
        if is_rounding:
            return Cell(
                "active", "a batch differs from its prompts one by one by rounding, which double precision proves"
            )
        return Cell("active") if same else Cell("batch differs", "a batch differs from its prompts one by one")

    def search(self, name: str) -> Cell:
        """Whether a search of beams acts: candidates are counted and the best beam or its score changes.

        A prompt without an image must be answered by plain beams. Where the unpatched model cannot search beams over an
        image, the same search without a penalty stands in for its beams.
        """
        parameters, note = parameters_of(name, self.model), ""
        try:
            beams = [self._beams(self.single)]
        except Exception as error:
            note = f"compared with the search at strength zero: the unpatched model's beams fail: {brief(error)}"
            with self.patched(name, **{**parameters, "penalty_weights": 0.0}):
                beams = [self._beams(self.single)]
        inputs = [self.single]
        if self.family.text_only:
            inputs.append(self.text)
            beams.append(self._beams(inputs[1]))
        with self.patched(name, **parameters):
            found = [self._beams(each) for each in inputs]
            status = vlmfix.status(self.model)
        assert status is not None
        if any(
            not torch.equal(*pair)
            for ours in zip(beams[1:], found[1:], strict=True)
            for pair in zip(*ours, strict=True)
        ):
            return Cell("edits text", "a prompt without an image is not answered by plain beams")
        if status.edited[0] == 0 or difference(found[0][1], beams[0][1]) <= TOLERANCE:
            return Cell("no-op", "plain beams find the same")
        return Cell("active", note)


MACHINERY: dict[str, Callable[[Trial], Cell]] = {
    "sites": Trial.sites,
    "strength 0": Trial.identity,
    "image mask": Trial.image_mask,
    "text only": Trial.text_only,
    "generate": Trial.generation,
    "pipeline": Trial.pipeline,
    "batch": Trial.batch,
    "cache": Trial.cache,
    "static": Trial.static_cache,
    "sliding": Trial.sliding,
    "beams": Trial.beams,
}
"""The columns that do not depend on a method."""


def method_columns() -> tuple[str, ...]:
    """The methods registered that act in forwards, the identity left out.

    Those that rewrite answers need words. They take the models whose prompts share a prefix, which
    ``tests/plugin/engine/test_prefix.py`` measures for every family.
    """
    return tuple(name for name in IN_FORWARDS if name != "none")


def measure(trial: Trial, column: str) -> Cell:
    """Measure one cell. Never raises: what goes wrong is what the cell says."""
    try:
        if trial.refusal is not None:
            return trial.refusal
        if column in MACHINERY:
            return MACHINERY[column](trial)
        return trial.method(column)
    except REFUSALS as error:
        return refused(error)
    except Exception as error:
        vlmfix.unpatch(trial.model)
        try:
            trial.logits(trial.single)
        except Exception as stock_error:
            return Cell("upstream", f"the unpatched model fails: {brief(stock_error)}")
        return Cell("error", brief(error))


def measure_family(family: Family, columns: Sequence[str] | None = None) -> dict[str, Cell]:
    """Measure a row of the matrix, or some columns of it."""
    reason = family.unavailable()
    columns = (*MACHINERY, *method_columns()) if columns is None else columns
    if reason is not None:
        return dict.fromkeys(columns, Cell("absent", reason))
    try:
        trial = Trial(family)
    except Exception as error:
        return dict.fromkeys(columns, Cell("upstream", f"cannot be built: {brief(error)}"))
    return {column: measure(trial, column) for column in columns}


# Helpers.


class StandInProcessor:
    """Gives a pipeline a family's own inputs, whatever it is asked: no family's processor can be had offline."""

    chat_template = tokenizer = feature_extractor = image_processor = None

    def __init__(self, inputs: dict[str, torch.Tensor]) -> None:
        self.inputs = inputs

    def __call__(self, **options: Any) -> BatchFeature:
        return BatchFeature(dict(self.inputs))


@dataclass
class Seen:
    """What went through vlmfix's attention function.

    Attributes:
        modules: The ids of the modules.
        masks: The image masks of their runs.
    """

    modules: set[int]
    masks: list[torch.Tensor]


@contextmanager
def watched() -> Iterator[Seen]:
    """Watch the attention function in transformers' registry."""
    registry = AttentionInterface()
    attention = registry[ATTENTION_NAME]
    seen = Seen(set(), [])

    def watching(module: Any, *args: Any, **kwargs: Any) -> Any:
        seen.modules.add(id(module))
        mask = getattr(kwargs.get("vlmfix"), "image_mask", None)
        if isinstance(mask, torch.Tensor):
            seen.masks.append(mask)
        return attention(module, *args, **kwargs)

    AttentionInterface.register(ATTENTION_NAME, watching)
    try:
        yield seen
    finally:
        AttentionInterface.register(ATTENTION_NAME, attention)


def difference(one: torch.Tensor, two: torch.Tensor) -> float:
    """The largest difference; infinite for unequal shapes or where only one is a number."""
    if one.shape != two.shape:
        return float("inf")
    gap = (one.double() - two.double()).abs().masked_fill(one == two, 0.0)
    return float(gap.nan_to_num(nan=float("inf")).max())


def refused(error: Exception) -> Cell:
    """A refusal, with its reason."""
    return Cell("refused", brief(error))


def brief(error: BaseException) -> str:
    """An error in one line that is the same in every run."""
    text = re.sub(r"0x[0-9a-f]+", "0x...", " ".join(str(error).split()))
    text = re.sub(r"\b\w+For(ConditionalGeneration|CausalLM|VisionText2Text)\b", "the model", text)
    if isinstance(error, REFUSALS):
        return text
    text = text if len(text) <= 200 else text[:199] + "…"
    return f"{type(error).__name__}: {text}"
