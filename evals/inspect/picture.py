"""The picture as the model sees it, and where its tokens lie on it."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image

from vlmfix.probes.spans import square

from ..report.page import data_uri
from .case import Case


def picture_as_seen(case: Case, inputs: Any, num_image_tokens: int) -> tuple[str, tuple[int, int] | None]:
    """Return the picture as a data URI, as the model sees it where that is one picture, and the grid of its tokens."""
    pixels = inputs.get("pixel_values")
    processor = case.processor.image_processor
    grid = grid_of(case.model, inputs, num_image_tokens)
    picture = case.picture
    mean, std = getattr(processor, "image_mean", None), getattr(processor, "image_std", None)
    if grid is not None and pixels is not None and pixels.dim() == 4 and mean is not None and std is not None:
        scale = pixels.new_tensor(std).float()[:, None, None], pixels.new_tensor(mean).float()[:, None, None]
        seen = (pixels[0].float() * scale[0] + scale[1]).clamp(0, 1) * 255
        picture = Image.fromarray(seen.round().to(torch.uint8).permute(1, 2, 0).cpu().numpy())
    if max(picture.size) < 512:  # small pictures stay sharp
        factor = 512 // max(picture.size)
        picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    else:
        picture = picture.copy()
        picture.thumbnail((768, 768))
    return data_uri(picture, quality=88), grid


def grid_of(model: Any, inputs: Any, num_image_tokens: int) -> tuple[int, int] | None:
    """Return rows and columns of the image's tokens; None for tiles, several images, or no rectangle."""
    shape = inputs.get("image_grid_thw")
    if shape is not None:  # Qwen-VL and its kin
        merge = getattr(model.config.vision_config, "spatial_merge_size", 1)
        frames, rows, columns = (int(size) for size in shape[0])
        grid = (rows // merge, columns // merge)
        return grid if len(shape) == 1 and frames == 1 and grid[0] * grid[1] == num_image_tokens else None
    pixels = inputs.get("pixel_values")
    is_single = pixels is not None and pixels.dim() >= 4 and pixels.shape[:-3].numel() == 1
    return square(num_image_tokens) if is_single else None
