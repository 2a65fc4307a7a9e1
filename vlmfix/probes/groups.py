"""Groups of a prompt's tokens by what they show or say of one object."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vlmfix.anatomy import Anatomy
from vlmfix.errors import MethodError

IMAGE_GROUPS = ("image_before", "image_object", "image_after")
TEXT_GROUPS = ("text_before", "text_object", "text_after")
GROUPS = (*IMAGE_GROUPS, *TEXT_GROUPS, "last", "all")
"""Image tokens before, on and after an object; text before the word for it, the word, text after it; the prompt's last
token. The seven are disjoint and cover all tokens but padding; ``"all"`` is their union."""


@dataclass(frozen=True)
class ObjectPlace:
    """Where an object is in a sample.

    Attributes:
        cells: Which of the sample's image tokens show it (0-based, in the order of the prompt). ``None``: all.
        word: Which of the sample's tokens spell it (0-based, padding left out). Empty: it is not named, and all text
            comes before it.
    """

    cells: Sequence[int] | None = None
    word: Sequence[int] = ()


def token_groups(
    anatomy: Anatomy, inputs: Mapping[str, Any], places: Sequence[ObjectPlace] | None = None
) -> dict[str, torch.Tensor]:
    """Sort the tokens of a batch of prompts into ``GROUPS``.

    Image tokens behind the object's first one that do not show it come after it.

    Args:
        anatomy: The model.
        inputs: The processor's output.
        places: Per sample. Default: the whole image, and no word.

    Returns:
        Bool ``[batch, length]`` by name.

    Raises:
        MethodError: Places that do not fit the batch.
    """
    ids = inputs["input_ids"]
    mask = inputs.get("attention_mask")
    valid = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    image = torch.isin(ids, torch.tensor(anatomy.image_token_ids, device=ids.device)) & valid
    places = [ObjectPlace()] * len(ids) if places is None else places
    if len(places) != len(ids):
        raise MethodError(f"places must hold one for each of {len(ids)} samples, got {len(places)}.")
    last = valid & (valid.flip(1).cumsum(1).flip(1) == 1)
    shown, said = torch.zeros_like(image), torch.zeros_like(image)
    for sample, place in enumerate(places):
        pictured, written = image[sample].nonzero()[:, 0], valid[sample].nonzero()[:, 0]
        shown[sample, _chosen(pictured, place.cells, f"cells of sample {sample}", "image tokens")] = True
        said[sample, _chosen(written, place.word, f"word of sample {sample}", "tokens")] = True
    if bool((said & image).any()):
        raise MethodError("The word for an object cannot be an image token. Count the tokens of the whole prompt.")
    picture, text, said = image & ~last, valid & ~image & ~last, said & ~last
    found = {
        "image_before": picture & ~shown & (shown.cumsum(1) == 0),
        "image_object": picture & shown,
        "image_after": picture & ~shown & (shown.cumsum(1) > 0),
        "text_before": text & ~said & (said.cumsum(1) == 0),
        "text_object": said,
        "text_after": text & ~said & (said.cumsum(1) > 0),
        "last": last,
        "all": valid,
    }
    return {name: found[name] for name in GROUPS}


def _chosen(positions: torch.Tensor, chosen: Sequence[int] | None, what: str, among: str) -> torch.Tensor:
    if chosen is None:
        return positions
    if any(not 0 <= each < len(positions) for each in chosen):
        raise MethodError(f"The {what} must be from 0 to {len(positions) - 1}, its {among}; got {list(chosen)}.")
    return positions[torch.tensor(list(chosen), dtype=torch.int64, device=positions.device)]
