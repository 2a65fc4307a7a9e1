"""Writes the scenes of a split as a COCO folder, once, atomically and deterministically."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import tempfile
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image

from vlmfix.errors import DataError

from .captions import reference_captions
from .scenes import IMAGE_SIZE, RenderedScene, Split, image_id, make_scene
from .vocabulary import CATEGORIES, CATEGORY_IDS

__all__ = ["default_cache_dir", "file_name", "generator_version", "prepare"]


_SOURCES = ("atlas.json", "atlas.png", "captions.py", "export.py", "scenes.py", "sprites.py", "vocabulary.py")


def default_cache_dir() -> Path:
    """``$VLMFIX_CACHE/testbed``, else ``$XDG_CACHE_HOME/vlmfix/testbed``, else ``~/.cache/vlmfix/testbed``."""
    if own := os.environ.get("VLMFIX_CACHE"):
        return Path(own).expanduser() / "testbed"
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared).expanduser() if shared else Path.home() / ".cache") / "vlmfix" / "testbed"


@lru_cache(maxsize=1)
def generator_version() -> str:
    """Ten hexadecimal digits over the generator's sources and atlas: a changed generator never meets old scenes."""
    digest = hashlib.sha256()
    for name in _SOURCES:
        content = (Path(__file__).parent / name).read_bytes()
        digest.update(content if name.endswith(".png") else content.replace(b"\r\n", b"\n"))
    return digest.hexdigest()[:10]


def file_name(number: int) -> str:
    """The image file of an id, in COCO's form."""
    return f"COCO_val2014_{number:012d}.png"


def prepare(split: Split, num_images: int, cache_dir: Path | None = None) -> Path:
    """Writes the first ``num_images`` scenes of a split in COCO format, unless they are there already.

    The folder holds ``instances_val2014.json``, ``captions_val2014.json`` and ``val2014/COCO_val2014_*.png``. It is
    written beside its place and renamed at the end, so an interrupted call leaves no half-written folder, and its name
    carries split, number and :func:`generator_version`. 500 scenes take about three seconds.

    Args:
        split: ``"train"``, ``"calibration"``, ``"heldout"`` or ``"heldout2"``; ids of different splits never meet.
        num_images: At least 1.
        cache_dir: Where to put the folder; default :func:`default_cache_dir`.

    Returns:
        The folder.

    Raises:
        DataError: If the split or the number is not valid, or the folder cannot be written.
    """
    if num_images < 1:
        raise DataError(f"expected num_images >= 1, found {num_images}")
    ids = [image_id(split, index) for index in (0, num_images - 1)]
    root = Path(cache_dir) if cache_dir is not None else default_cache_dir()
    target = root / f"{split}-{num_images}-{generator_version()}"
    if target.is_dir():
        return target
    try:
        root.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=root))
    except OSError as error:
        raise DataError(f"cannot write testbed scenes below {root}: {error}. Set VLMFIX_CACHE to a folder") from error
    try:
        _write(partial, [make_scene(number) for number in range(ids[0], ids[1] + 1)])
        partial.chmod(0o755)
        try:
            partial.rename(target)
        except OSError:
            if not target.is_dir():  # else another process was faster and wrote the same scenes
                raise
    except OSError as error:
        raise DataError(f"cannot write testbed scenes to {target}: {error}. Set VLMFIX_CACHE to a folder") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def _write(folder: Path, scenes: list[RenderedScene]) -> None:
    images = folder / "val2014"
    images.mkdir()
    for scene in scenes:
        Image.fromarray(scene.pixels).save(images / file_name(scene.image_id), compress_level=1)
    common: dict[str, Any] = {
        "info": {"description": "vlmfix testbed: procedural scenes", "version": generator_version(), "year": 2025},
        "licenses": [{"id": 1, "name": "SIL Open Font License 1.1 (sprites)", "url": "https://openfontlicense.org"}],
        "images": [
            {
                "id": scene.image_id,
                "file_name": file_name(scene.image_id),
                "width": IMAGE_SIZE,
                "height": IMAGE_SIZE,
                "license": 1,
            }
            for scene in scenes
        ],
    }
    categories = [{"id": number, "name": name, "supercategory": group} for number, name, group in CATEGORIES]
    instances = common | {"annotations": list(_instances(scenes)), "categories": categories}
    captions = common | {"annotations": list(_captions(scenes))}
    (folder / "instances_val2014.json").write_text(json.dumps(instances), encoding="utf-8")
    (folder / "captions_val2014.json").write_text(json.dumps(captions), encoding="utf-8")


def _instances(scenes: list[RenderedScene]) -> Iterator[dict[str, Any]]:
    for scene in scenes:
        for order, instance in enumerate(scene.instances):
            x, y, width, height = instance.bbox
            yield {
                "id": scene.image_id * 100 + order,
                "image_id": scene.image_id,
                "category_id": CATEGORY_IDS[instance.name],
                "bbox": list(instance.bbox),
                "area": instance.area,
                "iscrowd": 0,
                # The outline is not kept: the polygon is the box.
                "segmentation": [[x, y, x + width, y, x + width, y + height, x, y + height]],
            }


def _captions(scenes: list[RenderedScene]) -> Iterator[dict[str, Any]]:
    for scene in scenes:
        texts = reference_captions(scene.kind, scene.counts(), random.Random(f"captions {scene.image_id}"))
        for order, text in enumerate(texts):
            yield {"id": scene.image_id * 10 + order, "image_id": scene.image_id, "caption": text}
