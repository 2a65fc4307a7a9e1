"""NaturalBench's items, out of any of the forms that it is kept in: by groups, by items, or as ``test_set.json``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from vlmfix.errors import DataError
from vlmfix.files import read_json

from ...data.records import read_rows
from ...data.source import dataset_rows, find_file, find_image, is_dataset, own_image, text_field, whole_number
from .figures import OPTIONS, ORDER, SUFFIXES, NaturalItem, whole

Rows = Iterable[tuple[str, Mapping[str, Any]]]

NUMBER = "'Index', the number of the item"
"""What identifies an item, for messages."""


def item(number: int, kind: str, question: str, right: str, place: str, image: str = "") -> NaturalItem:
    """One item as a file has it.

    Args:
        number: Its place in the benchmark.
        kind: As in the file; ``mcq`` is ``multiple_choice``, and an empty one follows from the right answer.
        question: Perhaps with what is asked behind it.
        right: Yes, No, A or B.
        place: For messages.
        image: Name of the image.

    Raises:
        DataError: The kind or the right answer is another.
    """
    right = right.strip().lower()
    kind = "multiple_choice" if kind == "mcq" else kind or ("multiple_choice" if right in ("a", "b") else "yes_no")
    options = [option.lower() for option in OPTIONS.get(kind, ())]
    if right not in options:
        raise DataError(
            f"{place}: expected yes_no with Yes or No, or multiple_choice with A or B, found {kind}: {right}"
        )
    return NaturalItem(number, kind, bare(question), right == options[0], image)


def bare(question: str) -> str:
    """A question without what is asked behind it."""
    for suffix in SUFFIXES.values():
        question = question.strip().removesuffix(suffix)
    return question.strip()


def read_items(rows: Rows) -> Iterator[tuple[NaturalItem, Mapping[str, Any]]]:
    """The items of rows by groups (``Question_0``, ``Image_0_Question_0``) or by items (``Question``, ``Answer``).

    Returns:
        Each with ``{"image": ...}`` as the row has it.

    Raises:
        DataError: A row lacks a field.
    """
    for place, row in rows:
        number = whole_number(row.get("Index", row.get("index")), place, NUMBER)
        kind = str(row.get("Question_Type") or row.get("type") or "")
        if "Question_0" in row:
            for part, (question, image, _) in enumerate(ORDER):
                right = text_field(row, (f"Image_{image}_Question_{question}",), place)
                picture = row.get(f"Image_{image}")
                asked = text_field(row, (f"Question_{question}",), place)
                yield item(4 * number + part, kind, asked, right, place, _name(picture)), {"image": picture}
        else:
            asked, right = (text_field(row, (name, name.lower()), place) for name in ("Question", "Answer"))
            picture = row.get("Image", row.get("image"))
            yield item(number, kind, asked, right, place, _name(picture)), {"image": picture}


def _name(picture: Any) -> str:
    picture = picture.get("path") if isinstance(picture, Mapping) else picture
    return str(picture or "")


def _test_set(path: Path) -> list[NaturalItem]:
    rows = read_json(path, what="NaturalBench question file")
    if not isinstance(rows, list) or not all(isinstance(row, list) and len(row) == 4 for row in rows):
        raise DataError(f"{path}: expected a list of [question, image file, right answer, kind]")
    return [
        item(number, str(kind), str(question), str(right), f"{path} entry {number + 1}", str(image))
        for number, (question, image, right, kind) in enumerate(rows)
    ]


def read_questions(path: Path) -> list[NaturalItem]:
    """What answers are matched to: a file of rows of either form, or ``test_set.json``.

    Raises:
        DataError: The file is missing or broken, or does not hold whole groups.
    """
    lists = path.name.endswith("test_set.json")
    return checked(_test_set(path) if lists else [found for found, _ in read_items(read_rows(path))], str(path))


def checked(items: list[NaturalItem], what: str) -> list[NaturalItem]:
    """The items, if they are whole groups, each once.

    Raises:
        DataError: They are not.
    """
    groups = whole(items)
    if not items or {each.unit for each in items} != groups or len(items) != len(ORDER) * len(groups):
        raise DataError(f"{what}: expected whole groups of four items, each once")
    return items


def load_items(where: str) -> list[NaturalItem]:
    """The items with their images.

    Args:
        where: A folder with ``test_set.json`` and its images (beside it, or in ``images``); or a data set by groups or
            items.

    Raises:
        DataError: A file or an image is missing, or there are no whole groups.
    """
    if is_dataset(where):
        found = []
        for each, picture in read_items(dataset_rows(where)):
            path = own_image(picture, f"{where} item {each.number}")
            found.append(replace(each, image=each.image or path.name, path=path))
        return checked(found, where)
    folder = Path(where)
    items = _test_set(find_file(folder, ["test_set.json"], "questions of NaturalBench"))
    places = [folder, folder / "images"]
    found = [replace(each, path=find_image(places, [each.image], f"item {each.number}")) for each in items]
    return checked(found, where)
