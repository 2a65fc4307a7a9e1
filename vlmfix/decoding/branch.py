"""The other branch of a batch of sequences, and steps of both branches in one forward."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from vlmfix.decoding.caches import PairedCache, length_of_layer
from vlmfix.decoding.other_prompt import TOKEN_TYPES, OtherPrompt
from vlmfix.engine.forwards import EditedForward, StockForward

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vlmfix.engine.plan import PatchedSite
    from vlmfix.model.attention import AttentionCall


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
    """

    active: torch.Tensor
    swapped: torch.Tensor | None
    valid: torch.Tensor
    own_length: int
    last_position: torch.Tensor | None
    cache: Any = None
    pair: PairedCache | None = None

    def reorder(self, own: Any, beams: torch.Tensor) -> None:
        """Follow a reordering of the batch, the model's own cache included."""
        if self.pair is not None:
            self.pair.reorder(beams)
            self.pair.show(own)
            return
        type(own).reorder_cache(own, beams)
        if self.cache is not None:
            self.cache.reorder_cache(beams)

    def mask(self, own_mask: torch.Tensor | None, steps: int) -> torch.Tensor | None:
        """Return the attention mask of a step: int64 ``[batch, length + steps]``, or ``None`` without padding."""
        if own_mask is None:
            return None if self.is_dense else F.pad(self.valid, (0, steps), value=True).long()
        return torch.cat([self.valid.to(own_mask), own_mask[:, self.own_length :]], dim=1)

    def positions(self, own: torch.Tensor | None, steps: int) -> torch.Tensor | None:
        """Return the positions of the token of step number ``steps`` (from 1): ``[(dims,) batch, 1]``."""
        return own if self.last_position is None else self.last_position + steps

    def __post_init__(self) -> None:
        """Look once whether there is padding."""
        self.is_dense = bool(self.valid.all())


@dataclass
class Pending:
    """What must be done once a forward of the model's own branch is over.

    Attributes:
        inputs: Its arguments by name.
        other: The prompt the other branch is to read, if it is a prompt's forward.
        cache: The cache the other branch is to read it with.
    """

    inputs: dict[str, Any] = field(default_factory=dict)
    other: OtherPrompt | None = None
    cache: Any = None


