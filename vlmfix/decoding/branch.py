"""The other branch of a batch of sequences: what is kept of it, its part of a step, and forwards over both."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from vlmfix.decoding.caches import PairedCache, length_of_layer
from vlmfix.decoding.other_image import looks_of
from vlmfix.engine.begin import ForwardBeginner
from vlmfix.engine.forwards import EditedForward, StockForward
from vlmfix.engine.places import Places
from vlmfix.engine.plan import PatchedSite, make_sites
from vlmfix.methods.base import Method
from vlmfix.methods.sequence import SequenceState
from vlmfix.model.anatomy import Anatomy
from vlmfix.model.attention import AttentionCall

TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids")
"""Arguments ``[batch, length]`` that give each token a kind."""


WATCHED = ("output_attentions", "output_hidden_states")
"""What a caller may ask to see of a forward: always of the model's own branch."""


NOT_HANDED_ON = ("past_key_values", "use_cache", "return_dict", "cache_position", "labels", "logits_to_keep", *WATCHED)
"""Arguments of the model's own forward that the other branch's gets its own of, or none."""


@dataclass
class Branch:
    """The other branch of a batch of sequences; kept in their ``SequenceState``.

    Attributes:
        active: Which rows are contrasted: bool ``[batch]``.
        swapped: In which rows the model's own prompt is the one to contrast against: bool ``[batch]`` or ``None``.
        valid: Tokens of its prompt that are no padding: bool ``[batch, length]``.
        own_length: Tokens in the model's own branch behind the same prompt.
        last_position: Position of its prompt's last token, ``[(dims,) batch, 1]``; ``None`` where both have the same.
        cache: Its cache, where it has one of its own.
        pair: Both caches in one, where they fit.
        first_logits: The model's own logits of the answer's first token, fp32 ``[batch, vocab]``, where they are kept.
        is_dense: Whether there is no padding, so that steps need not look.
    """

    active: torch.Tensor
    swapped: torch.Tensor | None
    valid: torch.Tensor
    own_length: int
    last_position: torch.Tensor | None = None
    cache: Any = None
    pair: PairedCache | None = None
    first_logits: torch.Tensor | None = None

    def __post_init__(self) -> None:
        """Look once whether there is padding."""
        self.is_dense = bool(self.valid.all())

    def reorder(self, own: Any, beams: torch.Tensor) -> None:
        """Follow a reordering of the batch, the model's own cache included."""
        if self.first_logits is not None:
            self.first_logits = self.first_logits[beams.to(self.first_logits.device)]
        if self.pair is not None:
            self.pair.reorder(beams)
            self.pair.show(own)
            return
        type(own).reorder_cache(own, beams)
        if self.cache is not None:
            self.cache.reorder_cache(beams)

    def follow(self, own: Any) -> None:
        """Crop the other branch as far as the model's own cache has been cropped."""
        length = own.get_seq_length()
        if self.pair is not None:
            self.pair.crop(length)
        if self.cache is None:
            return
        extra = self.cache.get_seq_length() - self.valid.shape[1] - (length - self.own_length)
        if extra:
            self.cache.crop(-extra)

    def part(self) -> None:
        """Go on with a cache of its own."""
        if self.pair is not None:
            self.cache, self.pair = self.pair.other(), None

    # The step in which both branches read the token number ``steps`` of the answer, and choose the next.

    def steps(self, past: int) -> int:
        """Return the number of the token that is read behind ``past`` others of the model's own branch, from 1."""
        return past + 1 - self.own_length

    def step(self, inputs: dict[str, Any], steps: int) -> dict[str, Any]:
        """Return the other branch's arguments of a step that the model's own branch reads with ``inputs``."""
        arguments = {name: value for name, value in inputs.items() if name not in NOT_HANDED_ON}
        own = inputs.get("attention_mask")  # without any, there is only padding of its own to hide
        mask = None if self.is_dense else F.pad(self.valid, (0, steps), value=True).long()
        if own is not None:
            mask = torch.cat([self.valid.to(own), own[:, self.own_length : self.own_length + steps]], dim=1)
        arguments["attention_mask"] = mask
        if self.last_position is not None:
            arguments["position_ids"] = self.last_position + steps
        for name in TOKEN_TYPES:
            if arguments.get(name) is not None:
                arguments[name] = arguments[name][:, -1:]
        for name, looks in looks_of(arguments).items():
            if looks.shape[1] > 1:  # a step's token looks at what the token before it looked at
                arguments[name] = looks[:, -1:].expand(-1, self.valid.shape[1] + steps, *looks.shape[2:])
        if inputs.get("cache_position") is not None:  # transformers 4
            arguments["cache_position"] = torch.full_like(inputs["cache_position"], self.valid.shape[1] + steps - 1)
        return arguments

    def joined_step(self, inputs: dict[str, Any], kwargs: dict[str, Any], steps: int) -> dict[str, Any]:
        """Return the keyword arguments of a step of both branches in one forward, the model's own rows first."""
        assert self.pair is not None
        batch, other = len(self.active), self.step(inputs, steps)
        joined = {}
        for name, value in inputs.items():
            joined[name] = by_row(value, batch, lambda tensor: torch.cat([tensor, tensor]), dims=2)
            if name in TOKEN_TYPES and value is not None:
                joined[name] = joined[name][:, -1:]
        joined.pop("cache_position", None)
        joined["past_key_values"] = self.pair.cache
        joined["attention_mask"] = self._joined_masks(inputs.get("attention_mask"), other["attention_mask"], steps)
        positions = self._joined_positions(inputs.get("position_ids"), other.get("position_ids"), steps)
        joined["position_ids"] = positions
        if positions is None:
            del joined["position_ids"]
        return {name: value for name, value in joined.items() if name in kwargs or value is not None}

    def _joined_masks(self, own: torch.Tensor | None, other: torch.Tensor | None, steps: int) -> torch.Tensor | None:
        assert self.pair is not None
        if own is None and other is None and self.pair.padding == (0, 0):
            return None
        lengths = (self.own_length + steps, self.valid.shape[1] + steps)
        masks = [
            self.valid.new_ones(len(self.valid), length).long() if mask is None else mask[:, :length].long()
            for mask, length in zip((own, other), lengths, strict=True)
        ]
        return torch.cat([F.pad(mask, (padding, 0)) for mask, padding in zip(masks, self.pair.padding, strict=True)])

    def _joined_positions(
        self, own: torch.Tensor | None, other: torch.Tensor | None, steps: int
    ) -> torch.Tensor | None:
        assert self.pair is not None
        if own is None and other is None and self.pair.padding == (0, 0):
            return None
        batch = len(self.active)
        if own is None:
            own = torch.full((batch, 1), self.own_length + steps - 1, device=self.valid.device)
        if other is None:
            other = own
        own, other = (each.expand(*each.shape[:-2], batch, -1)[..., -1:] for each in (own, other))
        # Qwen-VL: one for all, in a further call
        dims = torch.broadcast_shapes(own.shape[:-2], other.shape[:-2])  # type: ignore[no-untyped-call]
        return torch.cat([each.expand(*dims, batch, 1) for each in (own, other)], dim=-2)


