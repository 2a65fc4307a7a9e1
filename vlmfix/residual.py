"""Edits of the residual stream: hooks on decoder layers and their blocks, and a forward that records the stream.

Blocks and the norms behind them take no keyword arguments, so the ``Run`` that reaches a decoder layer is laid down
there for the hooks inside, per thread.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from vlmfix.attention import RUN_KWARG, AttentionCall
from vlmfix.blocks import BlockKind, ResidualBlocks, find_blocks
from vlmfix.early import keep_early
from vlmfix.errors import UnsupportedFeatureError
from vlmfix.run import SHARED, Run

if TYPE_CHECKING:
    from torch import nn

    from vlmfix.anatomy import Anatomy
    from vlmfix.methods.base import Method
    from vlmfix.sites import Site


class Block:
    """What a method sees of one block of a decoder layer in one forward.

    Attributes:
        run: The forward.
        layer_idx: The decoder layer's index.
        kind: Which half of it.
    """

    __slots__ = ("_index", "kind", "layer_idx", "run")

    def __init__(self, run: Run, layer_idx: int, kind: BlockKind, index: int) -> None:
        self.run = run
        self.layer_idx = layer_idx
        self.kind = kind
        self._index = index

    @property
    def shared(self) -> Any:
        """What the method learned in this sequence (see ``Method.begin``), or ``None``."""
        return self.run.state.learned.get((self._index, SHARED))

    @property
    def scratch(self) -> dict[Any, Any]:
        """What the method keeps for later blocks of this forward; gone with the forward."""
        notes: dict[Any, Any] = self.run.once(self._index, dict)
        return notes


class StreamRecorder:
    """A forward of the stock model; takes the place of a ``Run`` in the keyword arguments.

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
        self._runs: dict[int, weakref.ref[Run]] = {}
        self._traced: Run | None = None

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
        """Lay the run down for the blocks."""
        run = own_run(kwargs.get(RUN_KWARG, _MISSING))
        if run is _MISSING:
            raise UnsupportedFeatureError(
                f"Decoder layer {self.blocks.layer_idx} of a patched model was reached without going through the "
                "model's own forward, so vlmfix cannot know where the image is. Call the whole model (model(...) or "
                "model.generate(...)), or take the patch off first: vlmfix.unpatch(model)."
            )
        self._lay_down(run)

    def before_mixer(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Lay it down again: checkpointing computes what is inside a layer a second time, without the layer's hooks."""
        if torch.is_grad_enabled() and RUN_KWARG in kwargs:
            self._lay_down(own_run(kwargs[RUN_KWARG]))

    def _lay_down(self, run: Any) -> None:
        is_edited = isinstance(run, Run) and run.state.any_image
        if torch.compiler.is_compiling():  # one thread at a time traces, and compiled code keeps nothing
            self._traced = run if is_edited else None
        elif is_edited:
            self._runs[threading.get_ident()] = weakref.ref(run)
        else:
            self._runs.pop(threading.get_ident(), None)

    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Take the run up again; keep what leaves the layer, where it is read."""
        run = own_run(kwargs.get(RUN_KWARG))
        hidden_states = output[0] if isinstance(output, tuple) else output
        if isinstance(run, StreamRecorder):
            run.record(self.blocks.layer_idx, hidden_states)
        elif isinstance(run, Run) and self.early and run.state.any_image:
            keep_early(run, self.blocks.layer_idx, hidden_states, self.early)
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

    def _run(self) -> Run | None:
        if torch.compiler.is_compiling():
            return self._traced
        kept = self._runs.get(threading.get_ident())
        return None if kept is None else kept()

    def _edit(self, kind: BlockKind, output: Any) -> Any:
        run = self._run()
        if run is None:
            return None
        states = output[0] if isinstance(output, tuple) else output
        every = states.reshape(-1, run.q_len, states.shape[-1])
        batch = run.state.image_mask.shape[0]
        rows = every[:batch]  # the other branch of a contrast comes behind
        for index, method in self.methods:
            if kind in method.edits_blocks:
                rows = edit_rows(rows, run, method, Block(run, self.blocks.layer_idx, kind, index), index)
        if batch < every.shape[0]:
            rows = torch.cat([rows, every[batch:]])
        edited = rows.reshape(states.shape)
        return (edited, *output[1:]) if isinstance(output, tuple) else edited


def own_run(run: Any) -> Any:
    """Return the run of the model's own branch, where a forward is one over two branches."""
    return getattr(run, "own", run)


def edit_rows(states: torch.Tensor, run: Run, method: Method, block: Block, index: int) -> torch.Tensor:
    """Let a method edit its rows of a block's output.

    Args:
        states: ``[batch, q_len, hidden_size]``.
        run: The forward.
        method: The method.
        block: Its view of the block.
        index: The method's number.

    Returns:
        The output with these rows replaced; ``states`` itself where there are none.
    """
    rows = run.rows(method.prompt_rows, method.edits_decode)
    if rows.start >= rows.stop:
        return states
    before = states[:, rows.start : rows.stop]
    after = method.edit_block(before, block)
    if after is before:
        return states
    after = after.to(states.dtype)
    if rows.mask is None:
        count = before.shape[0] * before.shape[1]
        run.edited[index].append(torch.full((), count, dtype=torch.int64, device=before.device))
    else:
        mask = rows.mask.to(states.device)
        after = torch.where(mask[..., None], after, before)
        run.edited[index].append(mask.sum())
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
