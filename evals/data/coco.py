"""COCO folders: images, instance annotations and reference captions.

Accepted layouts, for a split such as ``val2014`` or ``val2017``::

    DIR/annotations/instances_val2014.json   or   DIR/instances_val2014.json
    DIR/annotations/captions_val2014.json    or   DIR/captions_val2014.json
    DIR/val2014/*.jpg   or   DIR/images/val2014/*.jpg   or   DIR/images/*.jpg

An image's file name is the one its annotation gives, below the image folder.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import logging
import os
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image
from pycocotools.coco import COCO

from vlmfix.errors import DataError
from vlmfix.files import read_json

_LOGGER = logging.getLogger("vlmfix.evals.data.coco")


def find_annotations(root: Path, split: str) -> tuple[Path, str]:
    """The folder of the annotation files and the split to read there.

    Raises:
        DataError: There is no such folder, or none of its annotation files is meant for sure.
    """
    if not root.is_dir():
        raise DataError(
            f"there is no folder {root}: give the COCO folder, with annotations/instances_{split}.json and {split}/"
        )
    folders = [folder for folder in (root / "annotations", root) if folder.is_dir()]
    for folder in folders:
        if (folder / f"instances_{split}.json").is_file():
            return folder, split
    found = [
        (folder, path.stem.removeprefix("instances_"))
        for folder in folders
        for path in sorted(folder.glob("instances_*.json"))
    ]
    if len(found) > 1:
        found = [pair for pair in found if pair[1].startswith("val")] or found
    if len(found) == 1:
        _LOGGER.info("no instances_%s.json in %s: reading split %s", split, root, found[0][1])
        return found[0]
    if found:
        names = ", ".join(name for _, name in found)
        raise DataError(
            f"{root} has no instances_{split}.json but the splits {names}: choose one of them with split=..."
        )
    raise DataError(
        f"{root} has no instances_{split}.json, neither directly nor in annotations/: give the COCO folder that holds "
        f"annotations/instances_{split}.json, annotations/captions_{split}.json and {split}/"
    )


def find_images(root: Path, split: str) -> Path:
    """The image folder; the first place to look if there is none, since scoring stored captions needs no images."""
    candidates = (root / split, root / "images" / split, root / "images")
    return next((folder for folder in candidates if folder.is_dir()), candidates[0])


def read_instances(path: Path) -> tuple[dict[int, str], dict[int, frozenset[str]]]:
    """The images of an instances file by id: their file names, and the names of the categories annotated in them.

    Raises:
        DataError: The file is missing, empty, corrupt, uses an id twice, or annotates what it does not list.
    """
    coco = _read(path, ("images", "annotations", "categories"))
    files = {_integer(i, path): _text(image, "file_name", path) for i, image in coco.imgs.items()}
    return files, _objects_by_image(coco, files, path)


def read_captions(path: Path) -> dict[int, tuple[str, ...]]:
    """The captions of a captions file by image, in the order of the file; errors as of :func:`read_instances`."""
    coco = _read(path, ("annotations",))
    return {i: tuple(_text(a, "caption", path) for a in annotations) for i, annotations in coco.imgToAnns.items()}


def _read(path: Path, keys: Sequence[str]) -> Any:
    """An indexed pycocotools object of one annotation file, checked for the ways such files are broken."""
    data = read_json(path, what="annotation file", remedy="download it again and unpack it there")
    for key in keys:
        rows = data.get(key) if isinstance(data, dict) else None
        if not isinstance(rows, list) or not rows:
            raise DataError(
                f"annotation file {path} has no entries under {key!r}: it is no complete COCO annotation file, "
                "download it again"
            )
        ids = {str(_value(row, "id", path)) for row in rows}
        if len(ids) < len(rows):
            raise DataError(
                f"annotation file {path} uses {len(rows) - len(ids)} ids twice under {key!r}: download it again, "
                "or make the ids unique"
            )
    coco = COCO()
    coco.dataset = data
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # pycocotools reports its progress with print
            coco.createIndex()
    except KeyError as error:
        raise DataError(f"annotation file {path} has an annotation without {error}: download it again") from error
    except TypeError as error:  # An id that is a list or an object.
        raise DataError(f"annotation file {path} has an id of a wrong type ({error}): download it again") from error
    return coco


def _integer(value: Any, path: Path) -> int:
    if type(value) is not int:
        raise DataError(f"annotation file {path} has the image id {value!r}: expected an integer, download it again")
    return value


def _value(row: Any, key: str, path: Path) -> Any:
    try:
        return row[key]
    except (KeyError, TypeError):
        raise DataError(
            f"annotation file {path} has an entry without {key!r} ({str(row)[:80]}): download it again"
        ) from None


def _text(row: Any, key: str, path: Path) -> str:
    value = _value(row, key, path)
    if not isinstance(value, str):
        raise DataError(
            f"annotation file {path}, entry with id {row.get('id')}: expected text under {key!r}, found "
            f"{str(value)[:40]!r}: download it again"
        )
    return value


def _objects_by_image(coco: Any, files: Mapping[int, str], path: Path) -> dict[int, frozenset[str]]:
    names = {i: _text(category, "name", path) for i, category in coco.cats.items()}
    objects: dict[int, frozenset[str]] = {}
    for image_id, instances in coco.imgToAnns.items():
        broken = next((a for a in instances if a["category_id"] not in names), None)
        if image_id not in files or broken is not None:
            what = f"image {image_id}" if broken is None else f"category {broken['category_id']}"
            which = (broken or instances[0])["id"]
            raise DataError(
                f"annotation file {path} annotates {what} (annotation {which}), which it does not list: download it "
                "again, or list it"
            )
        objects[image_id] = frozenset(names[a["category_id"]] for a in instances)
    return objects


@dataclass(frozen=True)
class ImageRecord:
    """One image of a COCO folder.

    Attributes:
        image_id: Its id in the annotations.
        file_name: Its file name in the annotations.
        path: The file.
    """

    image_id: int
    file_name: str
    path: Path


def load_image(path: Path) -> Image.Image:
    """Read an image as RGB.

    Raises:
        DataError: the file is missing, or no image can be decoded from it (truncated download, not an image).
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except FileNotFoundError as error:
        raise DataError(f"there is no image file {path}: download it, or leave its id out") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(
            f"{path} cannot be read as an image ({error}): download it again, or leave its id out"
        ) from error


