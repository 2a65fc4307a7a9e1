"""What a method is shown: a forward and its rows, a layer's attention, a block, a prompt that is about to be read."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from vlmfix.methods.forward import Forward, PromptRows, Rows
from vlmfix.methods.sequence import SHARED

if TYPE_CHECKING:
    from vlmfix.model.anatomy import AttentionSite
    from vlmfix.model.attention import AttentionCall
    from vlmfix.model.blocks import BlockKind

EditedRows = tuple[torch.Tensor, torch.Tensor]
"""Scores or weights ``[batch, num_heads, rows, keys]``, and the edited rows, bool ``[batch, num_heads, rows]``."""


__all__ = ["Block", "EditedRows", "Forward", "Layer", "Prompt", "PromptRows", "Rows", "View"]


class View:
    """What a method sees of one place in a model in one forward.

    Attributes:
        forward: The forward.
        index: The method's number in the patch.
    """

    __slots__ = ("forward", "index")

    def __init__(self, forward: Forward, index: int) -> None:
        self.forward = forward
        self.index = index

    @property
    def shared(self) -> Any:
        """What the method learned in this sequence for all layers (see ``Method.begin``), or ``None``."""
        return self.forward.state.learned.get((self.index, SHARED))

    @shared.setter
    def shared(self, value: Any) -> None:
        self.forward.state.learned[self.index, SHARED] = value

    def once(self, make: Callable[[], Any]) -> Any:
        """Return what ``make`` returned when this method first asked in this forward, at any place."""
        return self.forward.once(("method", self.index), make)

    @property
    def scratch(self) -> dict[Any, Any]:
        """What the method keeps for later places in this forward, instead of ``once``; gone with the forward."""
        notes: dict[Any, Any] = self.once(dict)
        return notes

    def count(self, edited: torch.Tensor) -> None:
        """Count edited (sample, head or block, row) triples: integer or bool of any shape."""
        self.forward.edited[self.index].append(edited)

    def record_move(self, stock: torch.Tensor, edited: torch.Tensor, where: torch.Tensor | None = None) -> None:
        """Record how far this method moved outputs, see ``Forward.record_move``."""
        self.forward.record_move([self.index], stock, edited, where)


class Block(View):
    """What a method sees of one block of a decoder layer in one forward.

    Attributes:
        forward: The forward.
        layer_idx: The decoder layer's index.
        kind: Which half of it.
        edited: For the method to set, where it leaves some of the rows in hand alone: which ones it edited, bool
            ``[batch, rows]``.
    """

    __slots__ = ("edited", "kind", "layer_idx")

    def __init__(self, forward: Forward, layer_idx: int, kind: BlockKind, index: int) -> None:
        super().__init__(forward, index)
        self.layer_idx = layer_idx
        self.kind = kind
        self.edited: torch.Tensor | None = None

    @property
    def input(self) -> torch.Tensor:
        """What entered the MLP, ``[batch, q_len, hidden_size]`` of the forward; see ``reads_mlp_input``."""
        return self.forward.mlp_inputs[self.layer_idx]

    @property
    def early_logits(self) -> torch.Tensor:
        """What the model's head reads from the stream that entered the layer, see ``reads_mlp_input``.

        In the rows that predict new tokens (``forward.rows("last")``): fp32 ``[batch, rows, vocab]``.
        """
        return self.forward.early_logits[self.layer_idx]


class Layer(View):
    """What a method sees of the attention of one layer in one forward.

    Attributes:
        forward: The forward.
        site: The attention module's place in the model; ``site.layer_idx`` is its layer.
        rows: Half-open range of the query rows in hand, relative to the forward.
        row_mask: bool ``[batch, rows]``: which of them are up for edits, or ``None`` for all.
    """

    __slots__ = ("_call", "row_mask", "rows", "site")

    def __init__(
        self,
        forward: Forward,
        site: AttentionSite,
        index: int,
        call: AttentionCall | None = None,
        rows: Rows | None = None,
    ) -> None:
        super().__init__(forward, index)
        self.site = site
        self._call = call
        self.rows = (0, forward.q_len) if rows is None else (rows.start, rows.stop)
        self.row_mask = None if rows is None else rows.mask

    def at(self, call: AttentionCall, rows: Rows | None = None) -> Layer:
        """Return the same layer for some query rows of an attention call."""
        return Layer(self.forward, self.site, self.index, call, rows)

    @property
    def call(self) -> AttentionCall:
        """The attention call; the hooks that come before it have none."""
        assert self._call is not None
        return self._call

    @property
    def heads(self) -> tuple[int, ...] | None:
        """The query heads in hand, in order; ``None`` for all of them."""
        return None if self._call is None else self._call.heads

    @property
    def learned(self) -> Any:
        """What the method learned here in this sequence, or ``None``."""
        return self.forward.state.learned.get((self.index, self.site.index))

    @learned.setter
    def learned(self, value: Any) -> None:
        self.forward.state.learned[self.index, self.site.index] = value

    def constant(self, make: Callable[[], Any]) -> Any:
        """Return what ``make`` returned for this layer when it was first asked in this sequence (head masks)."""
        constants = self.forward.state.constants
        key = (self.index, self.site.index)
        if key not in constants:
            constants[key] = make()
        return constants[key]

    def per_keys(self, make: Callable[[], Any], like: torch.Tensor) -> Any:
        """Return what ``make`` returned when this method first asked in this forward in a layer with keys as these.

        It must depend on the keys alone, and not on the layer. ``like`` is a tensor ``[batch, ..., keys]``.
        """
        return self.forward.once((self.index, *self._keys_like(like)), make)

    def per_mask(self, name: str, make: Callable[[], Any], *objects: Any) -> Any:
        """Return what ``make`` returned when this method first asked in this forward for rows that see the same keys.

        It must depend on the rows in hand, the keys that they see, and the given objects, which must be the very same.
        """
        call, methods = self.call, self.forward.state.methods
        if any(method.hides_keys for method in methods[: self.index]):  # in this layer alone
            return make()
        return self.forward.once_for(
            (self.index, name, self.rows, *call.visibility), (call.attention_mask, *objects), make
        )

    def _keys_like(self, like: torch.Tensor) -> tuple[Hashable, ...]:
        """Layers for which this is the same have the same keys."""
        return self.site.kind, self.site.is_sliding, like.shape[-1], like.device

    def keys(self, name: str, like: torch.Tensor) -> torch.Tensor:
        """Return which keys of ``like``, ``[batch, ..., keys]``, are what: bool ``[batch, keys]``.

        ``name`` is one of ``SequenceState.key_mask``; or ``"generated"``: behind the prompt.
        """
        if name == "generated":
            return ~self.keys("prompt", like)
        key, made = (name, *self._keys_like(like)), self.forward.made
        if key not in made:
            made[key] = self._keys(name, like.shape[-1]).to(like.device)
        mask: torch.Tensor = made[key]
        return mask

    def _keys(self, name: str, num_keys: int) -> torch.Tensor:
        state, kind = self.forward.state, self.site.kind
        if kind not in ("image", "answer"):
            aligned = self.visible_keys(state.key_mask(name), num_keys)
            return F.pad(aligned, (0, num_keys - aligned.shape[1]))
        # These keys are no tokens of a prompt, but image features, or a decoder's answer.
        has_image = self.forward.has_image[:, None]
        mask = torch.zeros_like(has_image).repeat(1, num_keys)
        if kind == "image" and name == "image":
            mask |= has_image
        elif name == "valid" or (kind == "image" and name == "prompt"):
            mask |= True
        elif kind == "answer" and name == "first":
            mask[:, :1] = True
        return mask

    def visible_keys(self, per_key: torch.Tensor, num_keys: int) -> torch.Tensor:
        """Align values ``[batch, prompt, ...]`` with the first of ``num_keys`` keys; a sliding cache drops early ones.

        Returns:
            ``[batch, n, ...]`` with ``n <= num_keys``; keys behind ``n`` are no prompt tokens.
        """
        if not self.site.is_sliding:
            return per_key[:, :num_keys]
        offset = self.key_offset(num_keys)
        if isinstance(offset, int):
            return per_key[:, offset : offset + num_keys]
        positions = torch.arange(num_keys, device=per_key.device) + offset
        padded = F.pad(per_key, (0, 0) * (per_key.dim() - 2) + (0, 1))
        return padded[:, positions.clamp_max(per_key.shape[1])]

    def key_offset(self, num_keys: int) -> int | torch.Tensor:
        """Return the position of the first of ``num_keys`` keys; a sliding cache has dropped what was before."""
        if not self.site.is_sliding:
            return 0
        offset = self.forward.past + self.forward.q_len - num_keys
        return offset.clamp_min(0) if isinstance(offset, torch.Tensor) else max(offset, 0)


@dataclass(frozen=True)
class Prompt:
    """A prompt with an image that is about to be read.

    Attributes:
        forward: The forward that is about to begin.
        first_logits: Runs the prompt through the stock model: the logits that predict the first new token, fp32
            ``[batch, vocab]``. Costs a prefill.
        patch_attention: Returns, per layer of ``Method.vision_layers``, how the vision tower's class token attended to
            the patches of every encoded image, in order: fp32 ``[num_images, patches]``, summed over heads. To be
            called once the forward has begun.
        last_states: Runs the prompt through the stock model: by layer in which a method edits a block, the residual
            stream behind it at each sample's last position, ``[batch, hidden_size]``. Costs a prefill. Earlier turns
            are as the cache holds them.
        last_states_text_only: The same for the whole conversation without its image tokens and the tokens that mark
            where images begin and end. Costs a short prefill.
        known: What the method's :meth:`begin` returned for the prompt before in this sequence, or ``None``.
    """

    forward: Forward
    first_logits: Callable[[], torch.Tensor]
    patch_attention: Callable[[], dict[int, torch.Tensor]]
    last_states: Callable[[], dict[int, torch.Tensor]]
    last_states_text_only: Callable[[], dict[int, torch.Tensor]]
    known: Any = None
