"""What a scene shows beyond names: how many of each object there are, where, how large and of which colour."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from ..scenes import IMAGE_SIZE, RenderedScene
from ..vocabulary import SCENES

__all__ = ["COLOURS", "Thing", "name_colours", "things"]

COLOURS: tuple[str, ...] = ("red", "yellow", "green", "blue", "purple", "pink", "brown", "white", "gray", "black")
"""Colour words. "orange" is missing because CHAIR's matcher would count it as the fruit."""

_NO_COLOUR = len(COLOURS)
_CLEAR_SHARE = 0.5
_LARGE, _SMALL = 36, 17


@dataclass(frozen=True)
class Thing:
    """All instances of one object in a scene.

    Attributes:
        name: COCO category name.
        count: Number of instances.
        colour: One of :data:`COLOURS`, or None if it has several colours or there are several instances.
        size: ``"large"``, ``"small"`` or None (medium, or several instances).
        column: ``"left"``, ``"middle"`` or ``"right"`` third of the picture; None for several instances.
        row: ``"top"``, ``"middle"`` or ``"bottom"`` third; None for several instances.
    """

    name: str
    count: int
    colour: str | None = None
    size: str | None = None
    column: str | None = None
    row: str | None = None


def name_colours(pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
    """The colour word of every pixel.

    Args:
        pixels: uint8 ``(..., 3)``, RGB.

    Returns:
        int64 ``(...)``, an index into :data:`COLOURS`, or its length where no word fits (orange).
    """
    values = pixels.astype(np.float32)
    high, low = values.max(-1), values.min(-1)
    chroma = high - low
    red, green, blue = (values[..., channel] for channel in range(3))
    span = np.maximum(chroma, 1)
    hue = np.where(high == red, (green - blue) / span % 6, np.where(high == green, (blue - red) / span + 2, 0))
    hue = 60 * np.where((high == blue) & (high != red) & (high != green), (red - green) / span + 4, hue)
    saturation = chroma / np.maximum(high, 1)
    tests = [
        (high < 60, "black"),
        ((saturation < 0.17) & (high > 185), "white"),
        (saturation < 0.17, "gray"),
        ((hue < 40) & (high < 165), "brown"),
        (((hue < 14) | (hue > 345)) & (saturation > 0.45), "red"),
        ((hue < 40) & (saturation > 0.35), None),
        ((hue >= 40) & (hue < 66), "yellow"),
        ((hue >= 66) & (hue < 165), "green"),
        ((hue >= 165) & (hue < 255), "blue"),
        ((hue >= 255) & (hue < 305), "purple"),
    ]
    indices = [_NO_COLOUR if colour is None else COLOURS.index(colour) for _, colour in tests]
    return np.select([test for test, _ in tests], indices, default=COLOURS.index("pink")).astype(np.int64)


def things(scene: RenderedScene) -> tuple[Thing, ...]:
    """Everything in a scene, typical objects first in the scene's own order, then the others in COCO order."""
    order = [*SCENES[scene.kind].typical]
    groups: dict[str, list[int]] = {}
    for index, instance in enumerate(scene.instances):
        groups.setdefault(instance.name, []).append(index)
    names = sorted(groups, key=lambda name: (order.index(name) if name in order else len(order), name))
    # Noise would scatter the colour words.
    smooth = Image.fromarray(scene.pixels).resize((IMAGE_SIZE // 2, IMAGE_SIZE // 2), Image.Resampling.BOX)
    colours = name_colours(np.asarray(smooth.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.NEAREST)))
    found = []
    for name in names:
        members = groups[name]
        if len(members) > 1:
            found.append(Thing(name, len(members)))
            continue
        instance = scene.instances[members[0]]
        x, y, width, height = instance.bbox
        extent = max(width, height)
        found.append(
            Thing(
                name,
                1,
                colour=_colour(colours[scene.owners == members[0]]),
                size="large" if extent >= _LARGE else "small" if extent <= _SMALL else None,
                column=("left", "middle", "right")[min(2, int(3 * (x + width / 2) / IMAGE_SIZE))],
                row=("top", "middle", "bottom")[min(2, int(3 * (y + height / 2) / IMAGE_SIZE))],
            )
        )
    return tuple(found)


def _colour(colours: npt.NDArray[np.int64]) -> str | None:
    """The colour word of most of an instance's pixels, or None if no word fits or none has the majority."""
    tally = np.bincount(colours, minlength=_NO_COLOUR + 1)
    best = int(tally.argmax())
    return COLOURS[best] if best < _NO_COLOUR and tally[best] > _CLEAR_SHARE * tally.sum() else None
