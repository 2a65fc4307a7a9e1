"""What a patch did so far, and how it describes itself."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

import torch

from vlmfix.methods.base import Method
from vlmfix.methods.views import Forward


class Counters:
    """Counts what a patch did so far, on the device where it happens, without waiting for it.

    Everything is a tensor: a Python number that changes in every forward would make compiled code compile again.
    """

    PROMPTS, WITHOUT_IMAGE, DECODE_STEPS, NUM_FORWARD_COUNTS = range(4)

    def __init__(self, num_methods: int) -> None:
        self._size = self.NUM_FORWARD_COUNTS + num_methods
        self._totals: dict[torch.device, torch.Tensor] = {}
        self._moved: list[dict[torch.device, torch.Tensor]] = [{} for _ in range(num_methods)]

    def __deepcopy__(self, memo: dict[int, Any]) -> Counters:
        """Copy what has been counted; other threads may go on counting, so the items are taken at once."""
        copied = Counters(len(self._moved))
        copied._totals = {device: totals.clone() for device, totals in list(self._totals.items())}
        copied._moved = [dict(list(by_device.items())) for by_device in self._moved]
        memo[id(self)] = copied
        return copied

    def add(self, forward: Forward) -> None:
        """Add a finished forward."""
        totals = self._on(forward.image_mask.device)
        if forward.begins:
            totals[self.PROMPTS].add_(1)
            totals[self.WITHOUT_IMAGE].add_(int(not forward.state.any_image))
        else:
            totals[self.DECODE_STEPS].add_(1)
        for index, counts in enumerate(forward.edited):
            # Counts come as tensors of every layer. Those of one shape are stacked, so that few operations are added.
            alike: dict[tuple[torch.device, torch.dtype, torch.Size], list[torch.Tensor]] = {}
            for count in counts:
                alike.setdefault((count.device, count.dtype, count.shape), []).append(count)
            for group in alike.values():
                self._on(group[0].device)[self.NUM_FORWARD_COUNTS + index].add_(torch.stack(group).sum())

        for index, moves in enumerate(forward.moved):
            for move in moves:
                self.move(index, move)

    def move(self, index: int, sums: torch.Tensor) -> None:
        """Add how far method number ``index`` moved something, see ``squared_move``: fp32 ``[2]``."""
        known = self._moved[index].get(sums.device)
        self._moved[index][sums.device] = sums if known is None else known + sums

    def count(self, index: int, edited: torch.Tensor) -> None:
        """Add a 0-d integer tensor to what method number ``index`` has edited; -1: to the decode steps."""
        self._on(edited.device)[self.NUM_FORWARD_COUNTS + index].add_(edited)

    def _on(self, device: torch.device) -> torch.Tensor:
        if device not in self._totals:
            with torch.inference_mode(False):
                self._totals[device] = torch.zeros(self._size, dtype=torch.int64, device=device)
        totals = self._totals[device]
        if "torch._dynamo" in sys.modules and not torch.compiler.is_compiling():
            # CUDA graphs write to fixed addresses, and are given up where an input is written to that has none.
            torch._dynamo.mark_static_address(totals)
        return totals

    def read(self) -> tuple[int, int, int, tuple[int, ...]]:
        """Prompts, prompts without an image, decode steps, and edited (sample, head, row) triples per method.

        Waits for the device.
        """
        sums = [0] * self._size
        for totals in self._totals.values():
            sums = [total + count for total, count in zip(sums, totals.tolist(), strict=True)]
        prompts, without_image, decode_steps, *edited = sums
        return prompts, without_image, decode_steps, tuple(edited)

    def read_moved(self) -> tuple[float | None, ...]:
        """Return per method how far its edited outputs moved, relative to their length; ``None``: not measured.

        Waits for the device.
        """
        found: list[float | None] = []
        for by_device in self._moved:
            sums = [moved.tolist() for moved in by_device.values()]
            change, length = (sum(each[part] for each in sums) for part in (0, 1))
            found.append((change / length) ** 0.5 if length > 0 else None)
        return tuple(found)


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
        edited: Per method, edited (sample, head, row) triples so far, (sample, block, row) triples where it edits block
            outputs, next tokens where it replaces their logits.
        moved: Per method, how far the outputs it edited moved in prompts and in the first step behind each, relative to
            the stock model's (Euclidean): the proof that it acts. Methods that edit the scores and weights of a layer
            together share a figure. ``None`` if nothing was edited there, or in compiled code.
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
    moved: tuple[float | None, ...]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        """A few readable lines."""
        lines = [
            f"{self.model} patched with {describe(self.methods)}",
            f"  {_spelled(self.layers)}; image token ids {', '.join(map(str, self.image_token_ids))}",
            f"  {self.prompts} prompts ({self.prompts_without_image} without an image), "
            f"{self.decode_steps} decode steps",
        ]
        for method, edited, moved in zip(self.methods, self.edited, self.moved, strict=True):
            how_far = "" if moved is None else f", moved by {100 * moved:.2g} %"
            lines.append(f"  {method.name}: {edited} {method.counts} edited{how_far}")
        return "\n".join(lines + [f"  note: {note}" for note in self.notes])


def _spelled(layers: Sequence[int]) -> str:
    """Name ascending layers, those that follow one another by the first and the last."""
    pieces: list[list[int]] = []
    for layer in layers:
        if pieces and layer == pieces[-1][-1] + 1:
            pieces[-1] = [pieces[-1][0], layer]
        else:
            pieces.append([layer])
    named = ["-".join(map(str, piece)) for piece in pieces]
    return f"layers {', '.join(named)}" if named else "in no layer"


def rounding_of(dtype: torch.dtype) -> float:
    """Return how far outputs move, relative to their length, by another order of the same sums."""
    eps = torch.finfo(dtype).eps
    return 8 * eps if eps < 1e-5 else eps / 2  # half precision: sums are accumulated in fp32


def describe(methods: Sequence[object]) -> str:
    """Name methods with their parameters."""
    return " + ".join(repr(method) for method in methods)
