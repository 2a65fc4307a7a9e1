"""A stand-in for vision towers of timm, which needs torchvision: what matters to a patch is behind the projector."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def tower(*, layout: str, first_token: bool = False, **fields: Any) -> Any:
    """The config of a convolution of 8 x 8 pixels and one more layer, 16 channels wide, registered with transformers.

    Args:
        layout: ``"tokens"`` for ``[batch, patches, channels]``, ``"map"`` for ``[batch, channels, rows, columns]``.
        first_token: Whether a class token stands before the patches.
        **fields: Kept in the config.
    """
    from transformers import AutoConfig, AutoModel

    config_class, model_class = _classes()
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    AutoModel.register(config_class, model_class, exist_ok=True)
    return config_class(hidden_size=16, layout=layout, first_token=first_token, **fields)


_KNOWN: list[tuple[Any, Any]] = []


def _classes() -> tuple[Any, Any]:
    if not _KNOWN:
        _KNOWN.append(_define())
    return _KNOWN[0]


def _define() -> tuple[Any, Any]:
    from transformers import Gemma3nVisionConfig, PreTrainedModel
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    class TinyTowerConfig(Gemma3nVisionConfig):  # Gemma3n takes no other kind
        model_type = "vlmfix_tiny_tower"

    class TinyTower(PreTrainedModel):
        config_class = TinyTowerConfig
        main_input_name = "pixel_values"

        def __init__(self, config: Any):
            super().__init__(config)
            self.patches = nn.Conv2d(3, config.hidden_size, kernel_size=8, stride=8)
            self.mix = nn.Conv2d(config.hidden_size, config.hidden_size, kernel_size=3, padding=1)
            self.post_init()

        def _init_weights(self, module: nn.Module) -> None:
            pass

        def forward(self, pixel_values: torch.Tensor, **kwargs: Any) -> Any:
            features = self.mix(torch.relu(self.patches(pixel_values)))
            if self.config.layout == "tokens":
                features = features.flatten(2).transpose(1, 2)
                if self.config.first_token:
                    features = torch.cat([features.mean(1, keepdim=True), features], dim=1)
            return BaseModelOutputWithPooling(last_hidden_state=features)

    return TinyTowerConfig, TinyTower
