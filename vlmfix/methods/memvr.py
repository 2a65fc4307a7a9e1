"""MemVR: Memory-space Visual Retracing ("Look Twice Before You Answer", Zou et al., ICML 2025, arXiv 2410.03577)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F

from vlmfix.methods.base import Method
from vlmfix.methods.parameters import Range, parameter
from vlmfix.methods.selection import scaled_layers
from vlmfix.methods.views import Block

TOP = 10
"""How many of the likeliest tokens the entropy is over."""


@dataclass(frozen=True)
class MemVR(Method):
    """Where an early layer is unsure of the next token, let one MLP look at the image's tokens once more.

    What enters a layer is read by the final norm and the head. ``u`` is the entropy of the ten likeliest tokens among
    themselves, divided by ``ln 10``. The first of ``layers`` with ``u > threshold`` is edited, and no other one in that
    forward. With ``z_p`` the image's tokens as they enter the first layer, x what enters the layer's MLP and f what
    leaves it, ``a = sum_p (x . z_p) z_p`` and ``f <- (1 - ratio) f + ratio a mean|f| / mean|a|``, in fp32. In a prompt
    its last row decides for all of its rows, and the two means are over them. A generated token decides for itself.

    This is what the authors' code for LLaVA computes. It multiplies ``z`` by two scales, which cancel. Their code for
    Qwen-VL and GLM-4V puts a SiLU between the two products and reads layers without the final norm; that is not
    offered. Their scripts edit layers 11 to 16 (``layers="11:17"``). All of their code takes the entropy over a whole
    batch, and keeps the last image for prompts without one; here every prompt has its own, and those without one are
    left alone.
    """

    name = "memvr"
    paper = "arXiv 2410.03577"
    summary = "lets one MLP look at the image's tokens again, where an early layer is unsure of the next token"
    edits_blocks = ("embedding", "mlp")
    reads_mlp_input = True
    needs_whole_prompt = True  # its last row decides for all
    default_layers = scaled_layers(7, 16)

    ratio: float = parameter(
        0.12,
        low=0,
        high=1,
        off=0,
        search=Range(0.03, 0.4),
        help="Share of what the image adds. The released scripts' value for short answers; .31 for CHAIR.",
    )
    threshold: float = parameter(
        0.75,
        low=0,
        high=1,
        off=1,
        search=Range(0.5, 0.95),
        help="The entropy above which a layer is unsure, between 0 and 1. The released scripts' value.",
    )
    rows: Literal["all", "text"] = parameter(
        "all", help='Rows of a prompt to edit: ``"all"`` as released, or ``"text"`` behind the image.'
    )

    def crop(self, learned: Any, length: int) -> Any:
        """Keep the image tokens among the first ``length`` tokens."""
        return learned[:, :length]

    def edit_block(self, states: torch.Tensor, block: Block) -> torch.Tensor:
        """Edit ``[batch, rows, hidden_size]``; of the embedding, remember the image's tokens."""
        if block.kind == "embedding":
            block.shared = _image_tokens(states, block)
            return states
        first = block.forward.q_len - states.shape[1]
        num_prompt_rows = block.forward.prompt_len - first if block.forward.is_prefill else 0
        prompt_rows = block.forward.rows(self.prompt_rows).mask
        notes = block.scratch
        notes[block.layer_idx] = block.edited = self._is_unsure(block, num_prompt_rows)
        for layer, is_unsure in notes.items():
            if layer < block.layer_idx:  # only the first layer that is unsure
                block.edited = block.edited & ~is_unsure.to(states.device)
        stock, image = states.float(), block.shared.to(states.device)
        entered = block.input[:, first:].to(states.device).float()
        retraced = entered @ image.transpose(1, 2) @ image
        sizes = [_over_prompt(each.abs().mean(-1), num_prompt_rows, prompt_rows) for each in (stock, retraced)]
        scale = (sizes[0] / torch.where(sizes[1] > 0, sizes[1], 1.0))[..., None]  # no division by 0: gradients
        edited = torch.lerp(stock, retraced * scale, self.ratio)
        return torch.where(sizes[1][..., None] > 0, edited, stock)

    def _is_unsure(self, block: Block, num_prompt_rows: int) -> torch.Tensor:
        """Return in which rows the layer is unsure, bool ``[batch, rows]``: in all of a prompt's if in its last one."""
        logits = block.early_logits
        shares = logits.topk(min(TOP, logits.shape[-1])).values.softmax(-1)
        is_unsure: torch.Tensor = torch.special.entr(shares).sum(-1) / math.log(TOP) > self.threshold
        if not num_prompt_rows:
            return is_unsure
        rows = block.forward.rows("last")
        predicting = block.forward.prompt_len - rows.start
        last = is_unsure[:, :predicting]
        if rows.mask is not None:
            last = last & rows.mask.to(last.device)[:, :predicting]
        return torch.cat([last.any(1, keepdim=True).expand(-1, num_prompt_rows), is_unsure[:, predicting:]], dim=1)


def _image_tokens(states: torch.Tensor, block: Block) -> torch.Tensor:
    """Return the image's tokens at their places, fp32 ``[batch, tokens, hidden_size]``, with zeros in all others."""
    forward, known = block.forward, block.shared
    mask = forward.rows("image", decode=False).mask
    assert mask is not None and isinstance(forward.past, int)
    new = states.float() * mask.to(states.device)[..., None]
    if not forward.past:
        return new
    known = new[:, :0] if known is None else known[:, : forward.past].to(new.device)
    return torch.cat([F.pad(known, (0, 0, 0, forward.past - known.shape[1])), new], dim=1)


def _over_prompt(per_row: torch.Tensor, num_prompt_rows: int, counted: torch.Tensor | None) -> torch.Tensor:
    """Sum ``[batch, rows]`` up over the rows of a prompt that count; leave those of generated tokens as they are."""
    of_prompt = per_row[:, :num_prompt_rows]
    if counted is not None:
        of_prompt = of_prompt * counted.to(per_row.device)[:, :num_prompt_rows]
    total = of_prompt.sum(1, keepdim=True).expand(-1, num_prompt_rows)
    return torch.cat([total, per_row[:, num_prompt_rows:]], dim=1)
