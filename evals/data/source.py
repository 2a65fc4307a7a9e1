"""Where a benchmark's questions and images come from: a folder or file of the user's, or the ``datasets`` library."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from vlmfix.errors import DataError

from ..testbed import default_cache_dir
from .write import write_bytes

PREFIX = "datasets:"

T = TypeVar("T", str, int)

#: A row of a data set with its place, for messages.
Row = tuple[str, Mapping[str, Any]]


def image_number(benchmark: str, name: str) -> int:
    """A number for an image that has none: 48 bits of a digest, so that it does not depend on what else is asked."""
    return int(hashlib.sha256(f"{benchmark}/{name}".encode()).hexdigest()[:12], 16)


def choose(names: Iterable[T], limit: int | None, seed: int) -> list[T]:
    """At most ``limit`` of the names or numbers, drawn by seed from their sorted list; sorted."""
    found = sorted(set(names))
    return found if limit is None or limit >= len(found) else sorted(random.Random(seed).sample(found, limit))


def find_file(folder: Path, names: Sequence[str], what: str) -> Path:
    """The first of some relative names that exists in a folder, each also with ``.gz`` behind it (without it here).

    Raises:
        DataError: None of them does.
    """
    for name in names:
        path = folder / name
        if path.is_file() or path.with_name(path.name + ".gz").is_file():
            return path
    raise DataError(f"{folder} has no {what}: expected {' or '.join(names)} in it")


def find_image(folders: Sequence[Path], names: Sequence[str], what: str) -> Path:
    """The first image file that exists, by folder and name.

    Raises:
        DataError: None of them does.
    """
    for folder in folders:
        for name in names:
            if (folder / name).is_file():
                return folder / name
    places = ", ".join(dict.fromkeys(str(folder) for folder in folders))
    raise DataError(f"no image {' or '.join(names)} of {what} in {places}: download the benchmark's images there")


def is_dataset(where: str) -> bool:
    """Whether data come through the ``datasets`` library."""
    return where.startswith(PREFIX)


def dataset_rows(where: str) -> Iterator[Row]:
    """The rows of a data set, with the name of their split as ``split`` where they have no such column.

    Args:
        where: ``datasets:`` and a hub id, a file (parquet, JSON, CSV), or a folder (of such files, of images with
            ``metadata.jsonl``, or written by ``save_to_disk``); then, if wanted, ``#SPLIT`` or ``#CONFIG:SPLIT``.
            Without a split, all of them.

    Raises:
        DataError: It cannot be loaded; the message gives the library's reason.
    """
    from datasets import Dataset, Image

    location, _, part = where.removeprefix(PREFIX).partition("#")
    config, colon, split = part.rpartition(":")
    loaded = _load(location, config if colon else None, split or None)
    splits = {split or "train": loaded} if isinstance(loaded, Dataset) else dict(loaded)
    for name, rows in splits.items():
        for column, feature in rows.features.items():
            if isinstance(feature, Image):
                rows = rows.cast_column(column, Image(decode=False))  # The bytes as they are: they have a digest.
        for index, row in enumerate(rows):
            yield f"{location}, {name} row {index}", {"split": name, **row}


def _load(location: str, config: str | None, split: str | None) -> Any:
    from datasets import load_dataset, load_from_disk

    path = Path(location).expanduser()
    kinds = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv"}
    try:
        if path.is_file():
            if path.suffix not in kinds:
                raise DataError(f"{path}: expected a file that ends in {', '.join(kinds)}")
            return load_dataset(kinds[path.suffix], data_files=str(path), split=split)
        if path.is_dir() and any((path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json")):
            found = load_from_disk(str(path))
            return found if split is None else found[split]
        return load_dataset(str(path) if path.is_dir() else location, config, split=split)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(
            f"cannot load the data set {location!r}: {reason} (expected {PREFIX}FILE, {PREFIX}FOLDER, or the id of a "
            f"hub data set that is cached or reachable, perhaps with #SPLIT or #CONFIG:SPLIT behind it)"
        ) from error


def row_image(row: Mapping[str, Any], where: str, folder: Path | None = None) -> Path | None:
    """The file of a row's image; None where the row has none.

    Bytes out of a data set are kept in the cache folder, under their digest.

    Raises:
        DataError: The image is named, but there is no such file.
    """
    value = row.get("image")
    if isinstance(value, Mapping):
        if value.get("bytes") is not None:
            return _kept(bytes(value["bytes"]), Path(value.get("path") or "image").suffix)
        value = value.get("path")
    if value is None or value == "":
        return None
    path = Path(str(value)) if folder is None else folder / str(value)
    if not path.is_file():
        raise DataError(f"{where}: there is no image file {path}; give its path, relative to the file of questions")
    return path


def own_image(row: Mapping[str, Any], where: str) -> Path:
    """The file of the image that a row must have, as of :func:`row_image`.

    Raises:
        DataError: The row has no image, or there is no such file.
    """
    path = row_image(row, where)
    if path is None:
        raise DataError(f"{where}: expected an image")
    return path


def whole_number(value: object, where: str, what: str, least: int = 0, most: int | None = None) -> int:
    """A number as files have it: ``7``, ``"7"``, or ``"7.0"`` out of a table.

    Args:
        value: As in the file.
        where: For messages.
        what: What a message expects, such as ``an id from 1``.
        least: The least number.
        most: The greatest number, if there is one.

    Raises:
        DataError: It is no such number.
    """
    text = str(value).strip().removesuffix(".0")
    if not text.isdecimal() or int(text) < least or (most is not None and int(text) > most):
        raise DataError(f"{where}: expected {what}, found {str(value)[:40]!r}")
    return int(text)


def _kept(data: bytes, suffix: str) -> Path:
    folder = default_cache_dir().parent / "images"
    path = folder / f"{hashlib.sha256(data).hexdigest()}{suffix}"
    if not path.is_file():
        write_bytes(path, data)
    return path


def text_field(row: Mapping[str, Any], names: Sequence[str], where: str) -> str:
    """The first of some fields that a row has, as text.

    Raises:
        DataError: It has none of them.
    """
    for name in names:
        if row.get(name) is not None:
            return str(row[name])
    raise DataError(f"{where}: expected {' or '.join(map(repr, names))}, found the keys {', '.join(row)}")