class PairedForward(StockForward):
    """A step of both branches in one forward.

    Attributes:
        own: The forward of the model's own branch, which is what attention methods see.
        branch: The other branch.
        cache: The model's own cache.
    """

    def __init__(self, own: EditedForward, branch: Branch, cache: Any) -> None:
        self.own = own
        self.branch = branch
        self.cache = cache

    def attend(self, site: PatchedSite, call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Compute attention with the edits of a site in the rows of the model's own branch only."""
        pair = self.branch.pair
        assert pair is not None
        batch = call.query.shape[0] // 2
        layer, past = pair.cache.layers[site.module.layer_idx], int(self.own.past)
        own_keys = length_of_layer(layer, past) + 1
        own, _ = self.own.attend(site, _rows(call, 0, batch, call.key.shape[2] - own_keys))
        other, _ = _rows(call, batch, 2 * batch, 0).base()
        return torch.cat([own, other]), None


def _rows(call: AttentionCall, start: int, stop: int, padding: int) -> AttentionCall:
    """Return the part of a call for some rows, without the first ``padding`` keys."""
    batch = call.query.shape[0]

    def part(value: Any) -> Any:
        is_by_row = isinstance(value, torch.Tensor) and value.dim() > 0 and value.shape[0] == batch
        return value[start:stop] if is_by_row else value

    mask = part(call.attention_mask)
    return call._replace(
        query=part(call.query),
        key=part(call.key)[:, :, padding:],
        value=part(call.value)[:, :, padding:],
        attention_mask=mask[..., padding:] if isinstance(mask, torch.Tensor) else mask,
        kwargs={name: part(value) for name, value in call.kwargs.items()},
    )


def joined_arguments(
    branch: Branch, pair: PairedCache, inputs: dict[str, Any], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Return the keyword arguments of a step of both branches."""
    batch, past = branch.active.shape[0], pair.own_length
    steps = past + 1 - branch.own_length
    joined = {}
    for name, value in inputs.items():
        is_by_row = isinstance(value, torch.Tensor) and value.dim() > 1 and value.shape[0] == batch
        joined[name] = torch.cat([value, value]) if is_by_row else value
    for name in TOKEN_TYPES:
        if joined.get(name) is not None:
            joined[name] = joined[name][:, -1:]
    joined["past_key_values"] = pair.cache
    joined.pop("cache_position", None)
    own_mask = inputs.get("attention_mask")
    masks = [own_mask, branch.mask(own_mask, steps)]
    joined["attention_mask"] = None
    if pair.padding != (0, 0) or any(mask is not None for mask in masks):
        lengths = (past + 1, branch.valid.shape[1] + steps)
        full = [
            branch.valid.new_ones(batch, length).long() if mask is None else mask.long()
            for mask, length in zip(masks, lengths, strict=True)
        ]
        joined["attention_mask"] = torch.cat(
            [F.pad(mask, (padding, 0)) for mask, padding in zip(full, pair.padding, strict=True)]
        )
    positions = _joined_positions(branch, pair, inputs.get("position_ids"), batch, past, steps)
    joined["position_ids"] = positions
    if positions is None:
        del joined["position_ids"]
    return {name: value for name, value in joined.items() if name in kwargs or value is not None}


def _joined_positions(
    branch: Branch, pair: PairedCache, own: torch.Tensor | None, batch: int, past: int, steps: int
) -> torch.Tensor | None:
    other = branch.positions(own, steps)
    if own is None and other is None and pair.padding == (0, 0):
        return None
    if own is None:
        own = torch.full((batch, 1), past, device=branch.valid.device)
    if other is None:
        other = own
    own, other = (each.expand(*each.shape[:-2], batch, -1)[..., -1:] for each in (own, other))
    dims = max((own, other), key=torch.Tensor.dim).shape[:-2]
    return torch.cat([each.expand(*dims, batch, 1) for each in (own, other)], dim=-2)


def logits_of(output: Any) -> torch.Tensor:
    """Return the logits ``[batch, tokens, vocab]``."""
    logits: torch.Tensor = output["logits"] if isinstance(output, dict) else output[0]
    return logits


def cache_of(output: Any, inputs: dict[str, Any]) -> Any:
    """Return the cache a forward has filled, if any."""
    parts: Sequence[Any] = tuple(output.values()) if isinstance(output, dict) else output
    return next((part for part in parts if hasattr(part, "get_seq_length")), inputs.get("past_key_values"))


def with_last_logits(forward: EditedForward, output: Any, result: torch.Tensor) -> Any:
    """Put fp32 ``[batch, vocab]`` in the place of the last token's logits; rounded only beside those of others."""
    logits = logits_of(output)
    if logits.shape[1] == 1:
        logits = result[:, None]
    else:
        logits = logits.clone()
        if forward.is_prefill and logits.shape[1] == forward.q_len:
            places = torch.arange(forward.q_len, device=logits.device)[None, :, None].expand(len(result), -1, 1)
            last = forward.at_last_position(places)[:, 0]
        else:
            last = torch.full_like(result[:, 0], logits.shape[1] - 1, dtype=torch.int64)
        logits[torch.arange(len(result), device=logits.device), last] = result.to(logits.dtype)
    if isinstance(output, dict):
        output["logits"] = logits
        return output
    return (logits, *output[1:])


def rows_of(output: Any, batch: int, replaced: dict[int, Any]) -> Any:
    """Return the first ``batch`` of twice as many rows; other objects replaced by their ``id``."""

    def part(value: Any) -> Any:
        is_by_row = isinstance(value, torch.Tensor) and value.dim() > 1 and value.shape[0] == 2 * batch
        return value[:batch] if is_by_row else replaced.get(id(value), value)

    if isinstance(output, dict):
        return type(output)(**{name: part(value) for name, value in output.items()})
    return tuple(part(value) for value in output)
