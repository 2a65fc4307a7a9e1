"""Running column means of attention: how much each key gets from the rows that may see it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from vlmfix.errors import UnsupportedFeatureError
from vlmfix.run import Layer


@dataclass(frozen=True)
class ColumnMeans:
    """Column sums of one layer's attention weights.

    Rows of the last forward behind ``length`` are kept apart until the next one: a draft may be cropped away.

    Attributes:
        sums: fp32 ``[batch, num_heads, keys]``, over the rows of the first ``length`` tokens.
        counts: fp32 ``[batch, keys]``: how many of those rows may see the key.
        tokens: fp32 ``[batch]``: how many of those tokens are no padding.
        length: How many tokens are summed up: int, or a 0-d tensor with a static cache while decoding.
        offset: Position of the first key; a sliding cache drops early ones.
        rows: Weights of the rows behind, fp32 ``[batch, num_heads, n, keys]``.
        seen: Which keys they may see, bool ``[batch, n, keys]``.
        frozen: Whether rows of generated tokens are left out.
        is_cropped: Whether the cache was cropped into a prompt; the sums are lost then.
    """

    sums: torch.Tensor
    counts: torch.Tensor
    tokens: torch.Tensor
    length: int | torch.Tensor
    offset: int | torch.Tensor
    rows: torch.Tensor
    seen: torch.Tensor
    frozen: bool = False
    is_cropped: bool = False

    @classmethod
    def extended(
        cls, known: ColumnMeans | None, attn_weights: torch.Tensor, allowed: torch.Tensor, layer: Layer, *, frozen: bool
    ) -> ColumnMeans:
        """Add the rows a method observes, see ``Method.observe``."""
        run, (start, stop) = layer.run, layer.rows
        num_keys = attn_weights.shape[-1]
        offset = run.key_offset(layer.site, num_keys)
        seen = allowed.any(1).expand(attn_weights.shape[0], stop - start, num_keys)
        if layer.row_mask is not None:
            mask = layer.row_mask.to(seen.device)
            seen = seen & mask[..., None]
            attn_weights = attn_weights * mask[:, None, :, None]
        else:
            mask = seen.new_ones(seen.shape[:2])
        if known is None:
            # Turns before the first image are left alone, and count for nothing.
            known = replace(cls._empty(attn_weights, seen, offset, frozen), length=run.past)
        if known.is_cropped:
            raise UnsupportedFeatureError(
                "The cache was cropped into a prompt, whose column sums cannot be split (act). Start with an empty "
                "cache."
            )
        if start == 0:
            known = known._settled(run.past)
        known = known._aligned(offset, num_keys)
        prompt = max(min(run.prompt_len - start, stop - start), 0) if run.is_prefill else 0
        if prompt:
            known = replace(
                known,
                sums=known.sums + attn_weights[:, :, :prompt].sum(2),
                counts=known.counts + seen[:, :prompt].sum(1),
                tokens=known.tokens + mask[:, :prompt].sum(1),
                length=run.past + start + prompt,
            )
        if prompt == stop - start:
            return known
        return replace(
            known,
            rows=torch.cat([known.rows, attn_weights[:, :, prompt:]], dim=2),
            seen=torch.cat([known.seen, seen[:, prompt:]], dim=1),
        )

    def at_rows(self, layer: Layer, num_keys: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the sums, counts and number of tokens as they are at the rows in hand.

        Returns:
            fp32 ``[batch, num_heads, rows or 1, keys]``, ``[batch, rows or 1, keys]``, ``[batch, rows or 1]``. In a
            prompt, all its rows share the same.
        """
        run, (start, stop) = layer.run, layer.rows
        sums, counts, tokens = self.sums[:, :, None], self.counts[:, None], self.tokens[:, None]
        if self.frozen or (run.is_prefill and stop <= run.prompt_len):
            return sums, counts, tokens
        running = (
            sums + self.rows.cumsum(2),
            counts + self.seen.cumsum(1),
            tokens + torch.arange(1, self.rows.shape[2] + 1, device=tokens.device),
        )
        prompt = max(run.prompt_len - start, 0) if run.is_prefill else 0
        first = max(start - run.prompt_len, 0) if run.is_prefill else start
        parts = zip((sums, counts, tokens), running, (2, 1, 1), strict=True)
        found = []
        for known, after, dim in parts:
            after = after.narrow(dim, first, stop - start - prompt)
            before = known.expand(*known.shape[:dim], prompt, *known.shape[dim + 1 :])
            found.append(torch.cat([before, after], dim=dim))
        return found[0], found[1], found[2]

    def reordered(self, beams: torch.Tensor) -> ColumnMeans:
        """Return the means with batch row ``i`` taken from row ``beams[i]``."""
        tensors = {name: getattr(self, name) for name in ("sums", "counts", "tokens", "rows", "seen")}
        return replace(self, **{name: each.index_select(0, beams.to(each.device)) for name, each in tensors.items()})

    def cropped_into_prompt(self) -> ColumnMeans:
        """Return the means of a cache that lost part of its prompt: of no use any more."""
        return replace(self, is_cropped=True)

    @classmethod
    def _empty(
        cls, attn_weights: torch.Tensor, seen: torch.Tensor, offset: int | torch.Tensor, frozen: bool
    ) -> ColumnMeans:
        counts = attn_weights.new_zeros(seen.shape[0], seen.shape[2])
        return cls(
            sums=torch.zeros_like(attn_weights[:, :, 0]),
            counts=counts,
            tokens=counts[:, 0].clone(),
            length=0,
            offset=offset,
            rows=attn_weights[:, :, :0],
            seen=seen[:, :0],
            frozen=frozen,
        )

    def _settled(self, past: int | torch.Tensor) -> ColumnMeans:
        """Sum up the rows that stayed in the cache, now of ``past`` tokens."""
        waiting = self.rows.shape[2]
        accepted = waiting  # a static cache is never cropped
        if isinstance(past, int) and isinstance(self.length, int):
            accepted = min(past - self.length, waiting)
            if accepted < 0 or past > self.length + waiting:
                raise UnsupportedFeatureError(
                    f"The cache holds {past} tokens, but attention was summed up over {self.length} to "
                    f"{self.length + waiting} of them (act). Only the tokens of the last forward can be cropped."
                )
        added = 0 if self.frozen else accepted
        return replace(
            self,
            sums=self.sums + self.rows[:, :, :added].sum(2),
            counts=self.counts + self.seen[:, :added].sum(1),
            tokens=self.tokens + added,
            length=past,
            rows=self.rows[:, :, :0],
            seen=self.seen[:, :0],
        )

    def _aligned(self, offset: int | torch.Tensor, num_keys: int) -> ColumnMeans:
        """Follow the keys: later ones are new, a sliding window drops early ones."""
        shift = offset - self.offset
        return replace(
            self,
            sums=_shift(self.sums, shift, num_keys),
            counts=_shift(self.counts, shift, num_keys),
            rows=_shift(self.rows, shift, num_keys),
            seen=_shift(self.seen, shift, num_keys),
            offset=offset,
        )


def _shift(per_key: torch.Tensor, shift: int | torch.Tensor, num_keys: int) -> torch.Tensor:
    """Drop the first ``shift`` of the last dimension and fill up with zeros to ``num_keys``."""
    if isinstance(shift, int):
        kept = per_key[..., shift : shift + num_keys]
        return F.pad(kept, (0, num_keys - kept.shape[-1])) if kept.shape[-1] < num_keys else kept
    padded = F.pad(per_key, (0, max(num_keys + 1 - per_key.shape[-1], 1)))
    positions = torch.arange(num_keys, device=per_key.device) + shift.to(per_key.device)
    return padded[..., positions.clamp_max(padded.shape[-1] - 1)]
