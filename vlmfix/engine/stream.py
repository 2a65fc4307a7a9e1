"""Hooks on decoder layers and their blocks: what methods learn from the residual stream, and edit in it.

Blocks and the norms behind them take no keyword arguments. So the forward that reaches a decoder layer is attached to
the layer's hooks, per thread, where those of its blocks find it.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vlmfix.engine.base_output import is_measured
from vlmfix.engine.early_logits import EarlyHead
from vlmfix.engine.forwards import MISSING, EditedForward, reached_from_outside
from vlmfix.engine.plan import Numbered, PatchedSite
from vlmfix.methods.base import Method
from vlmfix.methods.views import Block
from vlmfix.model.anatomy import FORWARD_KWARG, Anatomy
from vlmfix.model.blocks import BlockKind, ResidualBlocks, find_blocks
from vlmfix.model.uncopied import Uncopied


@dataclass(frozen=True)
class LayerHooks:
    """The hook on a decoder layer in which methods read the layer's input: ``readers`` are its attention modules."""

    decoder_layer: nn.Module
    readers: tuple[PatchedSite, ...]

    def attach(self) -> list[Any]:
        """Register the hooks and return their handles."""
        return [self.decoder_layer.register_forward_pre_hook(self.before, with_kwargs=True)]

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Tell the forward that it has reached the layer."""
        forward = kwargs.get(FORWARD_KWARG)
        if forward is not None:
            for site in self.readers:
                forward.before_layer(site, args, kwargs)


class BlockHooks:
    """Hooks on one decoder layer and its blocks: bound methods and partials of them follow ``copy.deepcopy(model)``.

    ``edits`` are the methods that edit each kind of block, ``early`` those that read the layer's output for
    ``Method.mix_logits``. ``head`` reads what enters the layer, for methods that ask for it.
    """

    def __init__(
        self, blocks: ResidualBlocks, edits: Mapping[BlockKind, Numbered], early: Numbered, head: EarlyHead
    ) -> None:
        self.blocks = blocks
        self.edits = edits
        self.early = early
        self.head = head
        self.is_read = any(method.reads_mlp_input for _, method in edits.get("mlp", ()))
        self._attached: Uncopied[int, weakref.ref[EditedForward]] = Uncopied()
        self._traced: EditedForward | None = None

    def attach(self) -> list[Any]:
        """Register the hooks and return their handles."""
        layer = self.blocks.decoder_layer
        handles: list[Any] = [layer.register_forward_pre_hook(self.before, with_kwargs=True)]
        if self.edits:
            handles.append(self.blocks.mixer.register_forward_pre_hook(self.before_mixer, with_kwargs=True))
        for kind in self.edits.keys() - {"embedding"}:
            hook = functools.partial(self.after_block, kind)
            handles.append(self.blocks.module(kind).register_forward_hook(hook))
        if self.is_read:
            handles.append(self.blocks.mlp_entrance.register_forward_pre_hook(self.before_mlp, with_kwargs=True))
        handles.append(layer.register_forward_hook(self.after, with_kwargs=True))
        return handles

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Attach the forward to the layer, so that its block hooks can find it; edit the image as it enters."""
        forward = kwargs.get(FORWARD_KWARG, MISSING)
        if forward is MISSING:
            raise reached_from_outside(f"Decoder layer {self.blocks.layer_idx}")
        self._attach(forward)
        edited = self._forward()
        if edited is None:
            return None
        states = args[0] if args else kwargs["hidden_states"]
        if self.is_read:
            rows = edited.rows("last")
            edited.early_logits[self.blocks.layer_idx] = self.head.read(
                self._own(states)[:, rows.start : rows.stop], normed=True
            )
        if "embedding" not in self.edits or not edited.is_prefill:
            return None
        states = self.after_block("embedding", module, (), states)
        return ((states, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": states})

    def before_mlp(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep what enters the MLP until its output is edited."""
        forward = self._forward()
        if forward is not None:
            forward.mlp_inputs[self.blocks.layer_idx] = self._own(args[0] if args else next(iter(kwargs.values())))

    def before_mixer(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Attach it again: checkpointing computes what is inside a layer a second time, without the layer's hooks."""
        if torch.is_grad_enabled() and FORWARD_KWARG in kwargs:
            self._attach(kwargs[FORWARD_KWARG])

    def _attach(self, forward: Any) -> None:
        forward = own_branch(forward)
        edited = forward if isinstance(forward, EditedForward) and forward.state.any_image else None
        if torch.compiler.is_compiling():  # one thread at a time traces, and compiled code keeps nothing
            self._traced = edited
        elif edited is not None:
            # Weak, so that a forward that failed half-way leaves nothing behind.
            self._attached[threading.get_ident()] = weakref.ref(edited)
        else:
            self._attached.pop(threading.get_ident(), None)

    def _forward(self) -> EditedForward | None:
        if torch.compiler.is_compiling():
            return self._traced
        attached = self._attached.get(threading.get_ident())
        return None if attached is None else attached()

    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Show the forward what leaves the layer, and detach it."""
        forward = own_branch(kwargs.get(FORWARD_KWARG))
        hidden_states = output[0] if isinstance(output, tuple) else output
        if isinstance(forward, EditedForward):
            if self.early and forward.state.any_image:
                forward.keep_early(self.blocks.layer_idx, hidden_states, self.early)
        elif forward is not None:
            forward.after_layer(self.blocks.layer_idx, hidden_states)
        self._attach(None)

    def after_block(self, kind: BlockKind, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Edit what the token mixer, the MLP or, in front of the first layer, the embedding adds."""
        forward = self._forward()
        if forward is None:
            return None
        forward.reach((kind, self.blocks.layer_idx))
        states = output[0] if isinstance(output, tuple) else output
        every = states.reshape(-1, forward.q_len, states.shape[-1])  # some MLPs return rows of all samples in one
        batch = forward.state.image_mask.shape[0]
        rows = self._own(states)
        for index, method in self.edits[kind]:
            rows = _edit_rows(rows, method, Block(forward, self.blocks.layer_idx, kind, index))
        if batch < every.shape[0]:
            rows = torch.cat([rows, every[batch:]])
        edited = rows.reshape(states.shape)
        if kind == "mlp":
            forward.mlp_inputs.pop(self.blocks.layer_idx, None)
        return (edited, *output[1:]) if isinstance(output, tuple) else edited

    def _own(self, states: torch.Tensor) -> torch.Tensor:
        """Return ``[batch, q_len, hidden_size]`` of the model's own branch: that of a contrast's other comes behind."""
        forward = self._forward()
        assert forward is not None
        return states.reshape(-1, forward.q_len, states.shape[-1])[: forward.state.image_mask.shape[0]]


def own_branch(forward: Any) -> Any:
    """Return the forward of the model's own branch, where one is over two branches."""
    return getattr(forward, "own", forward)


def _edit_rows(states: torch.Tensor, method: Method, block: Block) -> torch.Tensor:
    """Let a method edit its rows of a block's output ``[batch, q_len, hidden_size]``; return it, itself if unedited."""
    if block.kind == "embedding":
        rows, seen = block.forward.rows("image", decode=False), slice(None)
    else:  # how far the last row moves is enough to know
        rows, seen = block.forward.rows(method.prompt_rows, method.edits_decode), slice(-1, None)
    if rows.start >= rows.stop:
        return states
    before = states[:, rows.start : rows.stop]
    after = method.edit_block(before, block)
    if after is before:
        return states
    after = after.to(states.dtype)
    mask = None if rows.mask is None else rows.mask.to(states.device)
    if block.edited is not None:
        mask = block.edited if mask is None else mask & block.edited
    if is_measured(block.forward):
        block.record_move(before[:, seen], after[:, seen], None if mask is None else mask[:, seen, None])
    if mask is None:
        count = before.shape[0] * before.shape[1]
        block.count(torch.full((), count, dtype=torch.int64, device=before.device))
    else:
        after = torch.where(mask[..., None], after, before)
        block.count(mask.sum())
    if rows.stop - rows.start == states.shape[1]:
        return after
    return torch.cat([states[:, : rows.start], after, states[:, rows.stop :]], dim=1)


def make_layer_hooks(sites: Iterable[PatchedSite]) -> tuple[LayerHooks, ...]:
    """Place the hooks on the decoder layers whose input a method reads."""
    read = [site for site in sites if site.readers]
    layers = dict.fromkeys(site.decoder_layer for site in read)
    return tuple(LayerHooks(each, tuple(site for site in read if site.decoder_layer is each)) for each in layers)


def make_block_hooks(anatomy: Anatomy, methods: Sequence[Method], head: EarlyHead) -> tuple[BlockHooks, ...]:
    """Place the hooks on the layers in which one of the bound methods edits a block or reads the output.

    ``head`` is the model's, for methods that read what enters a layer.

    Raises:
        UnsupportedModelError: A method edits blocks, and the model's layers are built differently from those known.
    """
    acting = [
        (n, each) for n, each in enumerate(methods) if (each.edits_blocks or each.early_layers) and not each.is_identity
    ]
    hooks = []
    for blocks in find_blocks(anatomy) if acting else ():
        at: dict[BlockKind, tuple[int, ...]] = {"embedding": (0,)}
        edits: dict[BlockKind, Numbered] = {}
        for n, each in acting:
            for kind in each.edits_blocks:
                if blocks.layer_idx in at.get(kind, each.layer_indices):
                    edits[kind] = (*edits.get(kind, ()), (n, each))
        early = tuple((n, each) for n, each in acting if blocks.layer_idx in each.early_layers)
        if edits or early:
            hooks.append(BlockHooks(blocks, edits, early, head))
    return tuple(hooks)
