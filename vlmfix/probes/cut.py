"""The method behind knockouts: rows that cannot see some keys."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F

from vlmfix.anatomy import AttentionKind
from vlmfix.methods.base import Method, PromptRows
from vlmfix.run import Layer


@dataclass(frozen=True)
class Cut(Method):
    """Hide some tokens from some rows, in prompts with an image and in their answers.

    Attributes:
        source: Bool ``[batch, tokens]``: the tokens to hide, by position in prompt and answer; none behind the end.
        target: Bool ``[batch, tokens]``: the rows to hide them from.
        rows: Rows of the prompt that may be targets: write out no more than these.
        keep_self: Whether a row goes on seeing itself.
    """

    name: ClassVar[str] = "knockout"
    edits_scores: ClassVar[bool] = True
    hides_keys: ClassVar[bool] = True
    needs_text_keys: ClassVar[bool] = False
    needs_past: ClassVar[bool] = True

    source: torch.Tensor = field(compare=False, repr=False)
    target: torch.Tensor = field(compare=False, repr=False)
    rows: PromptRows = field(default="all", compare=False)
    keep_self: bool = field(default=True, compare=False)

    @property
    def prompt_rows(self) -> PromptRows:
        """As chosen."""
        return self.rows

    @property
    def edits_decode(self) -> bool:
        """Whether targets lie in the answer; a mask of the prompt's length has none there."""
        return True

    @property
    def needs_whole_prompt(self) -> bool:
        """Tokens are told apart by their place in the prompt."""
        return True

    @property
    def attention_kinds(self) -> tuple[AttentionKind, ...]:
        """Where rows see image tokens among the text."""
        return ("joint",)

    def edit_scores(
        self, scores: torch.Tensor, allowed: torch.Tensor, layer: Layer
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Give cut pairs of ``[batch, num_heads, rows, keys]`` the lowest score there is."""
        num_keys, device = scores.shape[-1], scores.device
        source = layer.visible_keys(self.source.to(device), num_keys)
        source = F.pad(source, (0, num_keys - source.shape[1]))
        rows = torch.arange(*layer.rows, device=device) + layer.run.past
        length = self.target.shape[1]
        target = self.target.to(device)[:, rows.clamp_max(length - 1)] & (rows < length)
        cut = target[:, None, :, None] & source[:, None, None] & allowed
        if self.keep_self:
            keys = torch.arange(num_keys, device=device) + layer.run.key_offset(layer.site, num_keys)
            cut = cut & (keys != rows[:, None])
        cut = cut & (allowed & ~cut).any(-1, keepdim=True)  # no row loses all it sees
        cut = cut.expand(-1, scores.shape[1], -1, -1)
        return scores.masked_fill_(cut, torch.finfo(scores.dtype).min), cut.any(-1)
