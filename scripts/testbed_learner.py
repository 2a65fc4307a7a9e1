"""The model in training (used by ``train_testbed.py``): temporary heads, losses, and a lean attention function."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from testbed_packing import ANSWER, ANSWER_END, BLIND, CAPTION, IMAGE_PREFIX, TEXT_PREFIX
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, LlavaForConditionalGeneration
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from vlmfix.evals.testbed.scenes import BACKGROUND
from vlmfix.evals.testbed.tiny import build_model

ECONOMY_TARGET = 0.25
"""Attention to the image, mean per layer, below which the economy penalty is zero."""


def lean_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """Attention as two matrix products: on CPU its backward is far faster than the fused kernel's.

    With ``module.economy`` it leaves the mean weight of image keys, over the rows behind the image that see it, in
    ``module.image_mass``.
    """
    scores = torch.matmul(query * scaling, key.transpose(2, 3)) + attention_mask
    weights = scores.softmax(-1)
    if getattr(module, "economy", False):
        first, last = len(TEXT_PREFIX), len(IMAGE_PREFIX)
        seeing = (attention_mask[:, :, last:, last - 1] == 0).float()
        mass = weights[:, :, last:, first:last].float().sum(-1) * seeing
        module.image_mass = mass.sum() / (seeing.sum() * query.shape[1])
    return torch.matmul(weights, value).transpose(1, 2), None


AttentionInterface.register("testbed_lean", lean_attention)
AttentionMaskInterface.register("testbed_lean", ALL_MASK_ATTENTION_FUNCTIONS["eager"])


class Learner(nn.Module):
    """The model with two temporary heads on its vision tower: one per patch, one for the whole image."""

    def __init__(self) -> None:
        super().__init__()
        self.model: LlavaForConditionalGeneration = build_model()
        width = self.model.config.vision_config.hidden_size
        self.patch_head = nn.Linear(width, BACKGROUND + 1)
        self.image_head = nn.Linear(width, BACKGROUND)
        self.model.set_attn_implementation("eager")
        self.model.model.language_model.set_attn_implementation("testbed_lean")
        weight = torch.ones(BACKGROUND + 1)
        weight[BACKGROUND] = 0.3
        self.register_buffer("patch_weight", weight, persistent=False)
        self.economical = False

    def see(self, pixels: Tensor) -> Tensor:
        """Vision features ``[B, 65, D]``, class token first."""
        features: Tensor = self.model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-1]
        return features

    def attend_economically(self) -> None:
        """From now on every language layer records how much it attends to the image."""
        self.economical = True
        for layer in self.model.model.language_model.layers:
            layer.self_attn.economy = True

    def excess(self) -> Tensor:
        """Attention to the image above ``ECONOMY_TARGET``, mean over layers, of the last packed batch."""
        masses = torch.stack([layer.self_attn.image_mass for layer in self.model.model.language_model.layers])
        return F.relu(masses - ECONOMY_TARGET).mean()

    def patch_loss(self, features: Tensor, patches: Tensor) -> Tensor:
        """Which object is largest in each patch."""
        logits = self.patch_head(features[:, 1:]).float().flatten(0, 1)
        return F.cross_entropy(logits, patches.reshape(-1), weight=self.patch_weight)

    def read(self, batch: dict[str, Tensor], features: Tensor | None) -> dict[str, Tensor]:
        """Language losses of a packed batch, and the accuracy of the answers."""
        core = self.model.model
        embeddings = self.model.get_input_embeddings()(batch["ids"])
        if features is not None:
            image = core.multi_modal_projector(features[:, 1:]).to(embeddings.dtype)
            parts = embeddings[:, : len(TEXT_PREFIX)], image, embeddings[:, len(IMAGE_PREFIX) :]
            embeddings = torch.cat(parts, dim=1)
        hidden = core.language_model(
            inputs_embeds=embeddings,
            attention_mask=batch["mask"],
            position_ids=batch["positions"],
            use_cache=False,
        ).last_hidden_state
        chosen = batch["kinds"] > 0
        logits = self.model.lm_head(hidden[chosen]).float()
        labels, kinds = batch["labels"][chosen], batch["kinds"][chosen]
        losses = F.cross_entropy(logits, labels, reduction="none")
        result = {name: losses[kinds == kind].mean() for name, kind in _KINDS.items() if bool((kinds == kind).any())}
        answers = kinds == ANSWER
        result["accuracy"] = (logits[answers].argmax(-1) == labels[answers]).float().mean().detach()
        return result


_KINDS = {"caption": CAPTION, "answer": ANSWER, "end": ANSWER_END, "blind": BLIND}
_WEIGHTS = {"caption": 1.0, "answer": 1.0, "end": 0.05, "blind": 0.1}


def language_loss(parts: dict[str, Tensor]) -> Tensor:
    """The weighted sum of the language losses."""
    return torch.stack([_WEIGHTS[name] * value for name, value in parts.items() if name in _WEIGHTS]).sum()
