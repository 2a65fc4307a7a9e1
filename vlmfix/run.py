"""What is known during one forward (``Run``) and along one sequence (``SequenceState``, kept on the cache).

A ``Run`` is created by a hook on the model, travels down to every attention call in its keyword arguments and dies with
the forward. What must outlive it (image mask, learned sinks, chosen heads) sits on the cache object, so that it dies
with the sequence and follows copies, crops and further turns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from vlmfix.attention import AttentionCall, attended_keys, explicit_attention, explicit_weights, weighted_values
from vlmfix.errors import UnsupportedFeatureError

if TYPE_CHECKING:
    from vlmfix.activity import Counters
    from vlmfix.methods.base import Method
    from vlmfix.sites import Site
    from vlmfix.text_only import TextOnlyRun

STATE_ATTRIBUTE = "_vlmfix"
"""The attribute of a cache object that holds its ``SequenceState``."""


@dataclass
class SequenceState:
    """What is known about a batch of sequences after their last prompt.

    Attributes:
        methods: The bound methods that filled the state.
        image_mask: bool ``[batch, prompt]``, image tokens. Positions behind it were generated: never image tokens.
        valid_mask: bool ``[batch, prompt]``, tokens that are no padding.
        input_ids: int64 ``[batch, prompt]``, or ``None`` when the model was called with embeddings.
        any_image: Whether any sample has an image token.
        learned: What methods learned, by (method index, site index).
        decoded: Ids generated since the prompt, as (position, ids ``[batch, n]``); kept only for methods that read
            the text of earlier turns again.
    """

    methods: tuple[Method, ...]
    image_mask: torch.Tensor
    valid_mask: torch.Tensor
    input_ids: torch.Tensor | None
    any_image: bool
    learned: dict[tuple[int, int], Any] = field(default_factory=dict)
    decoded: list[tuple[int | torch.Tensor, torch.Tensor]] = field(default_factory=list)

    def cropped(self, length: int) -> SequenceState:
        """Return the state of the first ``length`` tokens, fewer than the prompt has."""
        return replace(
            self,
            image_mask=self.image_mask[:, :length],
            valid_mask=self.valid_mask[:, :length],
            input_ids=None if self.input_ids is None else self.input_ids[:, :length],
            learned={key: self.methods[key[0]].crop(value, length) for key, value in self.learned.items()},
            decoded=[],
        )


class Run:
    """One forward of a patched model.

    Attributes:
        is_prefill: Whether the forward reads a prompt (a first one, or a further turn) rather than decodes.
        past: Tokens in the cache before this forward: int, or a 0-d tensor with a static cache while decoding.
        q_len: Tokens of this forward.
        prompt_len: Those of them that belong to the prompt; drafted tokens of assisted decoding may follow.
        rows: Half-open range of query rows to edit in this forward, relative to ``q_len``.
        row_mask: bool ``[batch, rows]``: which of those rows each sample lets edit; ``None`` for all.
        text_only: The image-free pass over the same prompt, when a method needs one.
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
        rows: tuple[int, int],
        row_mask: torch.Tensor | None = None,
        text_only: TextOnlyRun | None = None,
    ) -> None:
        self.state = state
        self.counters = counters
        self.is_prefill = is_prefill
        self.past = past
        self.q_len = q_len
        self.prompt_len = prompt_len
        self.rows = rows
        self.row_mask = row_mask
        self.text_only = text_only
        self.edited: list[list[torch.Tensor]] = [[] for _ in state.methods]
        self.finished = False

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
        valid = self.valid_mask[:, -self.prompt_len :].to(states.device)
        positions = torch.arange(self.prompt_len, device=states.device) + states.shape[1] - self.q_len
        last = (valid * positions).amax(1)
        return states[torch.arange(states.shape[0], device=states.device), last]

    def num_prompt_rows(self) -> torch.Tensor:
        """How many rows of a prompt's forward are no padding: int64 ``[batch]``."""
        return self.valid_mask[:, -self.prompt_len :].sum(1) + self.q_len - self.prompt_len

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
            for index, method in site.readers:
                layer = self.layer(site, index)
                layer.learned = method.learn(hidden_states, layer)

    def after_layer(self, site: Site) -> None:
        """Follow with the image-free stream, once this layer's heads are chosen."""
        if self.is_prefill and self.text_only is not None:
            self.text_only.after_layer_of_image_run(site, self)

    def attend(self, site: Site, call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Compute attention with the edits of this site; without any, exactly what the base kernel returns."""
        if not self.state.any_image:
            return call.base()
        weights_edits = [
            (method, layer)
            for method, layer in [(method, self.layer(site, index)) for index, method in site.weights]
            if method.acts_at(layer)
        ]
        if not weights_edits or self.rows[0] >= self.rows[1]:
            head_outputs, attn_weights = call.base()
        elif self.is_prefill:
            head_outputs, attn_weights = self._edit_some_rows(call, weights_edits)
        else:
            # Every row is edited: the base kernel would compute the same rows a second time.
            attn_weights = self._edited_weights(explicit_weights(call, *self.rows), weights_edits)[0]
            head_outputs, attn_weights = explicit_attention(call, attn_weights)
        for index, method in site.heads:
            head_outputs = method.edit_heads(head_outputs, self.layer(site, index))
        return head_outputs, attn_weights

    def _edit_some_rows(
        self, call: AttentionCall, edits: list[tuple[Method, Layer]]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Run the base kernel for all rows and write the edited rows over its result, chunk by chunk."""
        head_outputs, attn_weights = call.base()
        if head_outputs.requires_grad:  # autograd keeps what the kernel returned
            head_outputs = head_outputs.clone()
            attn_weights = None if attn_weights is None else attn_weights.clone()
        for start, stop in call.row_chunks(*self.rows):
            chunk = [(method, layer.at_rows(start, stop)) for method, layer in edits]
            edited_weights, selected = self._edited_weights(explicit_weights(call, start, stop), chunk)
            edited = weighted_values(call, edited_weights)
            rows = head_outputs[:, start:stop]
            head_outputs[:, start:stop] = torch.where(selected.transpose(1, 2)[..., None], edited, rows)
            if attn_weights is not None:
                known = edited_weights.shape[-1]
                stock = attn_weights[:, :, start:stop, :known]
                attn_weights[:, :, start:stop, :known] = torch.where(
                    selected[..., None], edited_weights.to(stock.dtype), stock
                )
        return head_outputs, attn_weights

    def _edited_weights(
        self, attn_weights: torch.Tensor, edits: list[tuple[Method, Layer]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        selected: torch.Tensor | None = None
        for method, layer in edits:
            attn_weights, edited = method.edit_weights(attn_weights, layer)
            if layer.row_mask is not None:
                edited = edited & layer.row_mask[:, None].to(edited.device)
            layer.count(edited.sum())
            selected = edited if selected is None else selected | edited
        assert selected is not None
        return attn_weights, selected

    def finish(self) -> None:
        """Settle what was learned and count what was edited; called once, after the forward."""
        if self.finished:
            return
        self.finished = True
        if self.is_prefill and not torch.compiler.is_compiling():
            for index, method in enumerate(self.state.methods):
                learned = {site: value for (owner, site), value in self.state.learned.items() if owner == index}
                if learned:
                    method.settle(learned)
        self.counters.add(self)


class Layer:
    """What a method sees of one layer in one forward.

    Attributes:
        run: The forward.
        site: The attention module's place in the model; ``site.layer_idx`` is its layer.
        row_mask: bool ``[batch, rows]``: which of the rows in hand are up for edits, or ``None`` for all.
    """

    __slots__ = ("_index", "row_mask", "run", "site")

    def __init__(self, run: Run, site: Site, index: int, row_mask: torch.Tensor | None = None) -> None:
        self.run = run
        self.site = site
        self.row_mask = row_mask
        self._index = index

    def at_rows(self, start: int, stop: int) -> Layer:
        """Return the same layer for the query rows ``start..stop - 1`` of the forward."""
        mask = self.run.row_mask
        first = self.run.rows[0]
        return Layer(self.run, self.site, self._index, None if mask is None else mask[:, start - first : stop - first])

    @property
    def learned(self) -> Any:
        """What the method learned here in this sequence, or ``None``."""
        return self.run.state.learned.get((self._index, self.site.index))

    @learned.setter
    def learned(self, value: Any) -> None:
        self.run.state.learned[self._index, self.site.index] = value

    def text_only_heads(self) -> torch.Tensor:
        """Head outputs of the image-free pass at its last position, ``[batch, num_heads, head_dim]``."""
        assert self.run.text_only is not None
        return self.run.text_only.head_outputs[self.site.index]

    def visible_keys(self, per_key: torch.Tensor, num_keys: int) -> torch.Tensor:
        """Align values ``[batch, prompt, ...]`` with the first of ``num_keys`` keys; a sliding cache drops early ones.

        Returns:
            ``[batch, n, ...]`` with ``n <= num_keys``; keys behind ``n`` are no prompt tokens.
        """
        past, prompt = self.run.past, per_key.shape[1]
        if not self.site.is_sliding:
            return per_key[:, :num_keys]
        if isinstance(past, int):
            offset = max(past + self.run.q_len - num_keys, 0)
            return per_key[:, offset : offset + num_keys]
        positions = torch.arange(num_keys, device=per_key.device) + (past + self.run.q_len - num_keys).clamp_min(0)
        padded = F.pad(per_key, (0, 0) * (per_key.dim() - 2) + (0, 1))
        return padded[:, positions.clamp_max(prompt)]

    @staticmethod
    def scale_known(attn_weights: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        """Multiply the weights of the first ``n`` keys by ``factor`` ``[batch, num_heads, rows, n]``."""
        known = factor.shape[-1]
        if attn_weights.requires_grad:
            return torch.cat([attn_weights[..., :known] * factor, attn_weights[..., known:]], dim=-1)
        attn_weights[..., :known] *= factor
        return attn_weights

    def count(self, edited: torch.Tensor) -> None:
        """Count edited (sample, head, row) triples: a 0-d integer tensor, added up without waiting for the device."""
        self.run.edited[self._index].append(edited)


def extend_mask(known: torch.Tensor | None, new: torch.Tensor, past: int, fill: bool = False) -> torch.Tensor:
    """Append a bool mask ``[batch, q_len]`` of new tokens to that of ``past`` tokens, of which only some are known."""
    if known is None:
        return F.pad(new, (past, 0), value=fill) if past else new
    known = known[:, :past].to(new.device)
    return torch.cat([F.pad(known, (0, past - known.shape[1]), value=fill), new], dim=1)


def _ids_so_far(state: SequenceState, past: int) -> torch.Tensor:
    """Return the ids of the first ``past`` tokens, -1 where they are not known."""
    ids = state.valid_mask.new_full((state.valid_mask.shape[0], past), -1, dtype=torch.int64)
    prompt = state.input_ids
    parts = [] if prompt is None else [(0, prompt), *state.decoded]
    for where, known in parts:
        position = int(where)
        stop = min(position + known.shape[1], past)
        ids[:, position:stop] = known[:, : max(stop - position, 0)]
    return ids


def state_of(cache: object) -> SequenceState | None:
    """Return the state kept on a cache object, if any."""
    return getattr(cache, STATE_ATTRIBUTE, None)


def begin_prompt(
    methods: tuple[Method, ...],
    counters: Counters,
    *,
    input_ids: torch.Tensor | None,
    image_mask: torch.Tensor,
    attention_mask: Any,
    known: SequenceState | None,
    past: int,
    drafted: int,
    text_only: Callable[[SequenceState], TextOnlyRun | None],
) -> Run:
    """Start a forward that reads a prompt.

    Args:
        methods: The bound methods.
        counters: The patch's counters.
        input_ids: int64 ``[batch, q_len]`` or ``None``.
        image_mask: bool ``[batch, q_len]`` of the new tokens.
        attention_mask: What the model was called with, see ``attended_keys``.
        known: State of the earlier turns, if any.
        past: Tokens in the cache.
        drafted: How many of the new tokens are a drafted answer behind the prompt.
        text_only: Runs the image-free pass for a state, or returns ``None``.

    Returns:
        The run; its state must be stored on the cache.

    Raises:
        UnsupportedFeatureError: The cache belongs to a batch of another size.
    """
    batch, q_len = image_mask.shape
    if known is not None and known.image_mask.shape[0] != batch:
        raise UnsupportedFeatureError(
            f"The cache was filled with a batch of {known.image_mask.shape[0]} sequences and is now used with {batch}. "
            "Expand the inputs before the first forward (generate does), or start with an empty cache."
        )
    prompt_len = q_len - drafted
    valid = attended_keys(attention_mask, past, q_len, image_mask)[:, :prompt_len]
    image_mask = extend_mask(None if known is None else known.image_mask, image_mask[:, :prompt_len] & valid, past)
    valid = extend_mask(None if known is None else known.valid_mask, valid, past, fill=True)
    decoded: list[tuple[int | torch.Tensor, torch.Tensor]] = []
    if input_ids is not None:
        if drafted:
            decoded.append((past + prompt_len, input_ids[:, prompt_len:]))
        input_ids = input_ids[:, :prompt_len]
        if known is not None:
            input_ids = torch.cat([_ids_so_far(known, past), input_ids], dim=1)
    # The one place that waits for the device: which samples have an image, and where the first of the last ones ends.
    positions = torch.arange(past + prompt_len, device=image_mask.device)
    last_image = torch.where(image_mask, positions, -1).amax(1)
    ends = last_image.tolist()
    learned = dict(known.learned) if known is not None else {}
    state = SequenceState(methods, image_mask, valid, input_ids, max(ends) >= 0, learned, decoded)
    first_row = min((max(end + 1 - past, 0) for end in ends if end >= 0), default=q_len)
    row_mask = (positions > last_image[:, None]) & (last_image[:, None] >= 0) & valid
    if drafted:
        row_mask = torch.cat([row_mask, (last_image >= 0)[:, None].expand(batch, drafted)], dim=1)
    run = Run(
        state,
        counters,
        is_prefill=True,
        past=past,
        q_len=q_len,
        prompt_len=prompt_len,
        rows=(first_row, q_len),
        row_mask=row_mask[:, past + first_row :],
    )
    if state.any_image:
        run.text_only = text_only(state)
    return run
