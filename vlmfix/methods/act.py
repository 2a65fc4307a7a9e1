"""ACT: Attention Calibration Technique (Yu et al., ICML 2024, arXiv 2406.15765)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F

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
    no ``min_rows``, takes an absolute threshold, edits the first sample of a batch alone, and divides by 0 where a row
    has all its weight on sinks; such rows are left alone here. Its file for Mistral edits the last layer too. The paper
    is about text models; here prompts without an image are left alone unless ``without_image``.
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

    without_image: bool = parameter(
        False, help="Calibrate prompts without an image too, which is what the paper is about."
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
    def acts_without_image(self) -> bool:
        """As chosen."""
        return self.without_image and not self.is_identity

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
        known: ColumnMeans | None = layer.learned
        if known is not None and known.is_cropped:
            raise UnsupportedFeatureError(
                "The cache was cropped into a prompt, whose column sums cannot be split (act). Start with an empty "
                "cache."
            )
        before = None if known is None else known.seen
        is_frozen = self.sinks == "frozen"
        rows, seen = layer.per_mask(
            "seen", lambda: Seen.extended(before, attn_weights, allowed, layer, is_frozen), before
        )
        sums = RunningSum.before(attn_weights) if known is None else known.sums
        layer.learned = ColumnMeans(sums.extended(rows, attn_weights), seen)

    def crop(self, learned: ColumnMeans, length: int) -> ColumnMeans:
        """Refuse: the rows of a prompt are summed up and cannot be told apart again."""
        return learned._replace(is_cropped=True)

    def edit_weights(self, attn_weights: torch.Tensor, layer: Layer) -> EditedRows:
        """Calibrate the rows of ``[batch, num_heads, rows, keys]``."""
        heads = layer.constant(lambda: self._chosen(layer, attn_weights))
        is_sink = self.find_sinks(layer.learned, layer)[..., : attn_weights.shape[-1]]
        if heads is not None:
            is_sink = is_sink & heads[:, None, None]
        image = layer.keys("image", attn_weights)[:, None, None] if self.recipients == "image" else None
        # What sinks and recipients hold. Rows of a prompt share their sinks and are summed up by one product.
        if layer.forward.is_prefill and is_sink.shape[2] == 1:
            recipients = ~is_sink if image is None else ~is_sink & image
            groups = torch.stack([is_sink, recipients], dim=-1).squeeze(2).to(attn_weights.dtype)
            sink_mass, rest = (attn_weights @ groups)[..., None].unbind(-2)
        else:
            held = attn_weights * is_sink
            others = attn_weights - held if image is None else (attn_weights - held) * image
            sink_mass, rest = held.sum(-1, keepdim=True), others.sum(-1, keepdim=True)
        # Sinks keep beta of their weight; recipients take the rest in proportion to what they have.
        gain = sink_mass / F.threshold(rest, 1e-6, torch.inf)
        edited = gain > 0
        change = (gain if image is None else gain * image).masked_fill(is_sink & edited, -1.0)
        if layer.forward.is_prefill and not attn_weights.requires_grad:
            return attn_weights.addcmul_(attn_weights, change, value=1 - self.beta), edited[..., 0]
        return attn_weights.addcmul(attn_weights, change, value=1 - self.beta), edited[..., 0]

    def _chosen(self, layer: Layer, attn_weights: torch.Tensor) -> torch.Tensor | None:
        """Return which heads in hand are to be calibrated, bool ``[num_heads]``, or ``None`` for all."""
        if self.heads is None or layer.heads == self.heads_in(layer.site.layer_idx):
            return None
        return listed_heads(self.heads, layer, attn_weights)

    def find_sinks(self, means: ColumnMeans, layer: Layer) -> torch.Tensor:
        """Return what is a sink to each row, never the first token: bool ``[batch, num_heads, rows or 1, keys]``.

        Its keys are all of the cache, of which a static one may have more than were read.
        """
        least = layer.per_mask("least", lambda: self._least(means.seen, layer), means.seen)
        is_sink: torch.Tensor = means.sums.at_rows(layer) > least
        return is_sink

    def _least(self, seen: Seen, layer: Layer) -> torch.Tensor:
        """Return the sum above which a key is a sink, infinite where none is: fp32 ``[batch, 1, rows or 1, keys]``."""
        counts, tokens = seen.counts.at_rows(layer), seen.tokens.at_rows(layer)
        # mean > alpha / N, or mean > threshold, without a division by the number of rows
        assert self._threshold is not None
        limit, is_relative = self._threshold
        least = counts * (limit / tokens) if is_relative else counts * limit
        return least.masked_fill((counts < self.min_rows) | layer.keys("first", counts)[:, None, None], torch.inf)


class NewRows(NamedTuple):
    """Rows that are added to running sums.

    Attributes:
        is_first: Whether they are the first of their forward.
        accepted: How many rows of the forward before have stayed in the cache.
        shift: By how many keys the first one has moved on; a sliding cache drops early ones.
        num_keys: How many keys the cache has now.
        prompt: How many of the rows are a prompt's.
        stop: How many of them are summed up at all.
        mask: Which rows count, fp32 ``[batch, 1, rows]``; ``None`` for all.
        stays: Whether none of them can be taken back, as in a static cache.
    """

    is_first: bool
    accepted: int
    shift: int | torch.Tensor
    num_keys: int
    prompt: int
    stop: int
    mask: torch.Tensor | None
    stays: bool


class RunningSum(NamedTuple):
    """A sum over the rows of a sequence, by head and key.

    Attributes:
        sums: fp32 ``[batch, heads, keys]``.
        rows: The generated rows of the last forward, fp32 ``[batch, heads, n, keys]``. They are kept apart until the
            next one: a draft may be cropped away. In a static cache one token is not, so that compiled code finds the
            same shapes at every step.
        total: The sum with these rows.
    """

    sums: torch.Tensor
    rows: torch.Tensor
    total: torch.Tensor

    @classmethod
    def before(cls, new: torch.Tensor) -> RunningSum:
        """Return the sum before the rows ``[batch, heads, rows, keys]``: none."""
        return cls.of(torch.zeros_like(new[:, :, 0]))

    @classmethod
    def of(cls, sums: torch.Tensor) -> RunningSum:
        """Return a sum none of whose rows can be taken back."""
        return cls(sums, sums[:, :, None][:, :, :0], sums)

    def extended(self, rows: NewRows, new: torch.Tensor) -> RunningSum:
        """Add rows ``[batch, heads, rows, keys]``; generated ones must not be changed any more."""
        sums, waiting = self.sums, self.rows.shape[2]
        if rows.is_first and rows.accepted:
            sums = self.total if rows.accepted == waiting else sums + self.rows[:, :, : rows.accepted].sum(2)
        sums = take_keys(sums, rows.shift, rows.num_keys)
        if rows.prompt:
            assert rows.mask is not None
            # A product, so that no row is written out again.
            of_prompt = (rows.mask[:, None, :, : rows.prompt] @ new[:, :, : rows.prompt]).squeeze(2)
            sums = sums + take_keys(of_prompt, 0, rows.num_keys)
        generated = take_keys(new.narrow(2, rows.prompt, rows.stop - rows.prompt), 0, rows.num_keys)
        if rows.mask is not None:
            generated = generated * rows.mask[:, :, rows.prompt : rows.stop, None]
        if waiting and not rows.is_first:
            generated = torch.cat([self.rows, generated], dim=2)
        number = generated.shape[2]
        total = sums + (generated.squeeze(2) if number == 1 else generated.sum(2)) if number else sums
        return RunningSum.of(total) if number <= int(rows.stays) else RunningSum(sums, generated, total)

    def at_rows(self, layer: Layer) -> torch.Tensor:
        """Return the sum as it is at the rows in hand; rows of a prompt share it.

        Returns:
            fp32 ``[batch, heads, rows or 1, keys]``.
        """
        forward, (start, stop) = layer.forward, layer.rows
        number = self.rows.shape[2]
        if not number or (forward.is_prefill and stop <= forward.prompt_len):
            return self.sums.unsqueeze(2)
        if number == 1 and not forward.is_prefill:
            return self.total.unsqueeze(2)
        prompt = max(forward.prompt_len - start, 0) if forward.is_prefill else 0
        first = max(start - forward.prompt_len, 0) if forward.is_prefill else start
        before = self.sums[:, :, None]
        # Generated (or drafted) rows see what was summed up before them, themselves included.
        after = (before + self.rows.cumsum(2)).narrow(2, first, stop - start - prompt)
        return torch.cat([before.expand(-1, -1, prompt, -1), after], dim=2)


class Seen(NamedTuple):
    """How often keys were seen: the same in all layers with one mask.

    Attributes:
        counts: How many rows may see each key, ``[batch, 1, keys]``.
        tokens: How many rows there are, ``[batch, 1, 1]``; none of them is padding.
        length: How many tokens are summed up; ``None`` once a static cache, which is never cropped, holds answers.
        offset: Position of the first key.
    """

    counts: RunningSum
    tokens: RunningSum
    length: int | None
    offset: int | torch.Tensor

    @classmethod
    def extended(
        cls, known: Seen | None, attn_weights: torch.Tensor, allowed: torch.Tensor, layer: Layer, is_frozen: bool
    ) -> tuple[NewRows, Seen]:
        """Add the rows that a method observes, see ``Method.observe``.

        Args:
            known: The rows before them.
            attn_weights: The weights that are observed.
            allowed: The keys that each row sees.
            layer: The layer.
            is_frozen: Whether rows of generated tokens are left out.
        """
        forward, start, (batch, _, num_rows, num_keys) = layer.forward, layer.rows[0], attn_weights.shape
        visible = allowed.any(1, keepdim=True).expand(batch, 1, num_rows, num_keys).to(attn_weights.dtype)
        every = visible.new_ones(batch, 1, num_rows, 1)
        offset, past = layer.key_offset(num_keys), forward.past
        length = None if isinstance(past, torch.Tensor) else past
        if known is None:  # turns before the first image are left alone, and count for nothing
            known = cls(RunningSum.before(visible), RunningSum.before(every), length, offset)
        prompt = max(min(forward.prompt_len - start, num_rows), 0) if forward.is_prefill else 0
        rows = NewRows(
            is_first=start == 0,
            accepted=known._accepted(past) if start == 0 and not is_frozen else 0,
            shift=offset - known.offset,
            num_keys=layer.call.key.shape[2],
            prompt=prompt,
            stop=prompt if is_frozen else num_rows,
            mask=None if layer.row_mask is None else layer.row_mask.to(visible)[:, None],
            stays=length is None,
        )
        counts = known.counts.extended(rows, visible)
        tokens = known.tokens.extended(rows._replace(shift=0, num_keys=1), every)
        if length is not None:
            length = length + start + prompt if prompt or start == 0 else known.length
        return rows, cls(counts, tokens, length, offset)

    def _accepted(self, past: int | torch.Tensor) -> int:
        """Return how many rows behind ``length`` stayed in the cache, now of ``past`` tokens."""
        waiting = self.counts.rows.shape[2]
        if isinstance(past, torch.Tensor) or self.length is None:
            return waiting
        accepted = min(past - self.length, waiting)
        if accepted < 0 or past > self.length + waiting:
            raise UnsupportedFeatureError(
                f"The cache holds {past} tokens, but attention was summed up over {self.length} to "
                f"{self.length + waiting} of them (act). Only the tokens of the last forward can be cropped."
            )
        return accepted


class ColumnMeans(NamedTuple):
    """Column sums of one layer's attention weights.

    Attributes:
        sums: The weights, by head and key.
        seen: What they are to be divided by.
        is_cropped: Whether the cache was cropped into a prompt; the sums are lost then.
    """

    sums: RunningSum
    seen: Seen
    is_cropped: bool = False
