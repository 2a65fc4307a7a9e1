"""Edits of the residual stream: hooks on decoder layers and their blocks, and a forward that records the stream.

Blocks and the norms behind them take no keyword arguments, so the ``Forward`` that reaches a decoder layer is laid down
there for the hooks inside, per thread.
"""

from __future__ import annotations

import dataclasses
import inspect
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from vlmfix.errors import UnsupportedFeatureError, UnsupportedModelError
from vlmfix.methods.views import Block, Forward
from vlmfix.model.anatomy import FORWARD_KWARG
from vlmfix.model.attention import AttentionCall
from vlmfix.model.blocks import BlockKind, ResidualBlocks, final_norm, find_blocks

if TYPE_CHECKING:
    from vlmfix.engine.plan import Site
    from vlmfix.methods.base import Method
    from vlmfix.model.anatomy import Anatomy


def keep_early(
    forward: Forward, layer_idx: int, hidden_states: torch.Tensor, methods: Sequence[tuple[int, Method]]
) -> None:
    """Keep the rows of ``[batch, q_len, hidden_size]`` that predict new tokens, and count them once per forward."""
    rows, batch = forward.rows("last"), forward.state.image_mask.shape[0]
    states = hidden_states[:batch, rows.start : rows.stop]  # the other branch of a contrast comes behind
    forward.early[layer_idx] = states
    for index, method in methods:
        if layer_idx == max(method.early_layers):
            mask = torch.ones_like(states[..., 0]) if rows.mask is None else rows.mask
            forward.edited[index].append(mask.sum(dtype=torch.int64))


class EarlyHead:
    """The head of a model, for states of early layers.

    Args:
        anatomy: The model.
        methods: All bound methods of a patch.

    Raises:
        UnsupportedModelError: A method mixes logits, and the model has no language-model head.
        UnsupportedFeatureError: A method wants the final norm, and it was not found.
    """

    def __init__(self, anatomy: Anatomy, methods: Sequence[Method]) -> None:
        self.mixing = tuple(
            (index, each) for index, each in enumerate(methods) if each.early_layers and not each.is_identity
        )
        head = anatomy.language_model.get_output_embeddings() if self.mixing else None
        if self.mixing and not isinstance(head, nn.Module):
            raise UnsupportedModelError(
                f"{type(anatomy.language_model).__name__} has no language-model head to read early layers with. "
                "Patch the model that generates, or set sla_alpha=0."
            )
        self._head = head
        self._norm = final_norm(anatomy) if any(each.early_norm for _, each in self.mixing) else None
        self._softcap = self._scale = self._divisor = None
        if isinstance(head, nn.Module):
            self._softcap, self._scale, self._divisor = _behind_head(anatomy, head)

    def mix(self, forward: Forward, output: Any, inputs: dict[str, Any]) -> Any:
        """Return a forward's output with mixed logits in the rows that predict new tokens of prompts with an image.

        Args:
            forward: The forward.
            output: What the model with the head returned, an object with ``logits`` or a tuple.
            inputs: Its arguments by name.
        """
        if isinstance(output, tuple):
            where = 0 if inputs.get("labels") is None else 1  # the loss comes first
            return (*output[:where], self._mixed(forward, output[where], inputs), *output[where + 1 :])
        return dataclasses.replace(output, logits=self._mixed(forward, output.logits, inputs))

    def _mixed(self, forward: Forward, logits: torch.Tensor, inputs: dict[str, Any]) -> torch.Tensor:
        """Mix ``[batch, kept, vocab]``."""
        rows, wanted = forward.rows("last"), inputs.get("logits_to_keep")
        if rows.start >= rows.stop:
            return logits
        num_rows = rows.stop - rows.start
        if isinstance(wanted, torch.Tensor):
            place = wanted.to(logits.device) - rows.start
            inside = (place >= 0) & (place < num_rows)
            start, chosen = 0, place.clamp(0, num_rows - 1)
        else:
            first = forward.q_len - logits.shape[1]
            start, skipped = max(rows.start - first, 0), max(first - rows.start, 0)
            chosen = torch.arange(skipped, num_rows, device=logits.device)
            inside = torch.ones_like(chosen, dtype=torch.bool)
        batch = forward.state.image_mask.shape[0]
        mask = inside.expand(batch, -1)
        if rows.mask is not None:
            mask = mask & rows.mask.to(logits.device)[:, chosen]
        before = logits[:batch, start:]
        after = before.float()
        for _, method in self.mixing:
            states = [forward.early[layer][:, chosen.to(forward.early[layer].device)] for layer in method.early_layers]
            early = [self._read(each, normed=method.early_norm).to(logits.device) for each in states]
            after = method.mix_logits(after, early)
        mixed = torch.where(mask[..., None], after.to(logits.dtype), before)
        if start > 0:
            mixed = torch.cat([logits[:batch, :start], mixed], dim=1)
        return mixed if batch == logits.shape[0] else torch.cat([mixed, logits[batch:]])

    def _read(self, states: torch.Tensor, *, normed: bool) -> torch.Tensor:
        """Return logits of ``[batch, rows, hidden_size]``, fp32."""
        assert self._head is not None
        if normed:
            assert self._norm is not None
            states = self._norm(states)
        device = next(self._head.parameters()).device
        if device.type != "meta":  # offloaded: accelerate's own hook moves the states
            states = states.to(device)
        logits: torch.Tensor = self._head(states).float()
        logits = logits * (self._scale or 1) / (self._divisor or 1)
        if self._softcap is not None:
            logits = torch.tanh(logits / self._softcap) * self._softcap
        return logits


