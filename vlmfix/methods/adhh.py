"""AD-HH: Adaptive Deactivation of Hallucination Heads (Yang, Li, Cao and Xu, ICLR 2025)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

import torch

from vlmfix.errors import MethodError
from vlmfix.methods.base import Method
from vlmfix.methods.measured import HALLUCINATION_HEADS, shape_of
from vlmfix.methods.parameters import Range, parameter
from vlmfix.methods.scores import scale_heads
from vlmfix.methods.selection import DefaultLayers, HeadSpec, listed_heads
from vlmfix.methods.views import EditedRows, Layer, PromptRows
from vlmfix.model.anatomy import Anatomy


@dataclass(frozen=True)
class ADHH(Method):
    """Let hallucination heads that lean on the text see only what stands up to the image's end.

    Let T be the text behind the first image token: question, role tokens, generated tokens and the current one; neither
    image tokens nor padding. In the row that predicts the next token, each listed head with ``sum_{j in T} w_j >= tau``
    gets ``w_j <- 0`` for j in T. The rest of the row stays as it is, so that the row's sum falls to 1 - share. Text
    before the image is never in T, even if it is the question. Decided per sample, head and step, in fp32; the release
    sums the share over a batch, and takes the image's place from one template.

    ``vlmfix.calibrate`` finds the heads of other models. It labels mentions of objects where they stand in the text;
    the released search labels every occurrence of a word's first token. The release's list for MiniGPT-4, which
    transformers does not have, is left out.
    """

    name = "adhh"
    paper = "ICLR 2025, Understanding and Mitigating Hallucination in LVLMs via Modular Attribution and Intervention"
    summary = "deactivates listed heads in rows where they lean on the text behind the image"
    edits_weights = True
    edits_heads = True
    default_layers = DefaultLayers("those of ``heads``", lambda num_layers: tuple(range(num_layers)))

    tau: float = parameter(
        0.4,
        low=0,
        remark="above 1 switches the method off",
        search=Range(0.1, 1.0),
        help="Share of the text that deactivates a head; the released 0.4 for LLaVA-1.5 (0.5 for MiniGPT-4). Above 1 "
        "the method is switched off.",
    )
    heads: HeadSpec = parameter(
        None,
        help="(layer, head) pairs. ``None``: the published list of LLaVA-1.5-7B, LLaVA-1.5-13B or LLaVA-1.6-34B, which "
        "are recognised by the shape of their config; other models need a list of their own (``vlmfix.calibrate``).",
    )
    renormalize: bool = parameter(
        False, help="Scale what is left of a row back to a sum of 1 (ours; the release does not)."
    )
    mode: Literal["adaptive", "always"] = parameter(
        "adaptive",
        help='``"adaptive"`` is the method. ``"always"`` sets the listed heads\' outputs to 0 in all rows of prompts '
        "with an image, without a threshold, as the release does for newer models.",
    )

    def validate(self) -> None:
        """Refuse to renormalise weights where none are edited."""
        self.require(not self.renormalize or self.mode == "adaptive", "renormalize", "false with mode='always'")

    @property
    def is_identity(self) -> bool:
        """Whether no head is listed, or none can reach ``tau``."""
        return self.heads == () or (self.mode == "adaptive" and self.tau > 1)

    @property
    def prompt_rows(self) -> PromptRows:
        """The last; ``mode="always"`` edits no weights."""
        return "last" if self.mode == "adaptive" else "none"

    @property
    def minds_text_before_image(self) -> bool:
        """Whether heads are set to 0 in all rows."""
        return self.mode == "always"

    @property
    def only_heads(self) -> HeadSpec:
        """Those listed."""
        return None if self.is_identity else super().only_heads

    def bind(self, anatomy: Anatomy) -> ADHH:
        """Resolve the heads and the layers that have some.

        Raises:
            MethodError: No list is known for the model.
        """
        if self.is_identity or self.heads is not None:
            return super().bind(anatomy)
        known = HALLUCINATION_HEADS.get(shape_of(anatomy))
        if known is None:
            raise MethodError(
                "adhh needs a list of heads, and none is published for this model (only for "
                f"{', '.join(name for name, _ in HALLUCINATION_HEADS.values())}). Find one with "
                "vlmfix.calibrate(model, 'adhh', data), or pass heads=[(layer, head), ...]."
            )
        return dataclasses.replace(self, heads=known[1]).bind(anatomy)

    def notes(self, anatomy: Anatomy) -> tuple[str, ...]:
        """Say whose list is in use."""
        known = HALLUCINATION_HEADS.get(shape_of(anatomy))
        if known is None or self.heads != known[1]:
            return ()
        return (f"adhh: heads published for {known[0]}; the model was recognised by its shape only",)

    def acts_at(self, layer: Layer) -> bool:
        """Whether weights are edited at all."""
        return self.mode == "adaptive"

    def edit_weights(self, attn_weights: torch.Tensor, layer: Layer) -> EditedRows:
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

    def fixed_factors(self, num_heads: int) -> dict[tuple[int, int], float] | None:
        """0 for the listed heads, in ``mode="always"``."""
        if self.mode == "adaptive":
            return super().fixed_factors(num_heads)
        return {(layer, head): 0.0 for layer, head in self.heads or () if layer in self.layer_indices}

    def edit_heads(self, head_outputs: torch.Tensor, layer: Layer) -> torch.Tensor:
        """Set the listed heads of ``[batch, q_len, num_heads, head_dim]`` to 0, in ``mode="always"``."""
        if self.mode == "adaptive":
            return head_outputs
        heads = layer.constant(lambda: listed_heads(self.heads, layer, head_outputs.transpose(1, 2)))
        return scale_heads(head_outputs, (~heads).float(), layer)
