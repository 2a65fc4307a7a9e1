"""Which tokens of a batch of prompts are what."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from vlmfix.model.anatomy import Anatomy


class PromptTokens(NamedTuple):
    """The tokens of a batch of prompts, each bool ``[batch, length]``.

    Attributes:
        valid: Those that are no padding.
        image: The image's.
        last: Each sample's last.
        behind: Those behind the last image token; none in a sample without an image.
    """

    valid: torch.Tensor
    image: torch.Tensor
    last: torch.Tensor
    behind: torch.Tensor


def prompt_tokens(anatomy: Anatomy, inputs: Mapping[str, Any]) -> PromptTokens:
    """Tell the tokens of a batch apart.

    Args:
        anatomy: The model.
        inputs: The processor's output.
    """
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    valid = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    image = is_image_token(anatomy, ids) & valid
    last = valid & (_from_the_end(valid) == 1)
    behind = valid & (_from_the_end(image) == 0) & image.any(1, keepdim=True)
    return PromptTokens(valid, image, last, behind)


def is_image_token(anatomy: Anatomy, ids: torch.Tensor) -> torch.Tensor:
    """Return which ids stand for image tokens: bool, of the same shape."""
    return torch.isin(ids, torch.tensor(anatomy.image_token_ids, device=ids.device))


def _from_the_end(mask: torch.Tensor) -> torch.Tensor:
    """Count the true ones from the last column on, each column included."""
    return mask.flip(1).cumsum(1).flip(1)
