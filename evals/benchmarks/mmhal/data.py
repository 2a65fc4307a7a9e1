"""MMHal-Bench's questions: 96 open questions of eight types (Sun et al. 2023, arXiv:2309.14525).

The file is ``response_template.json`` of the data set MMHal-Bench (Apache-2.0).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vlmfix.errors import DataError

from ...data.records import read_rows
from ...data.source import dataset_rows, find_file, find_image, is_dataset, row_image

#: The types in the official order; an item's type is its index modulo eight.
TYPES = ("attribute", "adversarial", "comparison", "counting", "relation", "environment", "holistic", "other")

_FIELDS = ("question_type", "image_id", "image_content", "question", "gt_answer")

_SOURCE = "download response_template.json of MMHal-Bench"


@dataclass(frozen=True)
class MmhalItem:
    """One question.

    Attributes:
        index: Its place in the template, from 0.
        type: One of :data:`TYPES`.
        image_id: OpenImages id of the image.
        image_content: What is in the image.
        text: The question.
        reference: The answer of a human.
        row: Its entry of the template, without the image's bytes.
        path: The image's file; None where only answers are scored.
    """

    index: int
    type: str
    image_id: str
    image_content: tuple[str, ...]
    text: str
    reference: str
    row: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)
    path: Path | None = None

    @property
    def split(self) -> str:
        """Its type."""
        return self.type

    @property
    def unit(self) -> str:
        """The question itself: each has an image of its own."""
        return f"{self.index:04d}"

    @property
    def picture(self) -> str:
        """The image's id."""
        return self.image_id

    @property
    def identity(self) -> list[Any]:
        """Index, image and question."""
        return [self.index, self.image_id, self.text]


def load_mmhal(path: Path) -> list[MmhalItem]:
    """Read the template of MMHal-Bench, in file order; a filled-in ``model_answer`` is ignored.

    Raises:
        DataError: the file is missing or broken, an entry is incomplete or out of order, or a question occurs twice.
    """
    return _read_items(read_rows(path, what="MMHal-Bench file", remedy=_SOURCE))


def load_items(where: str) -> list[MmhalItem]:
    """Read the questions and find their images.

    Args:
        where: A folder with ``response_template.json`` and the images, under their OpenImages id or the name in their
            address, also below ``images``; or a data set with the template's fields and an image, in its order.

    Raises:
        DataError: A file is missing or broken, or an image is missing.
    """
    found = []
    if is_dataset(where):
        rows = list(dataset_rows(where))
        for item, (place, row) in zip(_read_items(rows), rows, strict=True):
            if (path := row_image(row, place)) is None:
                raise DataError(f"{place}: expected an image")
            found.append(replace(item, path=path))
        return found
    folder = Path(where)
    for item in load_mmhal(find_file(folder, ["response_template.json"], "questions")):
        names = [f"{item.image_id}{suffix}" for suffix in (".jpg", ".png")]
        names.append(str(item.row.get("image_src", item.image_id)).rpartition("/")[2])
        path = find_image([folder / "images", folder], names, f"question {item.index}")
        found.append(replace(item, path=path))
    return found


def _read_items(rows: Iterable[tuple[str, Mapping[str, Any]]]) -> list[MmhalItem]:
    items: list[MmhalItem] = []
    seen: dict[tuple[str, str], int] = {}
    for number, (where, row) in enumerate(rows, 1):
        item = _item(row, number, where)
        first = seen.setdefault((item.image_id, item.text), number)
        if first != number:
            raise DataError(f"{where}: the same question as entry {first}: {_SOURCE}")
        items.append(item)
    return items


def _item(row: Mapping[str, Any], number: int, where: str) -> MmhalItem:
    if not all(name in row for name in _FIELDS):
        raise DataError(f"{where}: expected an object with {', '.join(_FIELDS)}, found {str(row)[:60]!r}: {_SOURCE}")
    kind = TYPES[(number - 1) % len(TYPES)]
    if row["question_type"] != kind:
        raise DataError(
            f"{where}: expected a question of type {kind!r}, found {row['question_type']!r}; the order of the template "
            "gives the types: leave it as released"
        )
    if not isinstance(row["image_content"], list):
        raise DataError(f"{where}: expected image_content to be a list, found {row['image_content']!r}")
    return MmhalItem(
        index=number - 1,
        type=kind,
        image_id=str(row["image_id"]),
        image_content=tuple(str(name) for name in row["image_content"]),
        text=str(row["question"]),
        reference=str(row["gt_answer"]),
        row={name: value for name, value in row.items() if name != "image"},
    )
