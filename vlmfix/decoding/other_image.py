"""The other branch's images: noised, or a stand-in of the same size. Made of what the processor gave."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vlmfix.decoding.base import DecodingMethod
from vlmfix.errors import UnsupportedFeatureError
from vlmfix.model.anatomy import FORWARD_KWARG

OTHER_IMAGES_KWARG = "vlmfix_images"
"""The keyword argument in which ``generate`` hands on ``OtherImages`` when it has encoded the images itself."""


ENCODES = "_maybe_prepare_encoder_kwargs_for_generation"
"""The method of a model in which ``generate`` encodes images before the first forward (since transformers 5.1x)."""


LOOKS = {"cross_attention_mask": 4, "image_attention_mask": 3}
"""Arguments ``[batch, length, ...]`` that say which images a token looks at, and how many dimensions they have.

Phi-4 has an ``image_attention_mask`` of four dimensions, which says which patches of a crop are padding.
"""


PACKED = {"pixel_values": "target_sizes", "pixel_values_videos": "target_sizes_videos"}
"""Where pictures come as one row of patches (MiniCPM-V 4.6): the argument with their sizes in patches, ``[n, 2]``."""


@dataclass(frozen=True)
class OtherImages:
    """The other branch's images, encoded beside those that ``generate`` encodes.

    Attributes:
        features: What the model's forward takes as ``mm_encoder_outputs``.
        batch: Prompts, before they are repeated for beams.
    """

    features: dict[str, Any]
    batch: int

    def expanded(self, model: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Return the features for the rows of a forward: prompts are repeated for their beams."""
        names = ("input_ids", "inputs_embeds")
        times = next(len(arguments[name]) for name in names if arguments.get(name) is not None) // self.batch
        if times == 1:
            return self.features
        ids, embeds = (arguments[name][::times] if arguments.get(name) is not None else None for name in names)
        features = copy.deepcopy(self.features)  # they are expanded in place
        expanded: dict[str, Any] = model._expand_multimodal_outputs(
            ids, features, expand_size=times, inputs_embeds=embeds
        )
        return expanded


class EncodeOtherImages:
    """Stands in for a model's ``ENCODES``: calls it, and encodes the other branch's images too."""

    def __init__(self, model: Any, method: DecodingMethod) -> None:
        self.model = model
        self.method = method

    def __call__(self, inputs_tensor: torch.Tensor, model_kwargs: dict[str, Any], *args: Any) -> dict[str, Any]:
        """Return what the model's own method returns, with ``OtherImages`` if it has encoded any."""
        given = dict(model_kwargs)
        prepared: dict[str, Any] = getattr(type(self.model), ENCODES)(self.model, inputs_tensor, model_kwargs, *args)
        is_stock = FORWARD_KWARG in given and given[FORWARD_KWARG] is None
        if not is_stock and any(is_image_argument(name, given[name]) for name in given.keys() - prepared.keys()):
            other = replace_images(given, self.method.other_images)
            features = self.model._prepare_multimodal_encoder_kwargs_for_generation(other)["mm_encoder_outputs"]
            prepared[OTHER_IMAGES_KWARG] = OtherImages(features, len(inputs_tensor))
        return prepared


IMAGE_ARGUMENTS = ("pixel_values", "image_patches", "flattened_patches")
"""What the names of arguments contain that hold images as the processor gave them."""


GRIDS = ("grid_thw", "grid_hw")
"""How arguments are called that hold the grid of patches of every picture, after ``image_`` or ``video_``."""


NUM_CHANNELS = (1, 3)
"""Channels of a picture: grey or colour."""


def is_image_argument(name: str, value: object) -> bool:
    """Whether an argument holds images as the processor gave them."""
    is_named = any(each in name for each in IMAGE_ARGUMENTS)
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
    """Return a forward's arguments with other images; sizes, grids and masks stay.

    Args:
        arguments: Arguments of a forward by name.
        make: See ``DecodingMethod.other_images``. It is shown pictures without the padding that a batch gives them.

    Raises:
        UnsupportedFeatureError: They are patches, and nothing says which of them make up a picture.
    """
    replaced = dict(arguments)
    for name, value in arguments.items():
        if not is_image_argument(name, value):
            continue
        if isinstance(value, (list, tuple)):
            replaced[name] = type(value)(make(name, each, None) for each in value)
        elif name == "flattened_patches":  # a patch's row and column stand before its pixels
            replaced[name] = torch.cat([value[..., :2], make(name, value[..., 2:], None)], dim=-1)
        elif (sizes := _packed_sizes(arguments, name)) is not None:
            pictures = [make(name, picture[None], None)[0] for picture in unpacked(value, sizes)]
            replaced[name] = packed(pictures, value.shape[2])
        elif (counts := _patches_per_image(arguments, name, value)) is not None:
            replaced[name] = make(name, value.reshape(sum(counts), -1), counts).reshape(value.shape)
        elif value.dim() == 2 or (value.dim() >= 4 and value.shape[-3] not in NUM_CHANNELS):
            raise UnsupportedFeatureError(
                f"{name} of shape {tuple(value.shape)} are patches, and no argument says how many of them each picture "
                "has (as image_grid_thw does), so that no other picture can be made of them. Choose a method that "
                "leaves the image as it is; vlmfix.list_methods() lists them."
            )
        elif (is_picture := _without_padding(arguments, name, value)) is not None:
            replaced[name] = _made_of_parts(name, value, is_picture, make)
        else:
            replaced[name] = make(name, value, None)
    return replaced


