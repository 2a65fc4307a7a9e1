"""Procedural COCO-style scenes: 96 x 96 pictures of sprites with exact ground truth.

Every scene is a pure function of its image id. Splits own disjoint ranges of ids, so no two splits share a seed:

* ``train``: typical objects appear with the probabilities of :data:`~.vocabulary.SCENES` in 55 % of the scenes and with
  probability .6 in the rest; 0 or 1, respectively 0 to 2, intruders from other scenes.
* ``calibration``, ``heldout``, ``heldout2``: the decorrelated distribution, every typical object with the same
  probability .6 and 0 to 2 intruders. What always stands in such a place is therefore absent in two scenes of five,
  which is where a model that follows its prior invents objects.

A sprite that would hide more than half of another one is moved, or left out of the scene altogether, so the annotations
name everything that was drawn.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter

from vlmfix.errors import DataError

from .sprites import load_sprites
from .vocabulary import CATEGORIES, DRAWN_ONCE, SCENES

__all__ = [
    "BACKGROUND",
    "GRID",
    "IMAGE_SIZE",
    "INDEX",
    "NAMES",
    "SPLITS",
    "Instance",
    "RenderedScene",
    "Split",
    "image_id",
    "make_scene",
    "scene_kind",
]


Split = Literal["train", "calibration", "heldout", "heldout2"]


SPLITS: tuple[Split, ...] = get_args(Split)
"""The splits, in the order of their id ranges."""


IMAGE_SIZE = 96
"""Image height and width in pixels."""


GRID = 8
"""Patches per side (12 px each)."""


NAMES: tuple[str, ...] = tuple(name for _, name, _ in CATEGORIES)
"""Category names in COCO order."""


INDEX: dict[str, int] = {name: index for index, name in enumerate(NAMES)}
"""Category name to its place in :data:`NAMES`."""


BACKGROUND = len(NAMES)
"""Patch label of a patch without an object."""


_IDS_PER_SPLIT = 10_000_000


_DECORRELATED = 0.6


_MEDIAN_SIZE = 26.0


_MIN_VISIBLE = 0.5


_SIZE: dict[str, float] = {
    "dining table": 1.5, "couch": 1.4, "bed": 1.4, "refrigerator": 1.4, "bus": 1.4, "airplane": 1.4, "train": 1.4,
    "elephant": 1.4, "giraffe": 1.35, "oven": 1.3, "truck": 1.3, "car": 1.25, "horse": 1.25, "boat": 1.2, "cow": 1.2,
    "zebra": 1.2, "bear": 1.2, "person": 1.2, "toilet": 1.15, "tv": 1.15, "chair": 1.1, "keyboard": 0.9,
    "tie": 0.8, "bottle": 0.8, "book": 0.8, "handbag": 0.8, "carrot": 0.8, "vase": 0.8, "bowl": 0.8, "cup": 0.8,
    "wine glass": 0.8, "scissors": 0.75, "bird": 0.75, "frisbee": 0.75, "apple": 0.75, "orange": 0.75, "clock": 0.75,
    "fork": 0.75, "knife": 0.75, "spoon": 0.75, "sports ball": 0.7, "cell phone": 0.7, "toothbrush": 0.75,
    "mouse": 0.7, "remote": 0.7, "hair drier": 0.8, "baseball glove": 0.8,
}  # fmt: skip
"""Relative size of the categories that are not of medium size."""


_PALETTE: tuple[tuple[int, ...], ...] = tuple(
    tuple(int(v) for v in np.random.default_rng(100 + index).integers(90, 235, 3)) for index in range(len(SCENES))
)


@dataclass(frozen=True)
class Instance:
    """One annotated object.

    Attributes:
        name: COCO category name.
        bbox: ``(x, y, width, height)`` in pixels, inside the image.
        area: Visible pixels.
    """

    name: str
    bbox: tuple[int, int, int, int]
    area: int


@dataclass(frozen=True)
class RenderedScene:
    """A picture with its ground truth.

    Attributes:
        image_id: The id, which is also the seed.
        kind: Index into :data:`~.vocabulary.SCENES`.
        pixels: uint8 ``(96, 96, 3)``, RGB.
        instances: Every object drawn.
        patches: int16 ``(8, 8)``, category index of the largest object in each patch, or ``BACKGROUND``.
        owners: int16 ``(96, 96)``, index into ``instances`` of what each pixel shows, or -1.
    """

    image_id: int
    kind: int
    pixels: npt.NDArray[np.uint8]
    instances: tuple[Instance, ...]
    patches: npt.NDArray[np.int16]
    owners: npt.NDArray[np.int16]

    def counts(self) -> dict[str, int]:
        """Category name to number of instances."""
        result: dict[str, int] = {}
        for instance in self.instances:
            result[instance.name] = result.get(instance.name, 0) + 1
        return result


def image_id(split: Split, index: int) -> int:
    """The id of image ``index`` of a split; ranges of different splits are disjoint.

    Raises:
        DataError: If the split is unknown or the index outside ``0 .. 9_999_999``.
    """
    if split not in SPLITS:
        raise DataError(f"expected one of the splits {', '.join(SPLITS)}, found {split!r}")
    if not 0 <= index < _IDS_PER_SPLIT:
        raise DataError(f"expected an image index from 0 to {_IDS_PER_SPLIT - 1}, found {index}")
    return (SPLITS.index(split) + 1) * _IDS_PER_SPLIT + index


def scene_kind(number: int) -> int:
    """Index into the scenes of an image id, without drawing it."""
    return random.Random(number).randrange(len(SCENES))


def make_scene(number: int) -> RenderedScene:
    """Draws the scene of one image id, always the same for the same id.

    Args:
        number: An id made by :func:`image_id`.
    """
    split = SPLITS[number // _IDS_PER_SPLIT - 1]
    rng = random.Random(number)
    noise = np.random.default_rng(number)
    kind = rng.randrange(len(SCENES))
    names = _choose_objects(rng, kind, split)
    canvas = _background(rng, noise, kind)
    placed = _place(rng, canvas, names)
    pixels = _degrade(rng, noise, canvas)
    owner, kept = placed.owner, placed.kept
    return RenderedScene(number, kind, pixels, _annotate(owner, kept), _patch_labels(owner, kept), owner)


def _choose_objects(rng: random.Random, kind: int, split: Split) -> list[str]:
    typical = SCENES[kind].typical
    as_listed = split == "train" and rng.random() < 0.55
    level = 0.6 if split == "train" else _DECORRELATED
    names = [name for name, p in typical.items() if rng.random() < (p if as_listed else level)]
    intruders = rng.choice((0, 0, 1, 1) if as_listed else (0, 1, 1, 2))
    names += rng.sample([name for name in NAMES if name not in typical], intruders)
    return names or [next(iter(typical))]


def _background(rng: random.Random, noise: np.random.Generator, kind: int) -> Image.Image:
    """A soft colour field, of the scene's own palette 60 % of the time, with a few plain shapes as clutter."""
    base = _PALETTE[kind] if rng.random() < 0.6 else rng.choice(_PALETTE)
    cells = rng.randrange(2, 5)
    field = noise.standard_normal((cells, cells, 3)).astype(np.float32) * 28
    channels = [
        Image.fromarray(np.ascontiguousarray(field[..., c])).resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)
        for c in range(3)
    ]
    colour = np.asarray(base, dtype=np.float32) + np.stack([np.asarray(channel) for channel in channels], axis=-1)
    canvas = Image.fromarray(np.clip(colour, 0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(canvas)
    for _ in range(rng.randrange(6)):
        x, y, w, h = rng.randrange(IMAGE_SIZE), rng.randrange(IMAGE_SIZE), rng.randrange(4, 22), rng.randrange(4, 22)
        fill = (rng.randrange(256), rng.randrange(256), rng.randrange(256))
        box = (x - w // 2, y - h // 2, x + w // 2, y + h // 2)
        if rng.random() < 0.5:
            draw.rectangle(box, fill=fill)
        else:
            draw.ellipse(box, fill=fill)
    return canvas


def _dress(rng: random.Random, name: str, size: float) -> Image.Image:
    """One sprite of a category at a given size, perhaps mirrored or turned, with changed colours."""
    sprite = rng.choice(load_sprites()[name])
    if rng.random() < 0.5:
        sprite = sprite.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    scale = size / max(sprite.size)
    shape = (max(3, round(sprite.width * scale)), max(3, round(sprite.height * scale)))
    sprite = sprite.resize(shape, Image.Resampling.BILINEAR)
    if rng.random() < 0.5:
        sprite = sprite.rotate(rng.uniform(-20, 20), expand=True, resample=Image.Resampling.BILINEAR)
    rgba = np.asarray(sprite).astype(np.float32)
    gains = [rng.uniform(0.7, 1.25) * rng.uniform(0.85, 1.15) for _ in range(3)]
    rgba[..., :3] = np.clip(rgba[..., :3] * np.asarray(gains, dtype=np.float32), 0, 255)
    return Image.fromarray(rgba.astype(np.uint8))


@dataclass
class _Placed:
    """Which sprite owns each pixel (-1: none), and what each one is: name and box."""

    owner: npt.NDArray[np.int16]
    kept: list[tuple[str, tuple[int, int, int, int]]]


def _place(rng: random.Random, canvas: Image.Image, names: list[str]) -> _Placed:
    """Pastes the objects, large ones first, each where it hides least of the others."""
    items: list[tuple[float, str]] = []
    for name in names:
        repeats = 1 if name in DRAWN_ONCE or rng.random() < 0.85 else rng.choice((2, 2, 3))
        for _ in range(repeats):
            size = rng.lognormvariate(math.log(_MEDIAN_SIZE), 0.25) * _SIZE.get(name, 1.0)
            items.append((min(max(size, 12.0), 46.0), name))
    items.sort(key=lambda item: -item[0])
    placed = _Placed(np.full((IMAGE_SIZE, IMAGE_SIZE), -1, dtype=np.int16), [])
    sizes: list[int] = []
    for size, name in items:
        sprite = _dress(rng, name, size)
        mask = np.asarray(sprite.getchannel("A")) > 100
        spot = _find_spot(rng, placed.owner, sizes, mask)
        if spot is None:
            continue
        x, y = spot
        canvas.paste(sprite, (x, y), sprite)
        window, part, box = _window(placed.owner, mask, x, y)
        window[part] = len(sizes)
        placed.kept.append((name, box))
        sizes.append(int(mask.sum()))
    return placed


def _window(
    owner: npt.NDArray[np.int16], mask: npt.NDArray[np.bool_], x: int, y: int
) -> tuple[npt.NDArray[np.int16], npt.NDArray[np.bool_], tuple[int, int, int, int]]:
    """The part of ``owner`` and of ``mask`` where a sprite at (x, y) lies inside the image, and its (x, y, w, h)."""
    height, width = mask.shape
    left, top = max(0, x), max(0, y)
    right, bottom = min(IMAGE_SIZE, x + width), min(IMAGE_SIZE, y + height)
    part = mask[top - y : bottom - y, left - x : right - x]
    return owner[top:bottom, left:right], part, (left, top, right - left, bottom - top)


def _find_spot(
    rng: random.Random, owner: npt.NDArray[np.int16], sizes: list[int], mask: npt.NDArray[np.bool_]
) -> tuple[int, int] | None:
    """The best of 10 random positions, or None if each would leave some object less than half visible."""
    height, width = mask.shape
    visible = np.bincount(owner.ravel() + 1, minlength=len(sizes) + 1)[1:]
    full = np.asarray(sizes, dtype=np.float64)
    best: tuple[int, int] | None = None
    best_overlap = 1.0
    for _ in range(10):
        x, y = rng.randint(-3, IMAGE_SIZE - width + 3), rng.randint(-3, IMAGE_SIZE - height + 3)
        window, part, _ = _window(owner, mask, x, y)
        hidden = np.bincount(window[part] + 1, minlength=len(sizes) + 1)[1:]
        inside = part.sum() / mask.sum()
        if inside < 0.75 or (len(sizes) and ((visible - hidden) / full).min() < _MIN_VISIBLE):
            continue
        overlap = float(hidden.sum() / mask.sum())
        if best is None or overlap < best_overlap:
            best, best_overlap = (x, y), overlap
        if overlap < 0.1:
            break
    return best


def _degrade(rng: random.Random, noise: np.random.Generator, canvas: Image.Image) -> npt.NDArray[np.uint8]:
    """Slight blur, sensor noise and exposure, so that seeing is not trivial."""
    if rng.random() < 0.5:
        canvas = canvas.filter(ImageFilter.GaussianBlur(rng.uniform(0, 0.9)))
    pixels = np.asarray(canvas).astype(np.float32)
    pixels += noise.standard_normal(pixels.shape, dtype=np.float32) * rng.uniform(3, 15)
    clipped: npt.NDArray[np.uint8] = np.clip(pixels * rng.uniform(0.7, 1.2), 0, 255).astype(np.uint8)
    return clipped


def _annotate(owner: npt.NDArray[np.int16], kept: list[Any]) -> tuple[Instance, ...]:
    areas = np.bincount(owner.ravel() + 1, minlength=len(kept) + 1)[1:]
    return tuple(Instance(name, box, int(area)) for (name, box), area in zip(kept, areas, strict=True))


def _patch_labels(owner: npt.NDArray[np.int16], kept: list[Any]) -> npt.NDArray[np.int16]:
    side = IMAGE_SIZE // GRID
    counts = np.stack([(owner == k).reshape(GRID, side, GRID, side).sum((1, 3)) for k in range(len(kept))])
    labels = np.asarray([INDEX[name] for name, _ in kept], dtype=np.int16)
    result: npt.NDArray[np.int16] = np.where(counts.max(0) >= side, labels[counts.argmax(0)], BACKGROUND)
    return result.astype(np.int16)