def _behind_head(anatomy: Anatomy, head: nn.Module) -> tuple[float | None, float | None, float | None]:
    """Return what a model does to the logits of its head: the cap, factor and divisor of its config.

    A composite model may leave out what the language model's config names, so its forward is asked by name.
    """
    owners = [module for module in anatomy.model.modules() if any(child is head for child in module.children())]
    codes = [inspect.unwrap(type(owner).forward).__code__ for owner in owners]
    names = {name for code in codes for name in (*code.co_names, *code.co_consts) if isinstance(name, str)}
    found: list[float | None] = []
    for field in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        value = getattr(anatomy.text_config, field, None)
        found.append(float(value) if value and field in names else None)
    return found[0], found[1], found[2]


class StreamRecorder:
    """A forward of the stock model; takes the place of a ``Forward`` in the keyword arguments.

    Attributes:
        states: By decoder layer, what left it at each sample's last position: ``[batch, hidden_size]``.
    """

    def __init__(self, at_last: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.states: dict[int, torch.Tensor] = {}
        self._at_last = at_last

    def record(self, layer_idx: int, hidden_states: torch.Tensor) -> None:
        """Keep a row of ``[batch, q_len, hidden_size]``."""
        self.states[layer_idx] = self._at_last(hidden_states)

    def before_layer(self, site: Site, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Nothing is learned from it."""

    def after_layer(self, site: Site) -> None:
        """Nothing follows it."""

    def attend(self, site: Site, call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Run the base kernel."""
        return call.base()


class BlockHooks:
    """Hooks on one decoder layer and its blocks, as bound methods: they follow ``copy.deepcopy(model)``.

    Args:
        blocks: The layer.
        methods: (method index, method) that edit its blocks.
        early: Those that read its output for ``Method.mix_logits``.
    """

    def __init__(
        self, blocks: ResidualBlocks, methods: Sequence[tuple[int, Method]], early: Sequence[tuple[int, Method]]
    ) -> None:
        self.blocks = blocks
        self.methods = tuple(methods)
        self.early = tuple(early)
        self._runs: dict[int, weakref.ref[Forward]] = {}
        self._traced: Forward | None = None

    def attach(self) -> list[Any]:
        """Register the hooks and return their handles."""
        layer = self.blocks.decoder_layer
        handles: list[Any] = [layer.register_forward_pre_hook(self.before, with_kwargs=True)]
        if self.methods:
            handles.append(self.blocks.mixer.register_forward_pre_hook(self.before_mixer, with_kwargs=True))
        edits: dict[BlockKind, Callable[..., Any]] = {"attention": self.after_attention, "mlp": self.after_mlp}
        for kind, hook in edits.items():
            if any(kind in method.edits_blocks for _, method in self.methods):
                handles.append(self.blocks.module(kind).register_forward_hook(hook))
        handles.append(layer.register_forward_hook(self.after, with_kwargs=True))
        return handles

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Attach the forward to the layer so that its block hooks can find it."""
        forward = own_forward(kwargs.get(FORWARD_KWARG, _MISSING))
        if forward is _MISSING:
            raise UnsupportedFeatureError(
                f"Decoder layer {self.blocks.layer_idx} of a patched model was reached without going through the "
                "model's own forward, so vlmfix cannot know where the image is. Call the whole model (model(...) or "
                "model.generate(...)), or take the patch off first: vlmfix.unpatch(model)."
            )
        self._lay_down(forward)

    def before_mixer(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Lay it down again: checkpointing computes what is inside a layer a second time, without the layer's hooks."""
        if torch.is_grad_enabled() and FORWARD_KWARG in kwargs:
            self._lay_down(own_forward(kwargs[FORWARD_KWARG]))

    def _lay_down(self, forward: Any) -> None:
        is_edited = isinstance(forward, Forward) and forward.state.any_image
        if torch.compiler.is_compiling():  # one thread at a time traces, and compiled code keeps nothing
            self._traced = forward if is_edited else None
        elif is_edited:
            self._runs[threading.get_ident()] = weakref.ref(forward)
        else:
            self._runs.pop(threading.get_ident(), None)

    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Detach the forward; keep what leaves the layer, where it is read."""
        forward = own_forward(kwargs.get(FORWARD_KWARG))
        hidden_states = output[0] if isinstance(output, tuple) else output
        if isinstance(forward, StreamRecorder):
            forward.record(self.blocks.layer_idx, hidden_states)
        elif isinstance(forward, Forward) and self.early and forward.state.any_image:
            keep_early(forward, self.blocks.layer_idx, hidden_states, self.early)
        if torch.compiler.is_compiling():
            self._traced = None
        else:
            self._runs.pop(threading.get_ident(), None)

    def after_attention(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Edit what the token mixer adds."""
        return self._edit("attention", output)

    def after_mlp(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Edit what the MLP adds."""
        return self._edit("mlp", output)

    def _run(self) -> Forward | None:
        if torch.compiler.is_compiling():
            return self._traced
        kept = self._runs.get(threading.get_ident())
        return None if kept is None else kept()

    def _edit(self, kind: BlockKind, output: Any) -> Any:
        forward = self._run()
        if forward is None:
            return None
        states = output[0] if isinstance(output, tuple) else output
        every = states.reshape(-1, forward.q_len, states.shape[-1])
        batch = forward.state.image_mask.shape[0]
        rows = every[:batch]  # the other branch of a contrast comes behind
        for index, method in self.methods:
            if kind in method.edits_blocks:
                rows = edit_rows(rows, forward, method, Block(forward, self.blocks.layer_idx, kind, index), index)
        if batch < every.shape[0]:
            rows = torch.cat([rows, every[batch:]])
        edited = rows.reshape(states.shape)
        return (edited, *output[1:]) if isinstance(output, tuple) else edited


def own_forward(forward: Any) -> Any:
    """Return the forward of the model's own branch, where a forward is one over two branches."""
    return getattr(forward, "own", forward)


def edit_rows(states: torch.Tensor, forward: Forward, method: Method, block: Block, index: int) -> torch.Tensor:
    """Let a method edit its rows of a block's output.

    Args:
        states: ``[batch, q_len, hidden_size]``.
        forward: The forward.
        method: The method.
        block: Its view of the block.
        index: The method's number.

    Returns:
        The output with these rows replaced; ``states`` itself where there are none.
    """
    rows = forward.rows(method.prompt_rows, method.edits_decode)
    if rows.start >= rows.stop:
        return states
    before = states[:, rows.start : rows.stop]
    after = method.edit_block(before, block)
    if after is before:
        return states
    after = after.to(states.dtype)
    if rows.mask is None:
        count = before.shape[0] * before.shape[1]
        forward.edited[index].append(torch.full((), count, dtype=torch.int64, device=before.device))
    else:
        mask = rows.mask.to(states.device)
        after = torch.where(mask[..., None], after, before)
        forward.edited[index].append(mask.sum())
    if rows.stop - rows.start == states.shape[1]:
        return after
    return torch.cat([states[:, : rows.start], after, states[:, rows.stop :]], dim=1)


def make_block_hooks(anatomy: Anatomy, methods: Sequence[Method]) -> tuple[BlockHooks, ...]:
    """Place bound methods on the blocks of a model's decoder layers.

    Args:
        anatomy: The model.
        methods: Methods with their layers resolved, in the order of the path.

    Returns:
        Hooks for the layers in which one of them edits a block or reads the output.

    Raises:
        UnsupportedModelError: A method edits blocks, and the model's layers are built otherwise than those known.
    """
    acting = [
        (n, each) for n, each in enumerate(methods) if (each.edits_blocks or each.early_layers) and not each.is_identity
    ]
    if not acting:
        return ()
    hooks = []
    for blocks in find_blocks(anatomy):
        edits = [(n, each) for n, each in acting if each.edits_blocks and blocks.layer_idx in each.layer_indices]
        early = [(n, each) for n, each in acting if blocks.layer_idx in each.early_layers]
        if edits or early:
            hooks.append(BlockHooks(blocks, edits, early))
    return tuple(hooks)


_MISSING = object()
"""Marks a forward that did not pass through the patched model."""
