"""What the questions about one image share is read once: between questions, and between methods that leave it alone."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import BatchFeature

import vlmfix
from vlmfix.errors import UnsupportedFeatureError
from vlmfix.observe.ask import answer
from vlmfix.observe.prompts import encode

TOLERANCE = {torch.float32: 0.01, torch.bfloat16: 0.2, torch.float16: 0.1}
"""How far first logits may lie from those of whole prompts, in standard deviations of the logits, by the weights' type.
A prefix that does not fit its prompts shifts them by about one."""


@dataclass(frozen=True)
class _Read:
    """A prefix with the images that it shows, and the seconds that reading one of them took."""

    prefix: Any
    images: Sequence[Any]
    seconds: float


class Prefixes:
    """Reads and keeps the prefixes of the images that are asked about.

    Whether a method can go on from a prefix is looked at once: by the rows that it declares, and by comparing the first
    logits of two prompts with those of whole ones.

    Attributes:
        reason: Why this model shares no prefixes, or None.
        differences: By label of a method, the largest difference of first logits from those of whole prompts, in
            standard deviations.
    """

    def __init__(self, model: Any, processor: Any) -> None:
        self.reason: str | None = None
        self.differences: dict[str, float] = {}
        self._model, self._processor = model, processor
        self._whole: dict[str, str] = {}
        self._kept: dict[Any, _Read] = {}

    def forget(self, rows: int = 0) -> None:
        """Drop what is kept, before other images are asked about (by ``rows`` prompts) or when memory is needed."""
        self._kept.clear()

    def shared(
        self, label: str, method: Any, prompts: Sequence[str], images: Sequence[Any], inputs: Any
    ) -> tuple[Any, float | None]:
        """Return what ``generate`` needs to answer prompts from their images' prefixes, where that can be.

        Args:
            label: Of the method.
            method: The method, bound; it is on the model. None for a model without.
            prompts: The whole prompts.
            images: One image per prompt, the very same object for the same image.
            inputs: The prompts and images, encoded.

        Returns:
            The arguments, and the seconds that a prompt would have taken to read its prefix by itself; ``inputs`` and
            None where the prompts are to be read as a whole.
        """
        if images[0] is None or self.reason is not None or label in self._whole:
            return inputs, None
        if method is not None and not method.leaves_prefix:
            self._whole[label] = "edits or reads what stands before the text of its prompts"
            return inputs, None
        try:
            read = self._read(method, prompts, images)
            places = {id(image): place for place, image in enumerate(read.images)}
            rows = [places[id(image)] for image in images]
            if label not in self.differences:
                self.differences[label] = self._difference(read.prefix, prompts, images, rows)
                if self.differences[label] > TOLERANCE.get(self._model.dtype, 0.01):
                    self._whole[label] = "its first logits differ from those of whole prompts by more than rounding"
                    return inputs, None
            return BatchFeature(read.prefix.continued(inputs, rows)), read.seconds
        except UnsupportedFeatureError as error:
            self.reason = str(error)
            return inputs, None

    def _read(self, method: Any, prompts: Sequence[str], images: Sequence[Any]) -> _Read:
        """Read the prefix of every different image, or find it; methods that learn from it have one of their own."""
        firsts = [n for n, image in enumerate(images) if not any(image is other for other in images[:n])]
        shown = [images[n] for n in firsts]
        key = method if method is not None and method.reads_layer_input and not method.is_identity else None
        kept = self._kept.get(key)
        if kept is None or [id(image) for image in kept.images] != [id(image) for image in shown]:
            inputs = encode(self._processor, [prompts[n] for n in firsts], shown, self._model)
            start = _now(self._model)
            prefix = vlmfix.shared_prefix(self._model, inputs)
            kept = _Read(prefix, shown, (_now(self._model) - start) / len(shown))
            # Beside the one that methods share, no more than that of the method at hand.
            self._kept = {other: read for other, read in self._kept.items() if other is None} | {key: kept}
        return kept

    def _difference(self, prefix: Any, prompts: Sequence[str], images: Sequence[Any], rows: Sequence[int]) -> float:
        """Return how far first logits lie from those of whole prompts, in standard deviations, for two prompts."""
        two = [0, len(prompts) - 1][: len(prompts)]
        whole = encode(self._processor, [prompts[n] for n in two], [images[n] for n in two], self._model)
        continued = prefix.continued(whole, [rows[n] for n in two])
        found, expected = (answer(self._model, each, 1, logits=True).logits[0] for each in (continued, whole))
        both = found.isfinite() & expected.isfinite()  # some methods cut tokens off
        return float((found - expected)[both].abs().max() / expected[both].std())

    def summary(self) -> dict[str, Any]:
        """Return what was shared, for ``config.json``."""
        if self.reason is not None:
            return {"shared": False, "reason": self.reason}
        return {"shared": True, "differences": self.differences, "whole": self._whole}


def _now(model: Any) -> float:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()
