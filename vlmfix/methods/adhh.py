"""AD-HH: Adaptive Deactivation of Hallucination Heads (Yang, Li, Cao and Xu, ICLR 2025)."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from vlmfix.errors import MethodError
from vlmfix.methods.base import Method
from vlmfix.methods.measured import HALLUCINATION_HEADS, shape_of
from vlmfix.methods.scores import scale_heads
from vlmfix.methods.selection import HeadSpec, Range, Space, bind_heads, heads_of, listed_heads
from vlmfix.methods.views import Layer, PromptRows
from vlmfix.model.anatomy import Anatomy


@dataclass(frozen=True)
class ADHH(Method):
    """Let hallucination heads that lean on the text see only what stands up to the image's end.

    T is the text behind the first image token: question, role tokens, generated tokens and the current one; neither
    image tokens nor padding. In the row that predicts the next token, each listed head with ``sum_{j in T} w_j >= tau``
    gets ``w_j <- 0`` for j in T. The rest of the row stays as it is, so that the row's sum falls to 1 - share. Text
    before the image, a question too, is never in T. Decided per sample, head and step.

    Attributes:
        tau: Share of the text that deactivates a head, >= 0; the released .4 for LLaVA-1.5 (.5 for MiniGPT-4). Above 1
            the method is switched off.
        heads: (layer, head) pairs. ``None``: the published list of LLaVA-1.5-7B, LLaVA-1.5-13B or LLaVA-1.6-34B, which
            are recognised by the shape of their config; other models need a list of their own (``vlmfix.calibrate``).
        renormalize: Scale what is left of a row back to a sum of 1 (ours; the release does not).
        mode: ``"adaptive"`` is the method. ``"always"`` sets the listed heads' outputs to 0 in all rows of prompts with
            an image, without a threshold, as the release does for newer models.
        layers: Default: those of ``heads``.
    """

    name: ClassVar[str] = "adhh"
    paper: ClassVar[str] = (
        "ICLR 2025, Understanding and Mitigating Hallucination in LVLMs via Modular Attribution and Intervention"
    )
    summary: ClassVar[str] = "deactivates listed heads in rows where they lean on the text behind the image"
    search_space: ClassVar[Space] = {"tau": Range(0.1, 1.0)}
    edits_weights: ClassVar[bool] = True
    edits_heads: ClassVar[bool] = True

    tau: float = 0.4
    heads: HeadSpec = None
    renormalize: bool = False
    mode: Literal["adaptive", "always"] = "adaptive"

    def validate(self) -> None:
        """Raise ``MethodError`` for a parameter out of range."""
        self.require(0 <= self.tau < math.inf, "tau", "a finite number >= 0 (above 1 switches the method off)")
        self.require(self.mode in ("adaptive", "always"), "mode", "adaptive or always")
        self.require(not self.renormalize or self.mode == "adaptive", "renormalize", "false with mode='always'")

    @property
    def is_identity(self) -> bool:
        """Whether no head is listed, or none can reach ``tau``."""
        return self.heads == () or (self.mode == "adaptive" and self.tau > 1)

    @property
    def prompt_rows(self) -> PromptRows:
        """The last; ``mode="always"`` edits no weights."""
        return "last" if self.mode == "adaptive" else "none"

    def bind(self, anatomy: Anatomy) -> ADHH:
        """Resolve the heads and the layers that have some.

        Raises:
            MethodError: No list is known for the model.
        """
        bound = super().bind(anatomy)
        if self.is_identity:
            return bound
        if self.heads is None:
            known = HALLUCINATION_HEADS.get(shape_of(anatomy))
            if known is None:
                raise MethodError(
                    "adhh needs a list of heads, and none is published for this model (only for "
                    f"{', '.join(name for name, _ in HALLUCINATION_HEADS.values())}). Find one with "
                    "vlmfix.calibrate(model, 'adhh', data), or pass heads=[(layer, head), ...]."
                )
            bound = dataclasses.replace(bound, heads=known[1])
        return bind_heads(self, bound, bound.heads, anatomy)

    def heads_in(self, layer_idx: int) -> tuple[int, ...] | None:
        """Those of the list, if there is one."""
        return None if self.heads is None else heads_of(self.heads, layer_idx)

    def notes(self, anatomy: Anatomy) -> tuple[str, ...]:
        """Say whose list is in use."""
        known = HALLUCINATION_HEADS.get(shape_of(anatomy))
        if known is None or self.heads != known[1]:
            return ()
        return (f"adhh: heads published for {known[0]}; the model was recognised by its shape only",)

    def acts_at(self, layer: Layer) -> bool:
        """Whether weights are edited at all."""
        return self.mode == "adaptive"

    def edit_weights(self, attn_weights: torch.Tensor, layer: Layer) -> tuple[torch.Tensor, torch.Tensor]:
        """Zero the text of ``[batch, num_heads, rows, keys]`` where a listed head leans on it."""
        heads = layer.constant(lambda: listed_heads(self.heads, layer, attn_weights))
        text = (layer.keys("behind", attn_weights) | layer.keys("generated", attn_weights))[:, None, None]
        share = (attn_weights * text).sum(-1)
        edited = (share >= self.tau) & heads[:, None]
        zeroed = attn_weights.masked_fill(text & edited[..., None], 0.0)
        if self.renormalize:
            kept = zeroed.sum(-1, keepdim=True).clamp_min(torch.finfo(zeroed.dtype).tiny)
            zeroed = torch.where(edited[..., None], zeroed / kept, zeroed)
        return zeroed, edited

    def edit_heads(self, head_outputs: torch.Tensor, layer: Layer) -> torch.Tensor:
        """Set the listed heads of ``[batch, q_len, num_heads, head_dim]`` to 0, in ``mode="always"``."""
        if self.mode == "adaptive":
            return head_outputs
        heads = layer.constant(lambda: listed_heads(self.heads, layer, head_outputs.transpose(1, 2)))
        return scale_heads(head_outputs, (~heads).float(), layer)
