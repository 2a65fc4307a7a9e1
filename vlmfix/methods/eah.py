"""EAH / EVAS: Enhancing Vision Attention Sinks (Zhang, Quan et al., EMNLP 2025, arXiv 2411.09968)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch

from vlmfix.methods.base import Method
from vlmfix.methods.selection import Range, Space
from vlmfix.methods.views import Layer, PromptRows
from vlmfix.model.anatomy import Anatomy


class Columns(NamedTuple):
    """Column sums of one layer's weights in a prompt, the diagonal left out.

    Attributes:
        sums: fp32 ``[batch, num_heads, keys]``, over the prompt's rows that are no padding.
        counts: fp32 ``[batch, keys]``: N_j, how many of those rows come later than the key and may see it.
    """

    sums: torch.Tensor
    counts: torch.Tensor


@dataclass(frozen=True)
class EAH(Method):
    """Give every head of a shallow layer the attention map of the head with the most sinks in the image.

    For image token j, ``r_hj`` is the mean weight it gets from the rows behind it; j is a sink of head h if ``r_hj`` >
    ``threshold``. The head with the most sinks (the first, on ties) has its whole map, all rows and columns, copied to
    the other heads, which keep their own values. Without any sink, nothing is edited. Only prompts are edited; decode
    rows are left alone, so the method reaches the answer through the keys and values of later layers. Image rows change
    too.

    What the paper's tables were made with is not known: the released file edits layer 15 at 0.0008 (its preset:
    ``EAH(layers=[15], threshold=0.0008)``), while title and README speak of the second layer and 0.002; its N_j assumes
    a prompt of 647 tokens, here it is exact; and it drops a winning head 0, which is kept here. There is no strength.

    Attributes:
        threshold: In [0, 1]; no mean weight exceeds 1, which is the identity. 0.002 as in the README.
            Mean weights shrink with the length of the prompt: ``"auto"`` is 1.2 / T for T tokens (0.002 at 600; ours).
        layers: Default: the second layer.
    """

    name: ClassVar[str] = "eah"
    paper: ClassVar[str] = "arXiv 2411.09968"
    summary: ClassVar[str] = "copies the map of the head with the most image sinks to all heads of a shallow layer"
    search_space: ClassVar[Space] = {"threshold": Range(0.0005, 0.02, log=True)}
    edits_weights: ClassVar[bool] = True

    threshold: float | Literal["auto"] = 0.002

    def validate(self) -> None:
        """Raise ``MethodError`` for a parameter out of range."""
        value = self.threshold
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 1
        self.require(is_number or value == "auto", "threshold", "between 0 and 1 (1 switches the method off), or auto")

    @property
    def is_identity(self) -> bool:
        """Whether no mean weight can exceed ``threshold``."""
        return self.threshold == 1

    @property
    def prompt_rows(self) -> PromptRows:
        """All: the whole map is copied."""
        return "all"

    @property
    def observed_rows(self) -> PromptRows:
        """All: a column's mean is over every row behind it."""
        return "all"

    @property
    def edits_decode(self) -> bool:
        """Never."""
        return False

    @property
    def needs_whole_prompt(self) -> bool:
        """A column's mean is over rows that come later."""
        return True

    def default_layers(self, num_layers: int) -> tuple[int, ...]:
        """The second layer, or the only one."""
        return (min(1, num_layers - 1),)

    def notes(self, anatomy: Anatomy) -> tuple[str, ...]:
        """Say what is not known."""
        return () if self.is_identity else ("eah: the layer and threshold behind the paper's tables are not known",)

    def acts_at(self, layer: Layer) -> bool:
        """Only in prompts."""
        return layer.forward.is_prefill

    def observe(self, attn_weights: torch.Tensor, allowed: torch.Tensor, layer: Layer) -> None:
        """Add rows to the column sums."""
        forward, (start, stop), num_keys = layer.forward, layer.rows, attn_weights.shape[-1]
        assert layer.row_mask is not None
        rows = torch.arange(start, stop, device=attn_weights.device)
        counted = layer.row_mask.to(rows.device) & (rows < forward.prompt_len)  # a draft may follow the prompt
        keys = torch.arange(num_keys, device=rows.device) + layer.key_offset(num_keys)
        later = counted[..., None] & (keys < rows[:, None] + forward.past)  # [batch, rows, keys]
        sums = attn_weights.masked_fill(~later[:, None], 0.0).sum(2)
        counts = (later & allowed.any(1)).sum(1).float()
        if start > 0:
            sums, counts = sums + layer.learned.sums, counts + layer.learned.counts
        layer.learned = Columns(sums, counts)

    def edit_weights(self, attn_weights: torch.Tensor, layer: Layer) -> tuple[torch.Tensor, torch.Tensor]:
        """Copy the chosen head's rows of ``[batch, num_heads, rows, keys]``."""
        best, has_sink = self.choose_head(layer.learned, attn_weights, layer)
        batch, heads = (torch.arange(size, device=best.device) for size in attn_weights.shape[:2])
        edited = has_sink[:, None] & (heads != best[:, None])
        copied = torch.where(edited[..., None, None], attn_weights[batch, best][:, None], attn_weights)
        return copied, edited[..., None].expand(attn_weights.shape[:3])

    def choose_head(
        self, columns: Columns, attn_weights: torch.Tensor, layer: Layer
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return each sample's head with the most sinks, and whether it has any: int64 and bool ``[batch]``."""
        tokens = layer.forward.valid_mask.sum(1).to(attn_weights.device)
        threshold = 1.2 / tokens if isinstance(self.threshold, str) else columns.counts.new_tensor([self.threshold])
        limit = threshold[..., None] * columns.counts
        is_sink = (columns.sums > limit[:, None]) & layer.keys("image", attn_weights)[:, None]
        counts = is_sink.sum(-1)  # [batch, num_heads]
        most = counts.amax(1, keepdim=True)
        heads = torch.arange(counts.shape[1], device=counts.device)
        return torch.where(counts == most, heads, counts.shape[1]).amin(1), most[:, 0] > 0
