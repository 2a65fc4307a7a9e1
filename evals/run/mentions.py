"""What the unpatched model says when it is asked for the objects that its own answers name."""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from vlmfix.errors import VlmfixError
from vlmfix.observe.ask import left_as_found
from vlmfix.verification.ask import Asked, Questioner
from vlmfix.verification.judge import first_places

from .generate import is_out_of_memory

_PROMPT = "Please describe this image in detail."
"""Shows the image; the questions go on behind what it shares with them."""


class Mentions:
    """Asks "Is there a dog in the image?" for every object that an answer names, once for all controls of a run.

    Objects are found in English text by closed word lists (see ``vlmfix.verify``), not by a benchmark's list of
    objects, which would be finder and judge at once.

    Args:
        model: The model, without a patch.
        processor: Its processor.
        batch_size: Questions per forward.

    Attributes:
        reason: Why the model cannot be asked; None where it can.
    """

    def __init__(self, model: Any, processor: Any, batch_size: int) -> None:
        self._model = model
        self.reason: str | None = None
        try:
            self._questioner = Questioner(model, processor, batch_size=batch_size, blind=False)
        except VlmfixError as error:
            self.reason = str(error)

    def ask(self, images: Sequence[Any], texts: Sequence[str]) -> list[dict[str, Any]]:
        """Ask about some answers.

        Args:
            images: One per answer.
            texts: The answers.

        Returns:
            Per answer ``asked``, object -> log odds of yes, and ``seconds``. Where the model cannot be asked, ``asked``
            is None and ``reason`` says why.
        """
        names = [list(first_places(text)) for text in texts]
        start = time.perf_counter()
        told: list[dict[str, Asked]] = []
        try:
            if self.reason is None:
                with left_as_found(self._model):
                    told = self._told(images, names)
        except VlmfixError as error:
            self.reason = str(error)
        if self.reason is not None:
            return [{"asked": None, "reason": self.reason, "seconds": 0.0} for _ in texts]
        seconds = round((time.perf_counter() - start) / len(texts), 6)
        return [
            {"asked": {name: round(said.with_image, 5) for name, said in each.items()}, "seconds": seconds}
            for each in told
        ]

    def summary(self) -> dict[str, Any]:
        """What asking has cost, or why it is not possible, for ``config.json``."""
        return {"reason": self.reason} if self.reason is not None else asdict(self._questioner.cost)

    def _told(self, images: Sequence[Any], names: Sequence[list[str]]) -> list[dict[str, Asked]]:
        """Ask about all images at once, or half by half where memory is too small."""
        if not any(names):
            return [{} for _ in names]
        try:
            return self._questioner.look_at(images, _PROMPT).ask(names)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        if len(images) == self._questioner.batch_size == 1:
            raise VlmfixError("out of memory with a single question")
        gc.collect()
        torch.cuda.empty_cache()
        self._questioner.batch_size = (self._questioner.batch_size + 1) // 2
        middle = (len(images) + 1) // 2
        return self._told(images[:middle], names[:middle]) + self._told(images[middle:], names[middle:])
