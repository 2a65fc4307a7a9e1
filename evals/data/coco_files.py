"""The annotation files of a COCO folder: found, read through pycocotools, and checked for the ways they are broken."""

import contextlib
import io
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pycocotools.coco import COCO

from vlmfix.errors import DataError
from vlmfix.textfiles import read_json

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
    for image_id, annotations in coco.imgToAnns.items():
        broken = next((a for a in annotations if a["category_id"] not in names), None)
        if image_id not in files or broken is not None:
            what = f"image {image_id}" if broken is None else f"category {broken['category_id']}"
            which = (broken or annotations[0])["id"]
            raise DataError(
                f"annotation file {path} annotates {what} (annotation {which}), which it does not list: download it "
                "again, or list it"
            )
        objects[image_id] = frozenset(names[a["category_id"]] for a in annotations)
    return objects
