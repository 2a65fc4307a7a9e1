"""Training scenes of the testbed as flat arrays on disk (used by ``train_testbed.py``)."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from vlmfix.evals.testbed.scenes import GRID, IMAGE_SIZE, INDEX, NAMES, image_id, make_scene

_CHUNK = 500


@dataclass(frozen=True)
class TrainingData:
    """The scenes of the training split.

    Attributes:
        images: uint8 ``(N, 96, 96, 3)``, memory-mapped.
        patches: int16 ``(N, 8, 8)`` category index per patch, 80 for background.
        kinds: int16 ``(N,)`` scene index.
        counts: uint8 ``(N, 80)`` instances per category.
    """

    images: npt.NDArray[np.uint8]
    patches: npt.NDArray[np.int16]
    kinds: npt.NDArray[np.int16]
    counts: npt.NDArray[np.uint8]

    def objects(self, row: int) -> dict[str, int]:
        """Object name to number of instances of one scene."""
        return {NAMES[c]: int(self.counts[row, c]) for c in np.flatnonzero(self.counts[row])}


_Chunk = tuple[npt.NDArray[np.uint8], npt.NDArray[np.int16], npt.NDArray[np.int16], npt.NDArray[np.uint8]]


def _chunk(start: int) -> _Chunk:
    images = np.empty((_CHUNK, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    patches = np.empty((_CHUNK, GRID, GRID), np.int16)
    kinds = np.empty(_CHUNK, np.int16)
    counts = np.zeros((_CHUNK, len(NAMES)), np.uint8)
    for row in range(_CHUNK):
        scene = make_scene(image_id("train", start + row))
        images[row], patches[row], kinds[row] = scene.pixels, scene.patches, scene.kind
        for name, count in scene.counts().items():
            counts[row, INDEX[name]] = count
    return images, patches, kinds, counts


def generate(folder: Path, num_images: int, workers: int) -> None:
    """Writes the first ``num_images`` (rounded up to 500) scenes of the training split, once."""
    if (folder / "counts.npy").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    total = -(-num_images // _CHUNK) * _CHUNK
    shape = (total, IMAGE_SIZE, IMAGE_SIZE, 3)
    images = np.lib.format.open_memmap(folder / "images.npy", mode="w+", dtype=np.uint8, shape=shape)
    rest: list[list[npt.NDArray[np.generic]]] = [[], [], []]
    with ProcessPoolExecutor(workers) as pool:
        for index, (pixels, *arrays) in enumerate(pool.map(_chunk, range(0, total, _CHUNK))):
            images[index * _CHUNK : (index + 1) * _CHUNK] = pixels
            for store, array in zip(rest, arrays, strict=True):
                store.append(array)
    images.flush()
    for name, store in zip(("patches", "kinds", "counts"), rest, strict=True):
        np.save(folder / f"{name}.npy", np.concatenate(store))


def load(folder: Path) -> TrainingData:
    """Opens what :func:`generate` wrote; images stay on disk."""
    images = np.load(folder / "images.npy", mmap_mode="r")
    return TrainingData(images, *(np.load(folder / f"{name}.npy") for name in ("patches", "kinds", "counts")))
