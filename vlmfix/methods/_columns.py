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
        sums: fp32 ``[batch, num_heads + 1, keys]``, over the rows of the first ``length`` tokens; in place of one more
            head, how many of those rows may see the key.
        tokens: fp32 ``[batch]``: how many of those tokens are no padding.
        length: How many tokens are summed up: int, or a 0-d tensor with a static cache while decoding.
        offset: Position of the first key; a sliding cache drops early ones.
        rows: Weights of the rows behind, and which keys they see (1 or 0), fp32 ``[batch, num_heads + 1, n, keys]``.
        frozen: Whether rows of generated tokens are left out.
        is_cropped: Whether the cache was cropped into a prompt; the sums are lost then.
    """

    sums: torch.Tensor
    tokens: torch.Tensor
    length: int | torch.Tensor
    offset: int | torch.Tensor
    rows: torch.Tensor
    frozen: bool = False
    is_cropped: bool = False

    @classmethod
    def extended(
        cls, known: ColumnMeans | None, attn_weights: torch.Tensor, allowed: torch.Tensor, layer: Layer, *, frozen: bool
    ) -> ColumnMeans:
        """Add the rows a method observes, see ``Method.observe``."""
        run, (start, stop) = layer.run, layer.rows
        batch, num_heads, _, num_keys = attn_weights.shape
        offset = run.key_offset(layer.site, num_keys)
        seen = allowed.any(1, keepdim=True).expand(batch, 1, stop - start, num_keys)
        mask = None if layer.row_mask is None else layer.row_mask.to(seen.device)
        if known is None:
            # Turns before the first image are left alone, and count for nothing.
            known = cls(
                sums=attn_weights.new_zeros(batch, num_heads + 1, num_keys),
                tokens=attn_weights.new_zeros(batch),
                length=run.past,
                offset=offset,
                rows=attn_weights.new_zeros(batch, num_heads + 1, 0, num_keys),
                frozen=frozen,
            )
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
            assert mask is not None
            counted = mask[:, None, None, :prompt].float()  # a product, so that no row is written out again
            parts = [counted @ attn_weights[:, :, :prompt], counted @ seen[:, :, :prompt].float()]
            known = replace(
                known,
                sums=known.sums + torch.cat(parts, dim=1)[:, :, 0],
                tokens=known.tokens + mask[:, :prompt].sum(1),
                length=run.past + start + prompt,
            )
        if prompt == stop - start:
            return known
        new = torch.cat([attn_weights[:, :, prompt:], seen[:, :, prompt:].to(attn_weights.dtype)], dim=1)
        if mask is not None:
            new = new * mask[:, None, prompt:, None]
        return replace(known, rows=torch.cat([known.rows, new], dim=2) if known.rows.shape[2] else new)

    def at_rows(self, layer: Layer) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the sums and the number of tokens as they are at the rows in hand.

        Returns:
            fp32 ``[batch, num_heads + 1, rows or 1, keys]``, ``[batch, rows or 1]``. In a prompt, all its rows share
            the same.
        """
        run, (start, stop) = layer.run, layer.rows
        sums, tokens = self.sums[:, :, None], self.tokens[:, None]
        if self.frozen or (run.is_prefill and stop <= run.prompt_len):
            return sums, tokens
        if not run.is_prefill and self.rows.shape[2] == 1:
            return sums + self.rows, tokens + 1
        prompt = max(run.prompt_len - start, 0) if run.is_prefill else 0
        first = max(start - run.prompt_len, 0) if run.is_prefill else start
        number = torch.arange(1, self.rows.shape[2] + 1, device=tokens.device)
        found = []
        for known, after, dim in ((sums, sums + self.rows.cumsum(2), 2), (tokens, tokens + number, 1)):
            before = known.expand(*known.shape[:dim], prompt, *known.shape[dim + 1 :])
            found.append(torch.cat([before, after.narrow(dim, first, stop - start - prompt)], dim=dim))
        return found[0], found[1]

    def reordered(self, beams: torch.Tensor) -> ColumnMeans:
        """Return the means with batch row ``i`` taken from row ``beams[i]``."""
        tensors = {name: getattr(self, name) for name in ("sums", "tokens", "rows")}
        return replace(self, **{name: each.index_select(0, beams.to(each.device)) for name, each in tensors.items()})

    def cropped_into_prompt(self) -> ColumnMeans:
        """Return the means of a cache that lost part of its prompt: of no use any more."""
        return replace(self, is_cropped=True)

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
        sums = self.sums
        if accepted and not self.frozen:
            sums = sums + (self.rows[:, :, 0] if accepted == 1 else self.rows[:, :, :accepted].sum(2))
        tokens = self.tokens + accepted if accepted else self.tokens
        return replace(self, sums=sums, tokens=tokens, length=past, rows=self.rows[:, :, :0])

    def _aligned(self, offset: int | torch.Tensor, num_keys: int) -> ColumnMeans:
        """Follow the keys: later ones are new, a sliding window drops early ones."""
        shift = offset - self.offset
        rows = self.rows
        rows = _shift(rows, shift, num_keys) if rows.shape[2] else rows.new_zeros((*rows.shape[:3], num_keys))
        return replace(self, sums=_shift(self.sums, shift, num_keys), rows=rows, offset=offset)


def _shift(per_key: torch.Tensor, shift: int | torch.Tensor, num_keys: int) -> torch.Tensor:
    """Drop the first ``shift`` of the last dimension and fill up with zeros to ``num_keys``."""
    if isinstance(shift, int):
        kept = per_key[..., shift : shift + num_keys]
        return F.pad(kept, (0, num_keys - kept.shape[-1])) if kept.shape[-1] < num_keys else kept
    padded = F.pad(per_key, (0, max(num_keys + 1 - per_key.shape[-1], 1)))
    positions = torch.arange(num_keys, device=per_key.device) + shift.to(per_key.device)
    return padded[..., positions.clamp_max(padded.shape[-1] - 1)]
