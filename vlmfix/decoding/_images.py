"""The other branch's images: noised, or a stand-in of the same size. Made of what the processor gave."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

RAW_IMAGES_KWARG = "vlmfix_images"
"""The keyword argument in which ``generate`` hands the images to a forward when it has encoded them itself."""

ENCODES = "_maybe_prepare_encoder_kwargs_for_generation"
"""The method of a model in which ``generate`` encodes images before the first forward (since transformers 5.1x)."""


class RawImages:
    """What ``generate`` encoded: the processor's arguments, and for how many prompts."""

    def __init__(self, arguments: dict[str, Any], batch: int) -> None:
        self.arguments = arguments
        self.batch = batch


class KeepImages:
    """Stands in for a model's ``ENCODES``: calls it, and hands on the images it replaces by their features."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, inputs_tensor: torch.Tensor, model_kwargs: dict[str, Any], *args: Any) -> dict[str, Any]:
        """Return what the model's own method returns, with the raw images if it encoded any."""
        given = dict(model_kwargs)
        prepared: dict[str, Any] = getattr(type(self.model), ENCODES)(self.model, inputs_tensor, model_kwargs, *args)
        encoded = {name: value for name, value in given.items() if name not in prepared}
        if any(is_image_argument(name, value) for name, value in encoded.items()):
            prepared[RAW_IMAGES_KWARG] = RawImages(encoded, inputs_tensor.shape[0])
        return prepared


def encode_for_beams(model: Any, arguments: dict[str, Any], input_ids: Any, batch: int) -> dict[str, Any]:
    """Encode images as ``generate`` does, repeated for the beams of ``batch`` prompts.

    Args:
        model: The model.
        arguments: The processor's arguments.
        input_ids: int64 ``[batch * beams, length]``.
        batch: Prompts.
    """
    times = input_ids.shape[0] // batch
    encoded = model._prepare_multimodal_encoder_kwargs_for_generation(dict(arguments))["mm_encoder_outputs"]
    repeated: dict[str, Any] = model._expand_multimodal_outputs(input_ids[::times], encoded, expand_size=times)
    return repeated


def is_image_argument(name: str, value: object) -> bool:
    """Whether an argument holds images as the processor gave them."""
    is_named = name.startswith("pixel_values") or name in ("image_patches", "image_pixel_values")
    if isinstance(value, (list, tuple)):
        return is_named and bool(value) and all(is_image_argument(name, each) for each in value)
    return is_named and isinstance(value, torch.Tensor) and value.is_floating_point()


def replace_images(
    arguments: Mapping[str, Any], make: Callable[[str, torch.Tensor, Sequence[int] | None], torch.Tensor]
) -> dict[str, Any]:
    """Return arguments with other images; sizes, grids and masks stay.

    Args:
        arguments: Arguments of a forward by name.
        make: See ``DecodingMethod.other_images``.
    """
    replaced = dict(arguments)
    for name, value in arguments.items():
        if not is_image_argument(name, value):
            continue
        counts = _patches_per_image(arguments, "video" if "video" in name else "image")
        strips = _strips_per_image(arguments, value)
        if strips is not None:
            replaced[name] = _as_strip(make(name, _as_patches(value), strips), value)
        elif isinstance(value, (list, tuple)):
            replaced[name] = type(value)(make(name, each, None) for each in value)
        else:
            flat = counts is not None and value.dim() < 4 and sum(counts) == value.shape[-2]
            replaced[name] = make(name, value, counts if flat else None)
    return replaced


def _patches_per_image(arguments: Mapping[str, Any], modality: str) -> list[int] | None:
    grid = arguments.get(f"{modality}_grid_thw")
    return None if grid is None else [int(count) for count in grid.prod(-1).tolist()]


def _strips_per_image(arguments: Mapping[str, Any], value: Any) -> list[int] | None:
    """How many patches each image has where all lie side by side, ``[1, channels, side, side * patches]``."""
    sizes = arguments.get("target_sizes")  # MiniCPM-V
    if sizes is None or not isinstance(value, torch.Tensor) or value.dim() != 4 or value.shape[0] != 1:
        return None
    counts = [int(count) for count in sizes.prod(-1).tolist()]
    return counts if sum(counts) * value.shape[2] == value.shape[3] else None


def _as_patches(strip: torch.Tensor) -> torch.Tensor:
    """``[1, channels, side, side * patches]`` as ``[patches, channels * side * side]``."""
    _, channels, side, width = strip.shape
    return strip.reshape(channels, side, width // side, side).permute(2, 0, 1, 3).flatten(1)


def _as_strip(patches: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Undo ``_as_patches``."""
    _, channels, side, _ = like.shape
    return patches.reshape(-1, channels, side, side).permute(1, 2, 0, 3).reshape(like.shape)


def each_image(
    images: torch.Tensor, per_image: Sequence[int] | None, make: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Apply ``make`` to every image: ``[channels, height, width]`` or its patches ``[patches, size]``.

    An image of zeros stays: it fills up a row of fewer images or crops than others, and some models tell it by that.
    """
    if per_image is not None and images.dim() == 2:
        ends = torch.tensor(per_image).cumsum(0)[:-1]
        return torch.cat([make(part) for part in images.tensor_split(ends)])
    unit = 3 if images.dim() >= 4 else 2
    if images.dim() <= unit:
        return make(images)
    units = images.reshape(-1, *images.shape[-unit:])
    return torch.stack([make(part) if bool(part.any()) else part for part in units]).reshape(images.shape)
