"""What a patch did so far, and how it describes itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from vlmfix.methods.base import Method

if TYPE_CHECKING:
    from vlmfix.run import Run


class Counters:
    """What a patch did so far. Edits are added up on the device they happen on, without waiting for it."""

    def __init__(self, num_methods: int) -> None:
        self.prompts = 0
        self.prompts_without_image = 0
        self.decode_steps = 0
        self._num_methods = num_methods
        self._edited: dict[torch.device, torch.Tensor] = {}

    def add(self, run: Run) -> None:
        """Add a finished forward."""
        self.prompts += run.is_prefill
        self.prompts_without_image += run.is_prefill and not run.state.any_image
        self.decode_steps += not run.is_prefill
        for index, counts in enumerate(run.edited):
            if counts:
                total = torch.stack([count.to(counts[0].device) for count in counts]).sum()
                self._total(total.device)[index].add_(total)

    def _total(self, device: torch.device) -> torch.Tensor:
        if device not in self._edited:
            with torch.inference_mode(False):
                self._edited[device] = torch.zeros(self._num_methods, dtype=torch.int64, device=device)
        return self._edited[device]

    def edited(self) -> tuple[int, ...]:
        """Edited (sample, head, row) triples per method; waits for the device."""
        totals = [0] * self._num_methods
        for counts in self._edited.values():
            totals = [total + count for total, count in zip(totals, counts.tolist(), strict=True)]
        return tuple(totals)


@dataclasses.dataclass(frozen=True)
class Status:
    """What is active on a model.

    Attributes:
        model: The model's class name.
        methods: The methods, bound to the model: layers and dimensions resolved.
        layers: Layers with at least one edit.
        image_token_ids: Ids taken for image tokens.
        prompts: Prompts (prefills) seen so far.
        prompts_without_image: Those among them without any image token: exact no-ops.
        decode_steps: Decode forwards so far.
        edited: Per method, edited (sample, head, row) triples so far: the proof that it acts.
        notes: What to know about the methods on this model.
    """

    model: str
    methods: tuple[Method, ...]
    layers: tuple[int, ...]
    image_token_ids: tuple[int, ...]
    prompts: int
    prompts_without_image: int
    decode_steps: int
    edited: tuple[int, ...]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        """A few readable lines."""
        lines = [
            f"{self.model} patched with {describe(self.methods)}",
            f"  layers {', '.join(map(str, self.layers))}; image token ids {', '.join(map(str, self.image_token_ids))}",
            f"  {self.prompts} prompts ({self.prompts_without_image} without an image), "
            f"{self.decode_steps} decode steps",
        ]
        for method, edited in zip(self.methods, self.edited, strict=True):
            lines.append(f"  {method.name}: {edited} head rows edited")
        return "\n".join(lines + [f"  note: {note}" for note in self.notes])


def describe(methods: Sequence[Method]) -> str:
    """Name methods with their parameters."""
    return " + ".join(repr(method) for method in methods)
