"""The other branch's images: noised, or a stand-in of the same size. Made of what the processor gave."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

RAW_IMAGES_KWARG = "vlmfix_images"
"""The keyword argument in which ``generate`` hands the images to a forward when it has encoded them itself."""


ENCODES = "_maybe_prepare_encoder_kwargs_for_generation"
"""The method of a model in which ``generate`` encodes images before the first forward (since transformers 5.1x)."""


LOOKS = {"cross_attention_mask": 4, "image_attention_mask": 3}
"""Arguments ``[batch, length, ...]`` that say which images a token looks at, and how many dimensions they have.

Phi-4 has an ``image_attention_mask`` of four dimensions, which says which patches of a crop are padding.
"""


PACKED = {"pixel_values": "target_sizes", "pixel_values_videos": "target_sizes_videos"}
"""Where pictures come as one row of patches (MiniCPM-V 4.6): the argument with their sizes in patches, ``[n, 2]``."""


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
    is_named = name.startswith(("pixel_values", "image_pixel_values")) or name == "image_patches"
    if isinstance(value, (list, tuple)):
        return is_named and bool(value) and all(is_image_argument(name, each) for each in value)
    return is_named and isinstance(value, torch.Tensor) and value.is_floating_point()


def looks_of(arguments: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Return the arguments that say which images a token looks at."""
    found = {name: arguments.get(name) for name in LOOKS}
    return {
        name: value for name, value in found.items() if isinstance(value, torch.Tensor) and value.dim() == LOOKS[name]
    }


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
        if isinstance(value, (list, tuple)):
            replaced[name] = type(value)(make(name, each, None) for each in value)
        elif (sizes := _packed_sizes(arguments, name)) is not None:
            pictures = [make(name, picture[None], None)[0] for picture in unpacked(value, sizes)]
            replaced[name] = packed(pictures, value.shape[2])
        else:
            flat = counts is not None and value.dim() < 4 and sum(counts) == value.shape[-2]
            replaced[name] = make(name, value, counts if flat else None)
    return replaced


def _patches_per_image(arguments: Mapping[str, Any], modality: str) -> list[int] | None:
    grid = arguments.get(f"{modality}_grid_thw")
    return None if grid is None else [int(count) for count in grid.prod(-1).tolist()]


def _packed_sizes(arguments: Mapping[str, Any], name: str) -> list[tuple[int, int]] | None:
    sizes, value = arguments.get(PACKED.get(name, "")), arguments[name]
    if sizes is None or value.dim() != 4 or value.shape[0] != 1:
        return None
    found = [(int(height), int(width)) for height, width in sizes.tolist()]
    return found if sum(height * width for height, width in found) * value.shape[2] == value.shape[3] else None


def unpacked(images: torch.Tensor, sizes: Sequence[tuple[int, int]]) -> list[torch.Tensor]:
    """Put pictures together that came as rows of patches.

    Args:
        images: ``[1, channels, patch, patches * patch]``: the patches of all pictures beside each other, row by row.
        sizes: Height and width of each picture in patches.

    Returns:
        The pictures, each ``[channels, height * patch, width * patch]``.
    """
    channels, patch = images.shape[1:3]
    parts = torch.split(images[0], [height * width * patch for height, width in sizes], dim=-1)
    return [
        part.reshape(channels, patch, height, width, patch).transpose(1, 2).reshape(channels, height * patch, -1)
        for part, (height, width) in zip(parts, sizes, strict=True)
    ]


def packed(pictures: Sequence[torch.Tensor], patch: int) -> torch.Tensor:
    """Undo ``unpacked``: pictures ``[channels, height, width]`` as ``[1, channels, patch, patches * patch]``."""
    parts = [
        picture.reshape(len(picture), -1, patch, picture.shape[-1]).transpose(1, 2).reshape(len(picture), patch, -1)
        for picture in pictures
    ]
    return torch.cat(parts, dim=-1)[None]


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
