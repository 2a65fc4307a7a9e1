"""Runs of a model in which what its components give is kept, or replaced."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch

from vlmfix.anatomy import Anatomy
from vlmfix.attention import RUN_KWARG
from vlmfix.begin import parameter_names
from vlmfix.blocks import ResidualBlocks, find_blocks

Component = Literal["attention", "mlp", "hidden"]
COMPONENTS: tuple[Component, ...] = ("attention", "mlp", "hidden")
"""What the two blocks of a layer add to the residual stream, and what leaves the layer."""
Target = tuple[Component, int, str]
"""What one run patches: a component of a layer, at a group of tokens."""


class Tracer:
    """Runs prompts through the stock model, and reads or replaces what its components give.

    Args:
        anatomy: The model.
        answer: Token ids.
        components: Those to read or replace.
        layers: Decoder layers.
        is_patched: Whether a patch is on the model, which forwards must leave out.
    """

    def __init__(
        self,
        anatomy: Anatomy,
        answer: tuple[int, ...],
        components: tuple[Component, ...],
        layers: tuple[int, ...],
        is_patched: bool,
    ) -> None:
        self.anatomy = anatomy
        self._answer = list(answer)
        self._components = components
        self._blocks = [blocks for blocks in find_blocks(anatomy) if blocks.layer_idx in layers]
        self._options: dict[str, Any] = {"use_cache": False, "return_dict": True}
        # Given as a number, it makes Gemma 4 read but the last row in some layers.
        reads_all = not any(getattr(site.module, "is_kv_shared_layer", False) for site in anatomy.sites)
        if "logits_to_keep" in parameter_names(anatomy.model) and reads_all:
            self._options["logits_to_keep"] = 1
        if is_patched:
            self._options[RUN_KWARG] = None

    def probability(self, inputs: Mapping[str, Any]) -> torch.Tensor:
        """Return the probability of the answer as the next token, fp64 ``[batch]`` on the CPU."""
        logits = self.anatomy.model(**inputs, **self._options).logits[:, -1].float()
        found: torch.Tensor = logits.softmax(-1)[:, self._answer].sum(-1)
        return found.double().cpu()

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
                hook = self._hook(see, blocks.layer_idx, component, batch, length)
                handles.append(_module(blocks, component).register_forward_hook(hook))
            yield
        finally:
            for handle in handles:
                handle.remove()

    @staticmethod
    def _hook(
        see: Callable[[Component, int, torch.Tensor], torch.Tensor | None],
        layer: int,
        component: Component,
        batch: int,
        length: int,
    ) -> Callable[..., Any]:
        def hook(module: Any, args: Any, output: Any) -> Any:
            states = output[0] if isinstance(output, tuple) else output
            new = see(component, layer, states.view(batch, length, -1))
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


def _module(blocks: ResidualBlocks, component: Component) -> torch.nn.Module:
    return blocks.decoder_layer if component == "hidden" else blocks.module(component)
