"""Runs of the stock model in which the output of a component is read, or replaced by that of another run."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch

from vlmfix.model.anatomy import Anatomy
from vlmfix.model.blocks import find_blocks
from vlmfix.observe.ask import stock_logits

Component = Literal["attention", "mlp", "hidden"]


COMPONENTS: tuple[Component, ...] = ("attention", "mlp", "hidden")
"""What the two blocks of a layer add to the residual stream, and what leaves the layer."""


Target = tuple[Component, int, str]
"""What one run patches: a component of a layer, at a group of tokens."""


class Tracer:
    """Runs prompts through the stock model, patched or not, and reads or replaces what components of layers give."""

    def __init__(
        self, anatomy: Anatomy, answer: tuple[int, ...], components: tuple[Component, ...], layers: tuple[int, ...]
    ) -> None:
        self._model = anatomy.model
        self._answer = answer
        self._components = components
        self._blocks = [blocks for blocks in find_blocks(anatomy) if blocks.layer_idx in layers]
        # Asked for few logits, Gemma 4 reads but the last row in some layers.
        shares = any(getattr(site.module, "is_kv_shared_layer", False) for site in anatomy.sites)
        self._options = {"logits_to_keep": 0} if shares else {}

    def probability(self, inputs: Mapping[str, Any]) -> torch.Tensor:
        """Return the probability of the answer as the next token, fp64 ``[batch]`` on the CPU."""
        return probability_of(self._answer, stock_logits(self._model, inputs, **self._options)[:, -1])

    def record(
        self, inputs: Mapping[str, Any], start: int = 0
    ) -> tuple[torch.Tensor, dict[tuple[Component, int], torch.Tensor]]:
        """Run prompts and keep what every component gives from column ``start`` on, ``[batch, columns, hidden_size]``.

        Returns:
            Probabilities of the answer, and the states by component and layer.
        """
        seen: dict[tuple[Component, int], torch.Tensor] = {}

        def keep(component: Component, layer: int, states: torch.Tensor) -> None:
            seen[component, layer] = states[:, start:].clone()

        with self._watched(keep, *inputs["input_ids"].shape):
            return self.probability(inputs), seen

    def patched(
        self,
        inputs: Mapping[str, Any],
        states: Mapping[tuple[Component, int], torch.Tensor],
        groups: Mapping[str, torch.Tensor],
        targets: Sequence[Target],
        times: int,
    ) -> torch.Tensor:
        """Run prompts once per target, with that target's states replaced.

        Args:
            inputs: The prompts.
            states: What to put there, by component and layer: the last columns of ``[batch, length, hidden_size]``.
            groups: Groups of tokens, bool ``[batch, length]``.
            targets: The targets.
            times: Targets per forward.

        Returns:
            Probabilities of the answer, fp64 ``[targets, batch]``.
        """
        batch, length = inputs["input_ids"].shape
        found: list[torch.Tensor] = []
        for start in range(0, len(targets), times):
            part = targets[start : start + times]

            def put(
                component: Component, layer: int, there: torch.Tensor, part: Sequence[Target] = part
            ) -> torch.Tensor | None:
                rows = [row for row, target in enumerate(part) if target[:2] == (component, layer)]
                if not rows:
                    return None
                there = there.view(len(part), batch, *there.shape[1:]).clone()
                new = states[component, layer]
                for row in rows:
                    behind = there[row][:, -new.shape[1] :]
                    mask = groups[part[row][2]][:, -new.shape[1] :, None].to(behind.device)
                    behind.copy_(torch.where(mask, new, behind))
                return there.flatten(0, 1)

            with self._watched(put, len(part) * batch, length):
                found.append(self.probability(repeated(inputs, len(part))).view(len(part), batch))
        return torch.cat(found)

    @contextmanager
    def _watched(
        self, see: Callable[[Component, int, torch.Tensor], torch.Tensor | None], batch: int, length: int
    ) -> Iterator[None]:
        """Show all components to a function, and put what it returns in their place."""
        handles: list[Any] = []
        try:
            for blocks, component in itertools.product(self._blocks, self._components):
                module = blocks.decoder_layer if component == "hidden" else blocks.module(component)
                hook = _shows(functools.partial(see, component, blocks.layer_idx), batch, length)
                handles.append(module.register_forward_hook(hook))
            yield
        finally:
            for handle in handles:
                handle.remove()


def _shows(see: Callable[[torch.Tensor], torch.Tensor | None], batch: int, length: int) -> Callable[..., Any]:
    """Return a hook that shows a module's output as ``[batch, length, hidden_size]`` and takes what is returned."""

    def hook(module: Any, args: Any, output: Any) -> Any:
        states = output[0] if isinstance(output, tuple) else output
        new = see(states.view(batch, length, -1))
        if new is None:
            return None
        new = new.view(states.shape)
        return (new, *output[1:]) if isinstance(output, tuple) else new

    return hook


def repeated(inputs: Mapping[str, Any], times: int) -> dict[str, Any]:
    """Repeat a batch: all its samples, then all again. Images that follow each other in one tensor do so too."""
    return {
        name: torch.cat([value] * times)
        if isinstance(value, torch.Tensor) and value.dim()
        else value * times
        if isinstance(value, list)
        else value
        for name, value in inputs.items()
    }


def probability_of(answer: Sequence[int], logits: torch.Tensor) -> torch.Tensor:
    """Add up the probabilities of some ids in logits ``[batch, vocab]``: fp64 ``[batch]`` on the CPU."""
    found: torch.Tensor = logits.softmax(-1)[:, list(answer)].sum(-1)
    return found.double().cpu()
