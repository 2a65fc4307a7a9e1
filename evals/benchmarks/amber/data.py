"""AMBER's annotations: what is in each image, and the right answers (Wang et al. 2023, arXiv:2311.07397).

The folder is ``data/`` of junyangwang0410/AMBER (Apache-2.0): ``annotations.json``, ``relation.json`` and
``safe_words.txt``, each also read with ``.gz`` behind its name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

from vlmfix import files as textfiles
from vlmfix.errors import DataError

AmberTask = Literal["generative", "existence", "state", "number", "action", "relation"]

TASKS: tuple[AmberTask, ...] = get_args(AmberTask)

_REMEDY = (
    "give the folder data/ of junyangwang0410/AMBER, with annotations.json, relation.json and safe_words.txt as they "
    "were released"
)

_TASK_OF_TYPE: Mapping[str, AmberTask] = {
    "generative": "generative",
    "discriminative-hallucination": "existence",
    "discriminative-attribute-state": "state",
    "discriminative-attribute-number": "number",
    "discriminative-attribute-action": "action",
    "discriminative-relation": "relation",
    "relation": "relation",
}


@dataclass(frozen=True)
class AmberItem:
    """One item: an image to describe, or a yes/no question.

    Attributes:
        id: AMBER's id, from 1.
        task: "generative", or the dimension of the question.
        truth: The objects in the image; empty for questions.
        hallucination: Objects that a model may well invent for the image; empty for questions.
        label: Whether yes is right; None for generative items.
    """

    id: int
    task: AmberTask
    truth: tuple[str, ...] = ()
    hallucination: tuple[str, ...] = ()
    label: bool | None = None


@dataclass(frozen=True)
class AmberData:
    """The annotations of AMBER.

    Attributes:
        items: Id -> item.
        association: Object -> words that count as it.
        safe_words: Words that are never a hallucination.
    """

    items: Mapping[int, AmberItem]
    association: Mapping[str, tuple[str, ...]] = field(repr=False)
    safe_words: frozenset[str] = field(repr=False)

    @cached_property
    def vocabulary(self) -> frozenset[str]:
        """The words that count as objects: the keys and values of ``association``."""
        return frozenset(self.association).union(*self.association.values())


def load_amber(folder: Path | str) -> AmberData:
    """Read AMBER's annotation folder.

    Raises:
        DataError: a file is missing or broken, an id occurs twice, or an object has no row in ``relation.json``. The
            message names file and entry.
    """
    root = Path(folder)
    association = _association(root / "relation.json")
    path = root / "annotations.json"
    rows = read_json(path)
    if not isinstance(rows, list) or not rows:
        raise DataError(f"{path}: expected a JSON list of AMBER items: download it again from junyangwang0410/AMBER")
    items: dict[int, AmberItem] = {}
    for number, row in enumerate(rows, 1):
        item = _item(row, f"{path} entry {number}")
        if item.id in items:
            raise DataError(f"{path} entry {number}: id {item.id} occurs twice: make the ids unique")
        unknown = [name for name in (*item.truth, *item.hallucination) if name not in association]
        if unknown:
            raise DataError(
                f"{path} entry {number}: {unknown[0]!r} has no row in relation.json: take both files from one release"
            )
        items[item.id] = item
    safe = textfiles.read_text(_packed(root / "safe_words.txt"), what="AMBER file", remedy=_REMEDY)
    return AmberData(items, association, frozenset(safe.splitlines()) - {""})


def _association(path: Path) -> dict[str, tuple[str, ...]]:
    raw = read_json(path)
    if not isinstance(raw, dict) or not all(_is_words(words) for words in raw.values()):
        raise DataError(f"{path}: expected an object that maps each word to a list of words")
    return {name: tuple(words) for name, words in raw.items()}


def _item(row: Any, where: str) -> AmberItem:
    try:
        number, kind, truth = row["id"], row["type"], row["truth"]
    except (KeyError, TypeError) as error:
        raise DataError(f"{where}: expected an object with id, type and truth, found {str(row)[:60]!r}") from error
    if type(number) is not int:
        raise DataError(f"{where}: expected an integer id, found {number!r}")
    task = _TASK_OF_TYPE.get(kind) if isinstance(kind, str) else None
    if task is None:
        raise DataError(f"{where}: unknown type {kind!r}; AMBER has {', '.join(_TASK_OF_TYPE)}")
    if task == "generative":
        invented = row.get("hallu")
        if not _is_words(truth) or not _is_words(invented):
            raise DataError(f"{where}: a generative item needs truth and hallu, each a list of words")
        return AmberItem(number, task, tuple(truth), tuple(invented))
    if truth not in ("yes", "no"):
        raise DataError(f"{where}: expected the truth yes or no, found {truth!r}")
    return AmberItem(number, task, label=truth == "yes")


def _is_words(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(word, str) for word in value)


QUERY_FILES = ("query_all.json", "query/query_all.json")


def read_queries(path: Path) -> dict[int, tuple[str, str]]:
    """What is asked of each item: its id to the image and the query.

    Raises:
        DataError: the file is missing or broken.
    """
    rows = read_json(path)
    try:
        return {int(row["id"]): (str(row["image"]), str(row["query"])) for row in rows}
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: expected a JSON list of objects with id, image and query ({error!r})") from error


def load_texts(folder: Path) -> dict[int, tuple[str, str]]:
    """The query and the image of each item, where the folder has them; empty where it has none.

    Raises:
        DataError: the file of queries is broken.
    """
    paths = [folder / name for name in QUERY_FILES if (folder / name).is_file() or _packed(folder / name).is_file()]
    return {i: (query, image) for i, (image, query) in read_queries(paths[0]).items()} if paths else {}


def read_json(path: Path) -> Any:
    """The value of a JSON file, or of the one with ``.gz`` behind its name.

    Raises:
        DataError: it is missing or cannot be read.
    """
    return textfiles.read_json(_packed(path), what="AMBER file", remedy=_REMEDY)


def _packed(path: Path) -> Path:
    packed = path.with_name(path.name + ".gz")
    return packed if packed.exists() and not path.exists() else path