def _patches_per_image(arguments: Mapping[str, Any], name: str, value: torch.Tensor) -> list[int] | None:
    """Return how many patches each picture has, where those of all pictures follow each other in a tensor."""
    grids = (arguments.get(f"{'video' if 'video' in name else 'image'}_{axes}") for axes in GRIDS)
    grid = next((each for each in grids if each is not None), None)
    if grid is None:
        return None
    counts = [int(count) for count in grid.prod(-1).tolist()]
    return counts if sum(counts) in (value.shape[0], math.prod(value.shape[:-1])) else None


def _without_padding(arguments: Mapping[str, Any], name: str, value: torch.Tensor) -> torch.Tensor | None:
    """Return which pixels or patches belong to a picture, where a batch pads pictures to one size.

    Returns:
        bool ``[..., height, width]`` for pictures ``[..., channels, height, width]``, ``[..., patches]`` for patches
        ``[..., patches, size]``; ``None`` where nothing is said.
    """
    shape = value.shape[:-1] if value.dim() < 4 else (*value.shape[:-3], *value.shape[-2:])
    mask = arguments.get(name.replace("values", "attention_mask"))
    if isinstance(mask, torch.Tensor) and mask.shape == shape:
        return mask.bool()
    places = arguments.get(f"{'video' if 'video' in name else 'image'}_position_ids")
    if isinstance(places, torch.Tensor) and places.shape[:-1] == shape:
        return (places >= 0).all(-1)  # padding is nowhere
    sizes = arguments.get("image_sizes")
    if value.dim() != 4 or not isinstance(sizes, torch.Tensor) or sizes.shape != (value.shape[0], 2):
        return None
    sizes = sizes.to(value.device)
    if sizes.amax(0).tolist() != list(shape[1:]):
        return None  # sizes of something else: before the processor, or of another argument
    inside = [torch.arange(shape[axis], device=value.device) < sizes[:, axis - 1, None] for axis in (1, 2)]
    return inside[0][:, :, None] & inside[1][:, None]


def _made_of_parts(
    name: str,
    images: torch.Tensor,
    is_picture: torch.Tensor,
    make: Callable[[str, torch.Tensor, Sequence[int] | None], torch.Tensor],
) -> torch.Tensor:
    """Apply ``make`` to what is picture in images, ``[1, channels, height, width]`` or patches ``[patches, size]``.

    Args:
        name: The argument's name.
        images: ``[..., channels, height, width]`` or ``[..., patches, size]``.
        is_picture: See ``_without_padding``.
        make: See ``replace_images``.
    """
    made = images.clone()
    unit = 3 if images.dim() >= 4 else 2
    for part, kept in zip(
        made.view(-1, *images.shape[-unit:]), is_picture.reshape(-1, *is_picture.shape[1 - unit :]), strict=True
    ):
        if not bool(kept.any()):
            continue
        if unit == 2:
            part[kept] = make(name, part[kept], None)
        else:
            rows, columns = (kept.any(axis).nonzero().flatten().tolist() for axis in (1, 0))
            box = (slice(None), slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))
            part[box] = make(name, part[box].contiguous()[None], None)[0]
    return made


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


def mean_image(image: torch.Tensor) -> torch.Tensor:
    """Return ``[channels, height, width]`` in its own mean colour, or patches ``[patches, size]`` as their mean."""
    dims = (1, 2) if image.dim() == 3 else (0,)
    return image.float().mean(dims, keepdim=True).to(image.dtype).expand_as(image).clone()


def image_noise(image: torch.Tensor, seed: int) -> torch.Tensor:
    """Return normal noise of an image's shape, fp32; by the seed alone, on whatever device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(image.shape, generator=generator, dtype=torch.float32).to(image.device)