@dataclass(frozen=True, eq=False)
class CocoData:
    """Images and annotations of one split; make it with :meth:`load`.

    Attributes:
        split: Name of the split that was read ("val2014", "sample", ...).
        image_dir: Folder of the images.
        image_ids: All annotated image ids, sorted.
        source: The file of the instance annotations, for messages.
    """

    split: str
    image_dir: Path
    image_ids: tuple[int, ...]
    source: Path
    _files: Mapping[int, str] = field(repr=False)
    _objects: Mapping[int, frozenset[str]] = field(repr=False)
    _captions: Mapping[int, tuple[str, ...]] | None = field(repr=False)

    @classmethod
    def load(cls, data_dir: Path | str, *, split: str = "val2014", captions: bool = True) -> CocoData:
        """Read the annotations of one split (a few seconds for val2014; image files are not opened).

        Args:
            data_dir: The COCO folder, see the module's layouts.
            split: Suffix of the annotation files. If the folder has no files of that split but those of exactly one
                other (or of exactly one that starts with "val"), that one is read and logged.
            captions: Also read the reference captions, which CHAIR's ground truth needs.

        Raises:
            DataError: the folder or an annotation file is missing, empty, corrupt, or uses an id twice; the message
                names the file. Missing images are found by :meth:`image` and :meth:`select`.
        """
        root = Path(data_dir)
        annotation_dir, split = find_annotations(root, split)
        image_dir = find_images(root, split)
        path = annotation_dir / f"instances_{split}.json"
        files, objects = read_instances(path)
        texts = read_captions(annotation_dir / f"captions_{split}.json") if captions else None
        return cls(split, image_dir, tuple(sorted(files)), path, files, objects, texts)

    def image(self, image_id: int) -> ImageRecord:
        """The image of an id.

        Raises:
            DataError: the id is not annotated, or its file is missing.
        """
        name = self._files[self._known(image_id)]
        path = self.image_dir / name
        if not path.is_file():
            raise DataError(
                f"image {image_id} is annotated, but its file {path} is missing: download it, leave the id "
                f"out, or check that {self.image_dir} is the image folder of {self.split}"
            )
        return ImageRecord(image_id, name, path)

    def objects(self, image_id: int) -> frozenset[str]:
        """Category names of all instance annotations of an image, crowds included; empty if nothing is annotated in it.

        Raises:
            DataError: the id is not in the annotation file.
        """
        return self._objects.get(self._known(image_id), frozenset())

    def captions(self, image_id: int) -> tuple[str, ...]:
        """The reference captions of an image, in the order of the file.

        Raises:
            DataError: captions were not loaded, or the image has none.
        """
        if self._captions is None:
            raise DataError("captions were not loaded: use CocoData.load(..., captions=True)")
        texts = self._captions.get(self._known(image_id), ())
        if not texts:
            raise DataError(
                f"image {image_id} has no reference caption in captions_{self.split}.json, so its ground truth "
                "is incomplete: leave its id out"
            )
        return texts

    def present_ids(self) -> tuple[int, ...]:
        """The annotated image ids whose file exists, sorted."""
        on_disk = _files_below(self.image_dir, self._files.values())
        return tuple(i for i in self.image_ids if self._files[i] in on_disk)

    def select(self, *, ids: Sequence[int] | None = None, limit: int | None = None, seed: int = 0) -> list[int]:
        """Choose the images of an evaluation: ``random.Random(seed).sample(sorted(ids), limit)``.

        Args:
            ids: Choose among these. Default: all annotated images whose file exists; a warning is logged if some are
                missing.
            limit: How many; all of them, sorted, if None or not fewer than there are.
            seed: Of the choice.

        Raises:
            DataError: an id is not annotated or given twice, there is nothing to choose from, or ``limit`` is below 1.
        """
        if limit is not None and limit < 1:
            raise DataError(f"the number of images must be at least 1, not {limit}")
        pool = self._pool() if ids is None else self._checked(ids)
        if limit is None or limit >= len(pool):
            return pool
        return random.Random(seed).sample(pool, limit)

    def _pool(self) -> list[int]:
        present = self.present_ids()
        if not present:
            raise DataError(
                f"none of the {len(self.image_ids)} images of instances_{self.split}.json is in {self.image_dir} "
                f"(expected for example {self._files[self.image_ids[0]]}): is this the right folder?"
            )
        if len(present) < len(self.image_ids):
            _LOGGER.warning(
                "%d of %d annotated images are in %s; choosing among these",
                len(present),
                len(self.image_ids),
                self.image_dir,
            )
        return list(present)

    def _checked(self, ids: Sequence[int]) -> list[int]:
        if not ids:
            raise DataError("the list of image ids is empty: give at least one id")
        chosen = sorted(self._known(i) for i in ids)
        twice = [a for a, b in itertools.pairwise(chosen) if a == b]
        if twice:
            raise DataError(f"image id {twice[0]} is given twice: remove the duplicates ({len(twice)} in all)")
        return chosen

    def _known(self, image_id: int) -> int:
        if image_id not in self._files:
            raise DataError(
                f"image id {image_id} is not annotated in instances_{self.split}.json ({len(self._files)} images, "
                f"for example {self.image_ids[0]}): check the id list and the split"
            )
        return image_id


def _files_below(folder: Path, names: Iterable[str]) -> set[str]:
    """Which of the relative names exist: one listing per folder instead of one call per file."""
    listings: dict[str, set[str]] = {}
    found = set()
    for name in names:
        parent, base = os.path.split(name)
        if parent not in listings:
            directory = folder / parent
            listings[parent] = set(os.listdir(directory)) if directory.is_dir() else set()
        if base in listings[parent]:
            found.add(name)
    return found
