"""Hooks on the blocks of the vision tower, which methods edit in every image that is read."""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import nn

from vlmfix.engine.places import passed_by
from vlmfix.engine.plan import Numbered
from vlmfix.engine.status import Counters
from vlmfix.errors import UnsupportedFeatureError
from vlmfix.methods.base import Method
from vlmfix.methods.forward import squared_move
from vlmfix.model.anatomy import Anatomy
from vlmfix.model.blocks import BlockKind
from vlmfix.model.uncopied import Uncopied
from vlmfix.model.vision_tower import VisionLayer, find_vision_layers


class TowerHooks:
    """Lets the bound methods of a patch edit what the blocks of the vision tower add to its residual stream.

    The tower reads images inside the model's forward, or before it: ``generate`` of some models encodes them first, and
    some callers do. So a forward does not decide. Every image is edited that is read in a thread whose last call did
    not ask for the stock model (``vlmfix=None``), and both branches of a contrast see it so.

    Raises:
        UnsupportedModelError: A method edits the tower, and the model has none that is known.
    """

    def __init__(self, anatomy: Anatomy, methods: Sequence[Method], counters: Counters) -> None:
        self._counters = counters
        self._editing = tuple((n, each) for n, each in enumerate(methods) if each.edits_vision and not each.is_identity)
        self._layers = find_vision_layers(anatomy.model) if self._editing else ()
        self._model = anatomy.model
        named = anatomy.model.named_modules() if self._layers else ()
        self._first = next((name for name, module in named if module is self._layers[0].layer), "")
        self._is_stock: Uncopied[int, bool] = Uncopied()
        self._reached: Uncopied[int, set[BlockKind]] = Uncopied()
        self._is_traced = False  # compiled blocks do not tell that they were reached

    def attach(self) -> list[Any]:
        """Register the hooks and return their handles."""
        handles = []
        for number, layer in enumerate(self._layers):
            for kind, module in _blocks(layer).items():
                editing = tuple((index, method) for index, method in self._editing if kind in method.edits_vision)
                if editing:
                    # A partial of a bound method follows ``copy.deepcopy(model)``.
                    hook = functools.partial(self.after_block, kind, number, editing)
                    handles.append(module.register_forward_hook(hook))
            handles.append(layer.layer.register_forward_hook(functools.partial(self.after_layer, number)))
        return handles

    def call(self, *, is_stock: bool) -> None:
        """Be told of a call of the model in this thread: whether it asks for the stock model.

        Raises:
            UnsupportedFeatureError: It does not, and has got another tower since.
        """
        if self._layers and not torch.compiler.is_compiling():
            self._is_stock[threading.get_ident()] = is_stock
            if not is_stock and not self._is_in_model():
                raise UnsupportedFeatureError(
                    "The vision tower of this model, which a method of the patch edits, was exchanged. Patch the model "
                    "again: vlmfix.patch(model, ...)."
                )

    def _is_in_model(self) -> bool:
        first: nn.Module = self._layers[0].layer
        with suppress(AttributeError):
            if self._model.get_submodule(self._first) is first:
                return True
        return any(each is first for each in self._model.modules())  # perhaps within a wrapper

    def after_layer(self, layer_idx: int, module: nn.Module, args: Any, output: Any) -> None:
        """Refuse a layer that was computed past a block that a method edits, by a kernel for instance.

        Raises:
            UnsupportedFeatureError: It was.
        """
        if self._is_traced or torch.compiler.is_compiling():
            return
        thread = threading.get_ident()
        if self._is_stock.get(thread, False):
            return
        edited = {kind for _, method in self._editing for kind in method.edits_vision}
        if missed := edited - self._reached.pop(thread, set()):
            what = f"the {' and '.join(sorted(missed))} of layer {layer_idx} of the vision tower"
            raise passed_by(self._model, [what])

    def after_block(
        self, kind: BlockKind, layer_idx: int, editing: Numbered, module: nn.Module, args: Any, output: Any
    ) -> Any:
        """Edit what the token mixer or the MLP of a layer adds."""
        if not torch.compiler.is_compiling() and self._is_stock.get(threading.get_ident(), False):
            return None
        if torch.compiler.is_compiling():
            self._is_traced = True
        else:
            self._reached.setdefault(threading.get_ident(), set()).add(kind)
        states = output[0] if isinstance(output, tuple) else output
        for index, method in editing:
            edited = method.edit_vision(states, kind, layer_idx).to(states.dtype)
            self._counters.count(index, torch.full((), states[..., 0].numel(), device=states.device))
            self._counters.move(index, squared_move(states, edited))
            states = edited
        return (states, *output[1:]) if isinstance(output, tuple) else states


def _blocks(layer: VisionLayer) -> dict[BlockKind, nn.Module]:
    return {"attention": layer.attention, "mlp": layer.mlp}
