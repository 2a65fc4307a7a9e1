"""MMHal-Bench's questions: 96 open questions of eight types (Sun et al. 2023, arXiv:2309.14525).

The file is ``response_template.json`` of the data set MMHal-Bench (Apache-2.0).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmfix.errors import DataError

from ...data.records import read_rows

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
        question: The question.
        reference: The answer of a human.
    """

    index: int
    type: str
    image_id: str
    image_content: tuple[str, ...]
    question: str
    reference: str


def load_mmhal(path: Path | str) -> list[MmhalItem]:
    """Read the template of MMHal-Bench, in file order; a filled-in ``model_answer`` is ignored.

    Raises:
        DataError: the file is missing or broken, an entry is incomplete or out of order, or a question occurs twice.
    """
    return read_items(read_rows(Path(path), what="MMHal-Bench file", remedy=_SOURCE))


def load_sources(path: Path | str) -> list[Any]:
    """The entries of the template as they are, in file order.

    Raises:
        DataError: the file is missing or broken.
    """
    return [row for _, row in read_rows(Path(path), what="MMHal-Bench file", remedy=_SOURCE)]


def read_items(rows: Iterable[tuple[str, Any]]) -> list[MmhalItem]:
    """Read questions from rows with the fields of the template, in its order, each with its place for messages.

    Raises:
        DataError: a row is incomplete or out of order, or a question occurs twice.
    """
    items: list[MmhalItem] = []
    seen: dict[tuple[str, str], int] = {}
    for number, (where, row) in enumerate(rows, 1):
        item = _item(row, number, where)
        first = seen.setdefault((item.image_id, item.question), number)
        if first != number:
            raise DataError(f"{where}: the same question as entry {first}: {_SOURCE}")
        items.append(item)
    return items


def _item(row: Any, number: int, where: str) -> MmhalItem:
    if not isinstance(row, dict) or not all(name in row for name in _FIELDS):
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
        question=str(row["question"]),
        reference=str(row["gt_answer"]),
    )
