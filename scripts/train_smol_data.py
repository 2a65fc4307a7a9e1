"""Training scenes of ``smol``, drawn once: the vision tower's features, and what each scene shows."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from vlmfix.evals.testbed.scenes import GRID, IMAGE_SIZE, image_id, make_scene
from vlmfix.evals.testbed.smol.facts import Thing, name_colours, things

_CHUNK = 64
_PATCHES = GRID * GRID


@dataclass(frozen=True)
class Scenes:
    """Training scenes.

    Attributes:
        features: float16 ``(N, 64, width)``, last hidden state of the tower without the class token.
        patches: int16 ``(N, 64)``, category index of each patch, 80 for background.
        colours: int8 ``(N, 64)``, most frequent colour word of each patch (see :func:`name_colours`).
        kinds: Scene index per scene.
        things: What each scene shows.
    """

    features: npt.NDArray[np.float16]
    patches: npt.NDArray[np.int16]
    colours: npt.NDArray[np.int8]
    kinds: list[int]
    things: list[tuple[Thing, ...]]

    def __len__(self) -> int:
        return len(self.kinds)


def tower_features(tower: nn.Module, pixels: npt.NDArray[np.uint8]) -> torch.Tensor:
    """Features ``[B, 64, width]`` of pictures ``(B, 96, 96, 3)``, as the testbed's image processor would feed them."""
    normalised = (torch.from_numpy(pixels).permute(0, 3, 1, 2).float() - 127.5) * (4 / 255)
    with torch.no_grad():
        hidden: torch.Tensor = tower(normalised, output_hidden_states=True).hidden_states[-1]
    return hidden[:, 1:]


def _patch_colours(pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.int8]:
    side = IMAGE_SIZE // GRID
    mean = pixels.reshape(GRID, side, GRID, side, 3).mean((1, 3))
    return name_colours(mean.astype(np.uint8)).reshape(-1).astype(np.int8)


def load_scenes(folder: Path, count: int, tower: nn.Module) -> Scenes:
    """Open the first ``count`` scenes of the training split; draw them if the folder does not hold them (9 ms each)."""
    if not (folder / "facts.jsonl").exists():
        _draw(folder, count, tower)
    arrays = [np.load(folder / f"{name}.npy", mmap_mode="r")[:count] for name in ("features", "patches", "colours")]
    kinds, found = [], []
    with (folder / "facts.jsonl").open(encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            kinds.append(row["kind"])
            found.append(tuple(Thing(**thing) for thing in row["things"]))
    if len(kinds) < count:
        raise SystemExit(f"{folder} holds {len(kinds)} scenes, {count} are wanted: remove the folder to draw them anew")
    return Scenes(*arrays, kinds[:count], found[:count])


def _draw(folder: Path, count: int, tower: nn.Module) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    features, patches, colours, lines = [], [], [], []
    for start in range(0, count, _CHUNK):
        scenes = [make_scene(image_id("train", index)) for index in range(start, min(count, start + _CHUNK))]
        features.append(tower_features(tower, np.stack([scene.pixels for scene in scenes])).numpy().astype(np.float16))
        patches.append(np.stack([scene.patches.reshape(_PATCHES) for scene in scenes]))
        colours.append(np.stack([_patch_colours(scene.pixels) for scene in scenes]))
        for scene in scenes:
            lines.append(json.dumps({"kind": scene.kind, "things": [asdict(thing) for thing in things(scene)]}))
    for name, chunks in (("features", features), ("patches", patches), ("colours", colours)):
        np.save(folder / f"{name}.npy", np.concatenate(chunks))
    # Last: its presence says that the folder is complete.
    (folder / "facts.partial").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "facts.partial").replace(folder / "facts.jsonl")
