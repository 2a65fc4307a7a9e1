"""What is known during one forward (``Forward``) and along one sequence (``SequenceState``, kept on the cache).

A ``Forward`` is created by a hook on the model, travels down to every attention call in its keyword arguments and ends
with the call. What must outlive it (image mask, learned sinks, chosen heads) sits on the cache object, so that it dies
with the sequence and follows copies, crops, beams and further turns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
import torch.nn.functional as F

from vlmfix.model.attention import AttentionCall
from vlmfix.model.blocks import BlockKind

if TYPE_CHECKING:
    from vlmfix.decoding.branch import Branch, Pending
    from vlmfix.engine.image_free import TextOnlyForward
    from vlmfix.engine.plan import Site
    from vlmfix.engine.status import Counters
    from vlmfix.methods.base import Method


class Block:
    """What a method sees of one block of a decoder layer in one forward.

    Attributes:
        forward: The forward.
        layer_idx: The decoder layer's index.
        kind: Which half of it.
    """

    __slots__ = ("_index", "forward", "kind", "layer_idx")

    def __init__(self, forward: Forward, layer_idx: int, kind: BlockKind, index: int) -> None:
        self.forward = forward
        self.layer_idx = layer_idx
        self.kind = kind
        self._index = index

    @property
    def shared(self) -> Any:
        """What the method learned in this sequence (see ``Method.begin``), or ``None``."""
        return self.forward.state.learned.get((self._index, SHARED))

    @property
    def scratch(self) -> dict[Any, Any]:
        """What the method keeps for later blocks of this forward; gone with the forward."""
        notes: dict[Any, Any] = self.forward.once(self._index, dict)
        return notes


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


PromptRows = Literal["none", "last", "text", "all"]
"""Query rows of a prompt: none, each sample's last token (if no image follows it), those behind its last image token,
or all that are no padding. Samples without an image have none."""


STATE_ATTRIBUTE = "_vlmfix"
"""The attribute of a cache object that holds its ``SequenceState``."""


SHARED = -1
"""In the keys of what was learned: not one site's, but the method's in all of them."""


HEAD_INDEX = -1
"""In the keys of constants: no method's, but the indices of a site's heads."""


@dataclass
class SequenceState:
    """What is known about a batch of sequences after their last prompt.

    Attributes:
        methods: The bound methods that filled the state.
        image_mask: bool ``[batch, prompt]``, image tokens. Positions behind it were generated: never image tokens.
        valid_mask: bool ``[batch, prompt]``, tokens that are no padding.
        input_ids: int64 ``[batch, prompt]``, or ``None`` when the model was called with embeddings.
        any_image: Whether any sample has an image token.
        all_images: Whether every sample has one.
        learned: What methods learned, by (method index, site index or ``SHARED``).
        decoded: Ids generated since the prompt, as (position, ids ``[batch, n]``); kept only for methods that read
            the text of earlier turns again.
        is_answered: Whether any token was decoded since the prompt.
        in_encoder: Whether the masks are those of an encoder's tokens, and all tokens of the decoder generated ones.
        key_masks: Properties of the prompt's tokens derived from the masks, by name.
        constants: Tensors that methods made once, by (method index, site index).
        branch: The other branch of a decoding method.
    """

    methods: tuple[Method, ...]
    image_mask: torch.Tensor
    valid_mask: torch.Tensor
    input_ids: torch.Tensor | None
    any_image: bool
    all_images: bool = False
    learned: dict[tuple[int, int], Any] = field(default_factory=dict)
    decoded: list[tuple[int | torch.Tensor, torch.Tensor]] = field(default_factory=list)
    is_answered: bool = False
    in_encoder: bool = False
    key_masks: dict[str, torch.Tensor] = field(default_factory=dict)
    constants: dict[tuple[int, int], Any] = field(default_factory=dict)
    branch: Branch | None = None

    def cropped(self, length: int) -> SequenceState:
        """Return the state of the first ``length`` tokens, fewer than the prompt has."""
        return replace(
            self,
            image_mask=self.image_mask[:, :length],
            valid_mask=self.valid_mask[:, :length],
            input_ids=None if self.input_ids is None else self.input_ids[:, :length],
            learned={key: self.methods[key[0]].crop(value, length) for key, value in self.learned.items()},
            decoded=[],
            key_masks={},
        )

    def reorder(self, beams: torch.Tensor) -> None:
        """Follow a reordering of the batch by beam search; beams of one prompt share its masks."""
        for key, value in self.learned.items():
            self.learned[key] = self.methods[key[0]].reorder(value, beams)

    def key_mask(self, name: str) -> torch.Tensor:
        """Return a property of the prompt's tokens, bool ``[batch, prompt]``.

        Args:
            name: ``"image"``; ``"valid"`` (no padding); ``"prompt"`` (all); ``"prefix"`` (before the first image
                token, no padding); ``"behind"`` (no image, behind the first image token, no padding); ``"first"`` (the
                first token that is no padding).
        """
        if name not in self.key_masks:
            image, valid = self.image_mask, self.valid_mask
            seen = image.cumsum(1) > 0
            self.key_masks[name] = {
                "image": lambda: image,
                "valid": lambda: valid,
                "prompt": lambda: torch.ones_like(image),
                "prefix": lambda: valid & ~seen & image.any(1, keepdim=True),
                "behind": lambda: valid & seen & ~image,
                "first": lambda: valid & (valid.cumsum(1) == 1),
            }[name]()
        return self.key_masks[name]


class Rows(NamedTuple):
    """Query rows of a forward.

    Attributes:
        start: First row, relative to the forward.
        stop: End of the rows.
        mask: bool ``[batch, stop - start]``: which of them count in each sample; ``None`` for all.
    """

    start: int
    stop: int
    mask: torch.Tensor | None

    def part(self, start: int, stop: int) -> Rows:
        """Return the same choice among the rows ``start..stop - 1``, some of which may lie outside."""
        if self.mask is None and start >= self.start and stop <= self.stop:
            return Rows(start, stop, None)
        mask = self.mask
        if mask is None:
            raise AssertionError("rows without a mask are never cut")
        inside = mask[:, max(start - self.start, 0) : max(stop - self.start, 0)]
        before, after = max(min(self.start, stop) - start, 0), max(stop - max(self.stop, start), 0)
        return Rows(start, stop, F.pad(inside, (before, after)))


class Forward:
    """One forward of a patched model.

    Attributes:
        is_prefill: Whether the forward reads a prompt (a first one, or a further turn) rather than decodes.
        past: Tokens in the cache before this forward: int, or a 0-d tensor with a static cache while decoding.
        q_len: Tokens of this forward.
        prompt_len: Those of them that belong to the prompt; drafted tokens of assisted decoding may follow.
        text_only: The image-free pass over the same prompt, when a method needs one.
        begins: Whether it is the first forward of an answer: it reads a prompt, or an encoder has just read one.
        pending: What a decoding method does once the forward is over.
        past_is_live: Whether ``past`` is the cache's own counter, which the first layer moves on.
        early: By decoder layer, the residual stream behind it in the rows that predict new tokens,
            ``[batch, rows, hidden_size]``, for methods that mix logits.
    """

    def __init__(
        self,
        state: SequenceState,
        counters: Counters,
        *,
        is_prefill: bool,
        past: int | torch.Tensor,
        q_len: int,
        prompt_len: int,
        first_rows: dict[str, int] | None = None,
        text_only: TextOnlyForward | None = None,
    ) -> None:
        self.state = state
        self.counters = counters
        self.is_prefill = is_prefill
        self.past = past
        self.q_len = q_len
        self.prompt_len = prompt_len
        self.text_only = text_only
        self.begins = is_prefill
        self.pending: Pending | None = None
        self.early: dict[int, torch.Tensor] = {}
        self.past_is_live = False
        self.edited: list[list[torch.Tensor]] = [[] for _ in state.methods]
        self.finished = False
        self._first_rows = first_rows or {}
        self._rows: dict[tuple[str, bool], Rows] = {}
        self._keys: dict[tuple[str, str, bool, int, torch.device], torch.Tensor] = {}
        self._once: dict[int, Any] = {}
        self._per_keys: dict[tuple[int, str, bool, int, torch.device], Any] = {}
        self._every_key: dict[torch.device, torch.Tensor] = {}

    def hold_past(self) -> None:
        """Keep the number of tokens before this forward, once the language model begins."""
        if self.past_is_live and isinstance(self.past, torch.Tensor):
            self.past, self.past_is_live = self.past.clone(), False

    @property
    def image_mask(self) -> torch.Tensor:
        """The image tokens: bool ``[batch, prompt]``."""
        return self.state.image_mask

    @property
    def valid_mask(self) -> torch.Tensor:
        """Tokens that are no padding: bool ``[batch, prompt]``."""
        return self.state.valid_mask

    @property
    def has_image(self) -> torch.Tensor:
        """Which samples have an image: bool ``[batch]``."""
        return self.state.image_mask.any(1)

    def at_last_position(self, states: torch.Tensor) -> torch.Tensor:
        """Pick each sample's last prompt token: ``[batch, q_len, ...]`` in, ``[batch, ...]`` out."""
        if self.state.in_encoder:
            return states[:, -1]
        valid = self.valid_mask[:, -self.prompt_len :].to(states.device)
        positions = torch.arange(self.prompt_len, device=states.device) + states.shape[1] - self.q_len
        last = (valid * positions).amax(1)
        return states[torch.arange(states.shape[0], device=states.device), last]

    def num_prompt_rows(self) -> torch.Tensor:
        """How many rows of a prompt's forward are no padding: int64 ``[batch]``."""
        if self.state.in_encoder:
            return torch.full_like(self.valid_mask[:, 0], self.q_len, dtype=torch.int64)
        return self.valid_mask[:, -self.prompt_len :].sum(1) + self.q_len - self.prompt_len

    def rows(self, kind: PromptRows, decode: bool = True) -> Rows:
        """Return query rows of samples with an image.

        Args:
            kind: Which rows of the prompt.
            decode: Whether rows of generated (or drafted) tokens belong to them.
        """
        if (kind, decode) not in self._rows:
            self._rows[kind, decode] = self._prompt_rows(kind, decode) if self.is_prefill else self._decode_rows(decode)
        return self._rows[kind, decode]

    @property
    def image_stop(self) -> int:
        """End of the last image among the rows of a prompt."""
        return self._first_rows["image_stop"]

    def _decode_rows(self, decode: bool) -> Rows:
        if not decode:
            return Rows(0, 0, self.has_image[:, None][:, :0])
        mask = None if self.state.all_images else self.has_image[:, None].expand(-1, self.q_len)
        return Rows(0, self.q_len, mask)

    def _prompt_rows(self, kind: PromptRows, decode: bool) -> Rows:
        image, valid, past = self.image_mask, self.valid_mask, self.past
        assert isinstance(past, int)
        has_image = self.has_image[:, None]
        drafted = self.q_len - self.prompt_len
        if kind == "none":
            start, mask = self.prompt_len, valid[:, :0]
        elif kind == "all":
            start, mask = 0, (valid & has_image)[:, past:]
        else:
            start = min(self._first_rows[kind], self.prompt_len)
            behind = valid & has_image & (image.flip(1).cumsum(1).flip(1) == 0)
            if kind == "last":
                behind &= valid.flip(1).cumsum(1).flip(1) == 1
            mask = behind[:, past + start :]
        if drafted and decode:
            mask = torch.cat([mask, has_image.expand(-1, drafted)], dim=1)
        return Rows(start, start + mask.shape[1], mask)

    def keys(self, name: str, site: Site, num_keys: int, device: torch.device) -> torch.Tensor:
        """Say which of a layer's keys are what, see ``SequenceState.key_mask``: bool ``[batch, num_keys]``."""
        key = (name, site.kind, site.is_sliding, num_keys, device)
        if key not in self._keys:
            if site.kind in ("image", "answer"):
                self._keys[key] = self._other_keys(name, site, num_keys).to(device)
            else:
                aligned = self.align(self.state.key_mask(name), site, num_keys).to(device)
                self._keys[key] = F.pad(aligned, (0, num_keys - aligned.shape[1]))
        return self._keys[key]

    def _other_keys(self, name: str, site: Site, num_keys: int) -> torch.Tensor:
        """Say what keys are that are no tokens of a prompt: image features, or a decoder's answer."""
        mask = self.has_image.new_zeros(self.has_image.shape[0], num_keys)
        if site.kind == "image" and name == "image":
            mask |= self.has_image[:, None]
        elif name == "valid" or (site.kind == "image" and name == "prompt"):
            mask |= True
        elif site.kind == "answer" and name == "first":
            mask[:, :1] = True
        return mask

    def align(self, per_key: torch.Tensor, site: Site, num_keys: int) -> torch.Tensor:
        """Align values ``[batch, prompt, ...]`` with a layer's keys, see ``Layer.visible_keys``."""
        if not site.is_sliding:
            return per_key[:, :num_keys]
        offset = self.key_offset(site, num_keys)
        if isinstance(offset, int):
            return per_key[:, offset : offset + num_keys]
        positions = torch.arange(num_keys, device=per_key.device) + offset
        padded = F.pad(per_key, (0, 0) * (per_key.dim() - 2) + (0, 1))
        return padded[:, positions.clamp_max(per_key.shape[1])]

    def key_offset(self, site: Site, num_keys: int) -> int | torch.Tensor:
        """Return the position of a layer's first key; a sliding cache has dropped what was before."""
        if not site.is_sliding:
            return 0
        offset = self.past + self.q_len - num_keys
        return offset.clamp_min(0) if isinstance(offset, torch.Tensor) else max(offset, 0)

    def once(self, index: int, make: Callable[[], Any]) -> Any:
        """Return what ``make`` returned when method number ``index`` first asked in this forward."""
        if index not in self._once:
            self._once[index] = make()
        return self._once[index]

    def per_keys(self, index: int, site: Site, like: torch.Tensor, make: Callable[[], Any]) -> Any:
        """Return what ``make`` returned when method number ``index`` first asked at keys of this number and kind."""
        key = (index, site.kind, site.is_sliding, like.shape[-1], like.device)
        if key not in self._per_keys:
            self._per_keys[key] = make()
        return self._per_keys[key]

    def every_key(self, device: torch.device) -> torch.Tensor:
        """Say that every row sees every key: bool ``[1, 1, 1, 1]``."""
        if device not in self._every_key:
            self._every_key[device] = torch.ones((1, 1, 1, 1), dtype=torch.bool, device=device)
        return self._every_key[device]

    def head_index(self, site: Site, call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the written heads of a site and the key heads they share, int64 on the call's device."""
        key = (HEAD_INDEX, site.index)
        if key not in self.state.constants:
            assert site.written_heads is not None
            index = torch.tensor(site.written_heads, device=call.query.device)
            self.state.constants[key] = (index, index // (call.query.shape[1] // call.key.shape[1]))
        found: tuple[torch.Tensor, torch.Tensor] = self.state.constants[key]
        return found

    def layer(self, site: Site, index: int) -> Layer:
        """What method number ``index`` sees at a site."""
        return Layer(self, site, index)

    # Called by the hooks on decoder layers and by the attention function.

    def before_layer(self, site: Site, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """See the input of a decoder layer."""
        if not self.is_prefill:
            return
        if self.text_only is not None:
            self.text_only.before_layer_of_image_run(site)
        if site.readers:
            hidden_states = (args[0] if args else kwargs["hidden_states"])[..., : self.prompt_len, :]
            if hidden_states.dim() == 4:  # Gemma 3n keeps several streams, one of which attention reads
                hidden_states = hidden_states[getattr(site.base_config, "altup_active_idx", 0)]
            for index, method in site.readers:
                layer = self.layer(site, index)
                layer.learned = method.learn(hidden_states, layer)

    def after_layer(self, site: Site) -> None:
        """Follow with the image-free stream, once this layer's heads are chosen."""
        if self.is_prefill and self.text_only is not None:
            self.text_only.after_layer_of_image_run(site, self)

    def attend(self, site: Site, call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Compute attention with the edits of this site; without any, exactly what the base kernel returns."""
        from vlmfix.engine.attend import attend

        return attend(self, site, call)

    def finish(self) -> None:
        """Settle what was learned and count what was edited; called once, after the forward."""
        if self.finished:
            return
        self.finished = True
        if self.is_prefill and not torch.compiler.is_compiling():
            for index, method in enumerate(self.state.methods):
                learned = {
                    site: value
                    for (owner, site), value in self.state.learned.items()
                    if owner == index and site != SHARED
                }
                if learned:
                    method.settle(learned)
        self.counters.add(self)


class Layer:
    """What a method sees of one layer in one forward.

    Attributes:
        forward: The forward.
        site: The attention module's place in the model; ``site.layer_idx`` is its layer.
        call: The attention call, or ``None`` in the hooks that come before it.
        rows: Half-open range of the query rows in hand, relative to the forward.
        row_mask: bool ``[batch, rows]``: which of them are up for edits, or ``None`` for all.
    """

    __slots__ = ("_index", "call", "forward", "row_mask", "rows", "site")

    def __init__(
        self, forward: Forward, site: Site, index: int, call: AttentionCall | None = None, rows: Rows | None = None
    ) -> None:
        self.forward = forward
        self.site = site
        self.call = call
        self.rows = (0, forward.q_len) if rows is None else (rows.start, rows.stop)
        self.row_mask = None if rows is None else rows.mask
        self._index = index

    def at(self, call: AttentionCall, rows: Rows | None = None) -> Layer:
        """Return the same layer for some query rows of an attention call."""
        return Layer(self.forward, self.site, self._index, call, rows)

    @property
    def heads(self) -> tuple[int, ...] | None:
        """The query heads in hand, in order; ``None`` for all of them."""
        return None if self.call is None else self.call.heads

    @property
    def learned(self) -> Any:
        """What the method learned here in this sequence, or ``None``."""
        return self.forward.state.learned.get((self._index, self.site.index))

    @learned.setter
    def learned(self, value: Any) -> None:
        self.forward.state.learned[self._index, self.site.index] = value

    @property
    def shared(self) -> Any:
        """What the method learned in this sequence for all layers, or ``None``."""
        return self.forward.state.learned.get((self._index, SHARED))

    @shared.setter
    def shared(self, value: Any) -> None:
        self.forward.state.learned[self._index, SHARED] = value

    def constant(self, make: Callable[[], Any]) -> Any:
        """Return what ``make`` returned for this layer when it was first asked in this sequence (head masks)."""
        constants = self.forward.state.constants
        key = (self._index, self.site.index)
        if key not in constants:
            constants[key] = make()
        return constants[key]

    def once(self, make: Callable[[], Any]) -> Any:
        """Return what ``make`` returned when this method first asked in this forward, in any layer."""
        return self.forward.once(self._index, make)

    def per_keys(self, make: Callable[[], Any], like: torch.Tensor) -> Any:
        """Return what ``make`` returned when this method first asked in this forward in a layer with keys as these.

        Args:
            make: Makes what depends on the keys alone, and not on the layer.
            like: A tensor ``[batch, ..., keys]``.
        """
        return self.forward.per_keys(self._index, self.site, like, make)

    def text_only_heads(self) -> torch.Tensor:
        """Head outputs of the image-free pass at its last position, ``[batch, num_heads, head_dim]``."""
        assert self.forward.text_only is not None
        return self.forward.text_only.head_outputs[self.site.index]

    def visible_keys(self, per_key: torch.Tensor, num_keys: int) -> torch.Tensor:
        """Align values ``[batch, prompt, ...]`` with the first of ``num_keys`` keys; a sliding cache drops early ones.

        Returns:
            ``[batch, n, ...]`` with ``n <= num_keys``; keys behind ``n`` are no prompt tokens.
        """
        return self.forward.align(per_key, self.site, num_keys)

    def keys(self, name: str, like: torch.Tensor) -> torch.Tensor:
        """Say which keys are what.

        Args:
            name: See ``SequenceState.key_mask``; or ``"generated"``: behind the prompt.
            like: A tensor ``[batch, ..., keys]``.

        Returns:
            Bool ``[batch, keys]``.
        """
        if name == "generated":
            return ~self.forward.keys("prompt", self.site, like.shape[-1], like.device)
        return self.forward.keys(name, self.site, like.shape[-1], like.device)

    @staticmethod
    def scale_known(attn_weights: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        """Multiply the weights of the first ``n`` keys by ``factor`` ``[batch, num_heads, rows, n]``."""
        known = factor.shape[-1]
        if attn_weights.requires_grad:
            return torch.cat([attn_weights[..., :known] * factor, attn_weights[..., known:]], dim=-1)
        attn_weights[..., :known] *= factor
        return attn_weights

    def count(self, edited: torch.Tensor) -> None:
        """Count edited (sample, head, row) triples: integer or bool of any shape, added up after the forward."""
        self.forward.edited[self._index].append(edited)


def extend_mask(known: torch.Tensor | None, new: torch.Tensor, past: int, fill: bool = False) -> torch.Tensor:
    """Append a bool mask ``[batch, q_len]`` of new tokens to that of ``past`` tokens, of which only some are known."""
    if known is None:
        return F.pad(new, (past, 0), value=fill) if past else new
    known = known[:, :past].to(new.device)
    return torch.cat([F.pad(known, (0, past - known.shape[1]), value=fill), new], dim=1)


def state_of(cache: object) -> SequenceState | None:
    """Return the state kept on a cache object, if any."""
    return getattr(cache, STATE_ATTRIBUTE, None)
