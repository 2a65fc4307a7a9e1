"""CHAIR's ground truth for scoring files: rebuilt from a COCO folder, or read from a file that somebody made.

Two matchers make two ground truths, and captions are matched by one of them:

====== ================ =================
mode   captions         ground truth
====== ================ =================
original original       original
nltk   nltk             nltk
mixed  nltk             original
====== ================ =================

``mixed`` is what OPERA's table was made with. A file is JSON (plain or gzipped) in one of these forms, each with an
optional ``"mode": "original"`` or ``"nltk"`` beside ``objects``::

    {"categories": ["airplane", ...], "objects": {"139": [14, 15], ...}}    places in the list of categories
    {"objects": {"139": ["book", "chair"], ...}}                            names
    {"139": ["book", "chair"], ...}                                         names
    {"image_id": 139, "objects": ["book", "chair"]}                         JSON lines of names
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from vlmfix.errors import DataError
from vlmfix.files import parse_json, read_text

from ...data.coco import CocoData
from ...data.records import image_id_of, parse_image_id, read_rows
from ..coco_objects import ChairMatcher, ChairMode, ground_truth, objects_by_word

ScoringMode = Literal["original", "nltk", "mixed"]

MODES: tuple[ScoringMode, ...] = get_args(ScoringMode)

_WHAT = "ground-truth file"

_REMEDY = 'write {"mode": "nltk", "objects": {"139": ["book", "chair"]}}, or give a COCO folder'

_HINTS: Mapping[str, ChairMode] = {"nltk": "nltk", "pattern": "original", "original": "original"}


@dataclass(frozen=True)
class GroundTruth:
    """The objects in some images.

    Attributes:
        objects: Image id -> objects.
        mode: The matcher that found the objects of the reference captions.
        source: Where it comes from and how its mode is known, for the reader.
    """

    objects: Mapping[int, frozenset[str]] = field(repr=False)
    mode: ChairMode
    source: str


def caption_mode(mode: ScoringMode) -> ChairMode:
    """The matcher of the captions."""
    return "original" if mode == "original" else "nltk"


def truth_mode(mode: ScoringMode) -> ChairMode:
    """The matcher of the ground truth."""
    return "nltk" if mode == "nltk" else "original"


def load_ground_truth(path: Path, image_ids: Iterable[int], mode: ScoringMode) -> GroundTruth:
    """Read or rebuild the ground truth of some images.

    Args:
        path: A COCO folder, or a file in one of the module's forms.
        image_ids: The images.
        mode: What the file must be good for. Where it says its mode (under ``"mode"``, or by "nltk", "pattern" or
            "original" in its name), that must fit; where it does not, the mode is taken to fit, and ``source`` says so.

    Raises:
        DataError: The file or folder is missing or broken, was made in another mode, has an object that CHAIR does not
            know, or lacks an image.
    """
    wanted = truth_mode(mode)
    if path.is_dir():
        matcher = ChairMatcher(wanted)
        data = CocoData.load(path)
        return GroundTruth(ground_truth(data, image_ids, matcher), wanted, f"rebuilt from {path} with {wanted}")
    listed, categories, said = _read(path)
    hints = {_HINTS[word] for word in re.split(r"[^a-z]+", path.name.lower()) if word in _HINTS}
    if said is not None and said not in get_args(ChairMode):
        raise DataError(f'{_WHAT} {path}: expected the mode original or nltk, found {said!r}: correct "mode"')
    found = said or (next(iter(hints)) if len(hints) == 1 else None)
    if found is not None and found != wanted:
        how = "says" if said else "says by its name"
        fit = "--mode nltk" if found == "nltk" else "--mode original (or --mode mixed, as in OPERA's table)"
        raise DataError(
            f"{_WHAT} {path} {how} that it was made with {found}, and mode {mode} needs {wanted}: type {fit}, or give "
            "a COCO folder"
        )
    known = "" if said else ", by its name" if found else "; the file does not say its mode, and is taken to be that"
    objects = {i: _names(listed, i, categories, path) for i in image_ids}
    return GroundTruth(objects, wanted, f"{path}, {wanted}{known}")


def _read(path: Path) -> tuple[Mapping[int, Any], Sequence[str] | None, str | None]:
    """The objects by image id, the list of categories if objects are places in it, and the mode."""
    text = read_text(path, what=_WHAT, remedy=_REMEDY)
    lines = [line for line in text.split("\n", 2) if line.strip()]
    if not lines:
        raise DataError(f"{_WHAT} {path} is empty: {_REMEDY}")
    if '"image_id"' in lines[0] and '"objects"' in lines[0]:
        return _from_lines(path), None, None
    value = parse_json(text, path, _WHAT, _REMEDY)
    if isinstance(value, dict) and "annotations" in value:
        raise DataError(f"{path} is an annotation file of COCO: give its folder, {path.parent}, with both files in it")
    if not isinstance(value, dict) or not value:
        raise DataError(f"{_WHAT} {path}: expected an object of image ids, found {str(value)[:40]!r}: {_REMEDY}")
    objects = value.get("objects", {} if "categories" in value else value)
    categories = value.get("categories")
    if not isinstance(objects, dict) or not (categories is None or isinstance(categories, list)):
        raise DataError(f"{_WHAT} {path}: expected an object under 'objects', a list under 'categories': {_REMEDY}")
    unknown = [name for name in categories or () if name not in set(objects_by_word().values())]
    if unknown:
        raise DataError(
            f"{_WHAT} {path}: the category {unknown[0]!r} is none of COCO's 80, which CHAIR covers: {_REMEDY}"
        )
    return _by_id(objects, path), categories, value.get("mode") if "objects" in value else None


def _from_lines(path: Path) -> dict[int, Any]:
    objects: dict[int, Any] = {}
    for where, row in read_rows(path, what=_WHAT, remedy=_REMEDY):
        image_id = image_id_of(row, where)
        if image_id in objects:
            raise DataError(f"{where}: image {image_id} is listed already: keep only one of these lines")
        objects[image_id] = row.get("objects")
    return objects


def _by_id(objects: Mapping[str, Any], path: Path) -> dict[int, Any]:
    where = f"{_WHAT} {path}"
    return {int(key) if key.isdecimal() else parse_image_id(key, where): value for key, value in objects.items()}


def _names(objects: Mapping[int, Any], image_id: int, categories: Sequence[str] | None, path: Path) -> frozenset[str]:
    if image_id not in objects:
        raise DataError(
            f"{_WHAT} {path} has no image {image_id} ({len(objects)} others): leave its caption out, or add the image"
        )
    entries, where = objects[image_id], f"{_WHAT} {path}, image {image_id}"
    if not isinstance(entries, list):
        raise DataError(f"{where}: expected a list of objects, found {str(entries)[:40]!r}: {_REMEDY}")
    known = set(objects_by_word().values())
    names = set()
    for entry in entries:
        if categories is not None and type(entry) is int and 0 <= entry < len(categories):
            names.add(categories[entry])
        elif isinstance(entry, str) and entry in known:
            names.add(entry)
        else:
            raise DataError(f"{where}: {entry!r} is none of the 80 objects of CHAIR: write their COCO names")
    return frozenset(names)
