"""ACT: Attention Calibration Technique (Yu et al., ICML 2024, arXiv 2406.15765)."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Literal

import torch

from vlmfix.errors import UnsupportedFeatureError
from vlmfix.methods.base import Method
from vlmfix.methods.parameters import Range, parameter
from vlmfix.methods.scores import take_keys
from vlmfix.methods.selection import HeadSpec, all_but, listed_heads
from vlmfix.methods.views import EditedRows, Layer
from vlmfix.model.anatomy import Anatomy, AttentionKind

_THRESHOLDS = "a number >= 0 or a text such as '5/N'"


@dataclass(frozen=True)
class ACT(Method):
    """Shrink attention sinks other than the first token, in selected heads, and share out what they held.

    A key's sink score is the mean weight it gets from the rows that may see it. Keys above ``sink_threshold`` are
    sinks, the first token excepted. In every row, sinks keep ``beta`` of their weight, and the rest goes to the
    recipients in proportion to what they have. Row sums stay 1. While decoding, the means go on as running sums, so
    that a row has the sinks it would have in a recomputation.

    Where this differs from the released code: its decode step multiplies row sums (up to 1.37), which is not followed.
    It spares the first element of its list of sinks, which is not the first token where that token is no sink. It has
    no ``min_rows``. The paper is about text models; prompts without an image are left alone here.
    """

    name = "act"
    paper = "arXiv 2406.15765"
    summary = "shrinks attention sinks behind the first token, in selected heads"
    edits_weights = True
    reorders = True  # sums of generated rows differ between the beams of a prompt
    needs_past = True
    needs_text_keys = False
    observed_rows = "all"  # a key's mean is over every row that sees it,
    needs_whole_prompt = True  # later ones too
    default_layers = all_but("all but the first two and the last, or those of ``heads``", first=2, last=1)

    beta: float = parameter(0.4, low=0, high=1, off=1, search=Range(0.1, 0.9), help="What sinks keep.")
    sink_threshold: str | float = parameter(
        "5/N",
        low=0,
        expected=_THRESHOLDS,
        help='``"alpha/N"`` with N the number of tokens (5/N in the paper), or an absolute weight (the released code '
        "uses 0.1 and 0.15).",
    )
    heads: HeadSpec = parameter(
        None,
        off=(),
        help="(layer, head) pairs to calibrate. The paper searches them offline (``vlmfix.calibrate``). ``None`` "
        "calibrates every head of the layers, which the paper advises against.",
    )
    rows: Literal["all", "text", "last"] = parameter(
        "all", help='Rows of a prompt to edit: ``"all"`` as released, ``"text"`` behind the image, or the ``"last"``.'
    )
    recipients: Literal["all", "image"] = parameter(
        "all", help='``"all"`` other keys, or only ``"image"`` tokens (a variant of ours).'
    )
    sinks: Literal["running", "frozen"] = parameter(
        "running", help='While decoding, ``"running"`` means, or ``"frozen"`` those of the prompt.'
    )
    min_rows: int = parameter(
        8,
        low=1,
        help="Keys seen by fewer rows are no sinks, because their mean says little: in a prompt, none of its last 7 "
        "tokens is. The limit is ours. 1 is the paper and the released code, where the last token's attention to "
        "itself counts as a mean.",
    )

    def validate(self) -> None:
        """Check that a threshold given as a text can be read."""
        self.require(isinstance(self._threshold, tuple), "sink_threshold", _THRESHOLDS)

    @property
    def _threshold(self) -> tuple[float, bool] | None:
        """The threshold's number, and whether it is divided by the number of tokens."""
        if not isinstance(self.sink_threshold, str):
            return float(self.sink_threshold), False
        match = re.fullmatch(r"\s*(\d*\.?\d+)\s*/\s*[nN]\s*", self.sink_threshold)
        return (float(match.group(1)), True) if match else None

    @property
    def attention_kinds(self) -> tuple[AttentionKind, ...]:
        """Self-attention, over text alone too: sinks are not the image's. Its tokens may be the recipients."""
        return ("joint",) if self.recipients == "image" else ("joint", "text", "answer")

    def notes(self, anatomy: Anatomy) -> tuple[str, ...]:
        """Say when heads were not searched."""
        if self.heads is None and not self.is_identity:
            return ("act: every head is calibrated; the paper selects heads (vlmfix.calibrate(model, 'act', data))",)
        return ()

    def observe(self, attn_weights: torch.Tensor, allowed: torch.Tensor, layer: Layer) -> None:
        """Add rows to the running column sums."""
        means: ColumnMeans | None = layer.learned
        layer.learned = ColumnMeans.extended(means, attn_weights, allowed, layer, frozen=self.sinks == "frozen")

    def crop(self, learned: ColumnMeans, length: int) -> ColumnMeans:
        """Refuse: the rows of a prompt are summed up and cannot be told apart again."""
        return replace(learned, is_cropped=True)

    def edit_weights(self, attn_weights: torch.Tensor, layer: Layer) -> EditedRows:
        """Calibrate the rows of ``[batch, num_heads, rows, keys]``."""
        heads = layer.constant(lambda: self._chosen(layer, attn_weights))
        is_sink = self.find_sinks(layer.learned, layer)
        if heads is not None:
            is_sink = is_sink & heads[:, None, None]
        recipients = ~is_sink
        if self.recipients == "image":
            recipients = recipients & layer.keys("image", attn_weights)[:, None, None]
        groups = torch.stack([is_sink, recipients], dim=-1).to(attn_weights.dtype)
        # What sinks and recipients hold. Rows that share their sinks are summed up, and scaled, by one product.
        rows = attn_weights if groups.shape[2] == 1 else attn_weights[..., None, :]
        sink_mass, rest = (rows @ groups.squeeze(2)).unbind(-1)
        if groups.shape[2] > 1:
            sink_mass, rest = sink_mass[..., 0], rest[..., 0]
        # Sinks keep beta of their weight; recipients take the rest in proportion to what they have.
        edited = (sink_mass > 0) & (rest >= 1e-6)
        gain = (1 - self.beta) * sink_mass / rest.clamp_min(1e-6)
        change = torch.stack([torch.full_like(gain, self.beta - 1), gain], dim=-1) * edited[..., None]
        if groups.shape[2] == 1:
            by_key = change @ groups[:, :, 0].transpose(-1, -2)
        else:
            by_key = (groups @ change[..., None])[..., 0]
        if attn_weights.requires_grad:
            return attn_weights * (1 + by_key), edited
        return attn_weights.addcmul_(attn_weights, by_key), edited

    def _chosen(self, layer: Layer, attn_weights: torch.Tensor) -> torch.Tensor | None:
        """Return which heads in hand are to be calibrated, bool ``[num_heads]``, or ``None`` for all."""
        if self.heads is None or layer.heads == self.heads_in(layer.site.layer_idx):
            return None
        return listed_heads(self.heads, layer, attn_weights)

    def find_sinks(self, means: ColumnMeans, layer: Layer) -> torch.Tensor:
        """Return what is a sink to each row, never the first token: bool ``[batch, num_heads, rows or 1, keys]``."""
        sums, tokens = means.at_rows(layer)
        sums, counts = sums[:, :-1], sums[:, -1:]
        # mean > alpha / N, or mean > threshold, without a division by the number of rows
        assert self._threshold is not None
        limit, is_relative = self._threshold
        least = counts * (limit / tokens[:, None, :, None]) if is_relative else counts * limit
        can_be = layer.per_keys(lambda: ~layer.keys("first", counts)[:, None, None], counts) & (counts >= self.min_rows)
        result: torch.Tensor = (sums > least) & can_be
        return result


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
        forward, (start, stop) = layer.forward, layer.rows
        batch, num_heads, _, num_keys = attn_weights.shape
        offset = layer.key_offset(num_keys)
        seen = allowed.any(1, keepdim=True).expand(batch, 1, stop - start, num_keys)
        mask = None if layer.row_mask is None else layer.row_mask.to(seen.device)
        if known is None:
            # Turns before the first image are left alone, and count for nothing.
            known = cls(
                sums=attn_weights.new_zeros(batch, num_heads + 1, num_keys),
                tokens=attn_weights.new_zeros(batch),
                length=forward.past,
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
            known = known._settled(forward.past)
        known = known._aligned(offset, num_keys)
        prompt = max(min(forward.prompt_len - start, stop - start), 0) if forward.is_prefill else 0
        if prompt:
            assert mask is not None
            counted = mask[:, None, None, :prompt].float()  # a product, so that no row is written out again
            parts = [counted @ attn_weights[:, :, :prompt], counted @ seen[:, :, :prompt].float()]
            known = replace(
                known,
                sums=known.sums + torch.cat(parts, dim=1)[:, :, 0],
                tokens=known.tokens + mask[:, :prompt].sum(1),
                length=forward.past + start + prompt,
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
        forward, (start, stop) = layer.forward, layer.rows
        sums, tokens = self.sums[:, :, None], self.tokens[:, None]
        if self.frozen or (forward.is_prefill and stop <= forward.prompt_len):
            return sums, tokens
        if not forward.is_prefill and self.rows.shape[2] == 1:
            return sums + self.rows, tokens + 1
        prompt = max(forward.prompt_len - start, 0) if forward.is_prefill else 0
        first = max(start - forward.prompt_len, 0) if forward.is_prefill else start
        # Generated (or drafted) rows see what was summed up before them, themselves included.
        number = torch.arange(1, self.rows.shape[2] + 1, device=tokens.device)
        found = []
        for known, after, dim in ((sums, sums + self.rows.cumsum(2), 2), (tokens, tokens + number, 1)):
            before = known.expand(*known.shape[:dim], prompt, *known.shape[dim + 1 :])
            found.append(torch.cat([before, after.narrow(dim, first, stop - start - prompt)], dim=dim))
        return found[0], found[1]

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
        rows = take_keys(rows, shift, num_keys) if rows.shape[2] else rows.new_zeros((*rows.shape[:3], num_keys))
        return replace(self, sums=take_keys(self.sums, shift, num_keys), rows=rows, offset=offset)