class PairedForward(StockForward):
    """A step of both branches in one forward.

    Attributes:
        own: The forward of the model's own branch, which is what attention methods see.
        branch: The other branch.
        cache: The model's own cache.
    """

    joins_branches = True

    def __init__(self, own: EditedForward, branch: Branch, cache: Any) -> None:
        self.own = own
        self.branch = branch
        self.cache = cache

    def attend(self, site: PatchedSite, call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Compute attention with the edits of a site in the rows of the model's own branch only."""
        pair, rows = self.branch.pair, call.query.shape[0]
        assert pair is not None
        own_keys = length_of_layer(pair.cache.layers[site.module.layer_idx], int(self.own.past)) + 1
        own, _ = self.own.attend(site, _rows_of_call(call, slice(rows // 2), call.key.shape[2] - own_keys))
        other, _ = _rows_of_call(call, slice(rows // 2, rows), 0).base()
        return torch.cat([own, other]), None


class BranchForward(StockForward):
    """A forward of the other branch. The patch's sites lead to those of the branch's own method.

    Attributes:
        edited: The forward as that method sees it.
        sites: Where the method acts, by the number of the attention module.
    """

    def __init__(self, edited: EditedForward, sites: dict[int, PatchedSite]) -> None:
        self.edited = edited
        self.sites = sites

    def attend(self, site: PatchedSite, call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Compute attention with the edits of the branch's own method."""
        mine = self.sites.get(site.index)
        return call.base() if mine is None else self.edited.attend(mine, call._replace(site=mine))


class BranchEdits:
    """Lets a bound attention method act in the forwards of the other branch.

    What the method learns is kept on the branch's cache, apart from what the patch's methods learn on the model's own.
    """

    def __init__(self, anatomy: Anatomy, method: Method) -> None:
        self._model = anatomy.model
        self.methods = (method,)
        self._sites = {site.index: site for site in make_sites(anatomy, self.methods)}
        sites = tuple(self._sites.values())
        self._beginner, self._places = ForwardBeginner(anatomy, self.methods, sites), Places(anatomy, sites)

    def begin(self, inputs: dict[str, Any]) -> BranchForward:
        """Make the forward of a call with these arguments."""
        edited = self._beginner.begin(self._model, inputs)
        assert edited is not None
        return BranchForward(edited, self._sites)

    def finish(self, forward: BranchForward, cache: Any) -> None:
        """Settle what was learned in a forward, and keep it."""
        self._places.check(forward.edited, self._model)
        forward.edited.finish()
        if forward.edited.begins and cache is not None:
            self._beginner.keep(cache, forward.edited.state)

    def keep_text(self, cache: Any, state: SequenceState, length: int) -> None:
        """Note on a cache what is known of the first ``length`` tokens, which were read before there was an image."""
        nothing: dict[str, Any] = {"learned": {}, "constants": {}, "outdated": (), "branch": None}
        known = dataclasses.replace(state.cropped(length), methods=self.methods, lost_image=False, **nothing)
        self._beginner.keep(cache, known)


# What a forward returns, and the rows of one branch in it.


def next_token_rows(forward: EditedForward, logits: torch.Tensor) -> torch.Tensor:
    """Return which row of the logits predicts each sample's next token, int64 ``[batch]``."""
    rows = torch.arange(logits.shape[1], device=logits.device).expand(len(logits), -1)
    return forward.at_last_position(rows) if forward.is_prefill and logits.shape[1] == forward.q_len else rows[:, -1]


def logits_of(output: Any) -> torch.Tensor:
    """Return the logits ``[batch, tokens, vocab]``."""
    logits: torch.Tensor = output["logits"] if isinstance(output, dict) else output[0]
    return logits


def with_logits(output: Any, logits: torch.Tensor) -> Any:
    """Put other logits into an output: into the object itself, or into a new tuple."""
    if isinstance(output, dict):
        output["logits"] = logits
        return output
    return (logits, *output[1:])


def cache_of(output: Any, inputs: dict[str, Any]) -> Any:
    """Return the cache a forward has filled, if any."""
    parts = tuple(output.values()) if isinstance(output, dict) else output
    return next((part for part in parts if hasattr(part, "get_seq_length")), inputs.get("past_key_values"))


def own_part(output: Any, batch: int, paired: Any, own: Any) -> Any:
    """Return the first ``batch`` of twice as many rows, with the cache ``own`` in the place of ``paired``."""

    def part(value: Any) -> Any:
        return own if value is paired else by_row(value, 2 * batch, lambda rows: rows[:batch], dims=2)

    if isinstance(output, dict):
        return type(output)(**{name: part(value) for name, value in output.items()})
    return tuple(part(value) for value in output)


def by_row(value: Any, rows: int, pick: Callable[[torch.Tensor], Any], *, dims: int = 1) -> Any:
    """Apply ``pick`` to a tensor of ``rows`` rows and at least ``dims`` dimensions; return anything else as it is."""
    is_by_row = isinstance(value, torch.Tensor) and value.dim() >= dims and value.shape[0] == rows
    return pick(value) if is_by_row else value


def _rows_of_call(call: AttentionCall, rows: slice, padding: int) -> AttentionCall:
    """Return the part of a call for some rows, without the first ``padding`` keys."""

    def part(value: Any) -> Any:
        return by_row(value, call.query.shape[0], lambda tensor: tensor[rows])

    mask = part(call.attention_mask)
    return call._replace(
        query=part(call.query),
        key=part(call.key)[:, :, padding:],
        value=part(call.value)[:, :, padding:],
        attention_mask=mask[..., padding:] if isinstance(mask, torch.Tensor) else mask,
        kwargs={name: part(value) for name, value in call.kwargs.items()},
    )
