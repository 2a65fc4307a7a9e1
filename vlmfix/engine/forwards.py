"""What travels through a patched model in the keyword argument ``FORWARD_KWARG``.

The hooks on decoder layers and the attention function tell it where the forward has got to. An ``EditedForward``
answers with what methods do there; a ``StockForward`` edits nothing, and its subclasses record what they see.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NoReturn

import torch

from vlmfix.engine.attend import attend
from vlmfix.engine.plan import PatchedSite
from vlmfix.errors import UnsupportedFeatureError
from vlmfix.methods.base import Method
from vlmfix.methods.sequence import SHARED, SequenceState
from vlmfix.methods.views import Forward, Layer
from vlmfix.model.attention import AttentionCall

MISSING = object()
"""Marks a call of a part of a patched model to which no forward has come down."""


def reached_from_outside(what: str) -> UnsupportedFeatureError:
    """Return the error for a part of a patched model that was not reached through the model's own forward."""
    return UnsupportedFeatureError(
        f"{what} of a patched model was reached without going through the model's own forward, so vlmfix cannot know "
        "where the image is. Call the whole model (model(...) or model.generate(...)), or take the patch off first: "
        "vlmfix.unpatch(model)."
    )


class StockForward:
    """A forward in which nothing is edited; subclasses record what they see of it.

    Attributes:
        joins_branches: Whether it is a step of two branches, with twice the rows of the batch.
    """

    joins_branches = False

    def before_layer(self, site: PatchedSite, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Be told of a decoder layer, by the arguments it is called with."""

    def attend(self, site: PatchedSite, call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Compute attention: ``[batch, q_len, num_heads, value_dim]``, and weights where the kernel returns them."""
        return call.base()

    def after_layer(self, layer_idx: int, hidden_states: torch.Tensor) -> None:
        """See what leaves a decoder layer, ``[batch, q_len, hidden_size]``."""


STOCK = StockForward()
"""For passes through the stock model in the middle of a call that does not ask for it (which ``None`` would)."""


class OfLayers(dict[int, torch.Tensor]):
    """What decoder layers left behind, by layer."""

    def __missing__(self, layer_idx: int) -> NoReturn:
        """Refuse a layer that the forward did not come to."""
        raise UnsupportedFeatureError(
            f"A method of the patch reads what leaves decoder layer {layer_idx}, which this forward left out. Patch "
            "the model again if it has lost layers (vlmfix.patch(model, ...)), and leave assistant_early_exit unset."
        )


class StreamRecorder(StockForward):
    """Keeps the residual stream at each sample's last position.

    Attributes:
        states: By decoder layer, what left it there: ``[batch, hidden_size]``.
    """

    def __init__(self, at_last: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.states = OfLayers()
        self._at_last = at_last

    def after_layer(self, layer_idx: int, hidden_states: torch.Tensor) -> None:
        """Keep a row of ``[batch, q_len, hidden_size]``."""
        self.states[layer_idx] = self._at_last(hidden_states)


class EditedForward(Forward):
    """A forward with the edits of a patch.

    Attributes:
        methods: The bound methods.
        pending: What a decoding method does once the forward is over; only ``vlmfix.decoding`` looks into it.
        past_is_live: Whether ``past`` is the cache's own counter, which the first layer moves on.
        early: By decoder layer, the residual stream behind it in the rows that predict new tokens,
            ``[batch, rows, hidden_size]``, for methods that mix logits.
        reached: The places where methods act that it has come to, see ``vlmfix.engine.places``.
        is_traced: Whether compiled code came to some, which does not tell where.
    """

    def __init__(self, state: SequenceState, methods: tuple[Method, ...], **options: Any) -> None:
        super().__init__(state, **options)
        self.methods = methods
        self.pending: Any = None
        self.past_is_live = False
        self.early = OfLayers()
        self.reached: set[Hashable] = set()
        self.is_traced = False

    def reach(self, place: Hashable) -> None:
        """Note that the forward has come to a place where methods act."""
        if torch.compiler.is_compiling():
            self.is_traced = True
        else:
            self.reached.add(place)

    def hold_past(self) -> None:
        """Keep the number of tokens before this forward, once the language model begins."""
        if self.past_is_live and isinstance(self.past, torch.Tensor):
            self.past, self.past_is_live = self.past.clone(), False

    def before_layer(self, site: PatchedSite, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Let methods learn from the residual stream that enters a decoder layer in a prompt."""
        if not self.is_prefill:
            return
        hidden_states = (args[0] if args else kwargs["hidden_states"])[..., : self.prompt_len, :]
        if hidden_states.dim() == 4 and site.readers:  # Gemma 3n keeps several streams, one of which attention reads
            stream = getattr(site.config, "altup_active_idx", None)
            if stream is None:
                raise UnsupportedFeatureError(
                    f"The decoder layer of {site.name} keeps several residual streams and mixes them before its "
                    f"attention, so {site.readers[0][1].name} cannot look for sinks in what the attention reads. "
                    "Choose a method without sinks, such as vlmfix.patch(model, 'pai')."
                )
            hidden_states = hidden_states[stream]
        self.reach(("input", site.index))
        for index, method in site.readers:
            layer = Layer(self, site, index)
            layer.learned = method.learn(hidden_states, layer)

    def attend(self, site: PatchedSite, call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Compute attention with the edits of a site; without any, exactly what the base kernel returns."""
        self.reach(site.index)
        return attend(self, site, call)

    def keep_early(self, layer_idx: int, hidden_states: torch.Tensor, methods: Sequence[tuple[int, Method]]) -> None:
        """Keep the rows of ``[batch, q_len, hidden_size]`` that predict new tokens; count them once per forward."""
        rows, batch = self.rows("last"), self.state.image_mask.shape[0]
        states = hidden_states[:batch, rows.start : rows.stop]  # the other branch of a contrast comes behind
        self.early[layer_idx] = states
        self.reach(("output", layer_idx))
        for index, method in methods:
            if layer_idx == max(method.early_layers):
                mask = torch.ones_like(states[..., 0]) if rows.mask is None else rows.mask
                self.edited[index].append(mask.sum(dtype=torch.int64))

    def finish(self) -> None:
        """Settle what was learned; called once the forward is over, and then nothing is learned any more."""
        self.is_over = True
        if not self.is_prefill or torch.compiler.is_compiling():
            return
        for index, method in enumerate(self.methods):
            learned = {
                site: value for (owner, site), value in self.state.learned.items() if owner == index and site != SHARED
            }
            if learned:
                method.settle(learned)
