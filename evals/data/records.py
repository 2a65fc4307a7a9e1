"""Rows that people hand in, from whatever they are kept in, each with its place for messages.

What a file is, its first bytes say, never its name: JSON lines, JSON objects one behind the other, one JSON list, one
JSON object that holds the rows, a table (CSV, TSV, xlsx), parquet or arrow; plain or packed. Every error names the
file, the line and the remedy.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from vlmfix.errors import DataError
from vlmfix.files import as_text, broken_json, read_bytes, read_text

from . import tabular

Records = Sequence[tuple[str, Mapping[str, Any]]]
"""Pairs of a place for messages ("FILE line 3") and a JSON object."""

WRAPPERS = ("annotations", "sentences", "captions", "answers", "results", "data")

IMAGE_KEYS = (
    *("image_id", "image", "image_path", "img_id", "image_name", "image_file", "file_name", "filename", "img"),
    *("img_path", "image_source"),
)

#: No caption is that long; a text that is comes from a file that lost its line breaks.
MAX_CHARACTERS = 1_000_000

_BLANK = re.compile(r"[ \t\r\n\ufeff]*")  # files that are put together have a mark where each begins

_IMAGE_ID = re.compile(r"(?:COCO_(?:train|val|test)\d{4}_(\d{12})|(\d{1,18}))(?:\.[A-Za-z]\w*|\.0+)?", re.ASCII | re.I)


def read_rows(
    path: Path, *, what: str = "file", remedy: str = "write one JSON object per line, or one JSON list of objects"
) -> list[tuple[str, dict[str, Any]]]:
    """The rows of a file.

    Args:
        path: The file.
        what: As of :func:`vlmfix.files.read_text`.
        remedy: Likewise.

    Returns:
        (where, row) pairs; ``where`` names file and line (or entry) for messages.

    Raises:
        DataError: As of :func:`vlmfix.files.read_text`; or the file is empty, a line cannot be read, or an entry is no
            object.
    """
    data = read_bytes(path, what=what, remedy=remedy)
    rows: Iterable[tuple[str, Any]]
    if tabular.is_arrow(data):
        rows = tabular.arrow_rows(data, path, what)
    elif tabular.is_workbook(data):
        rows = tabular.workbook_rows(data, path, what)
    else:
        text = as_text(data, path, what=what)
        start = text.lstrip()[:1]
        if not start:
            raise DataError(f"{what} {path} is empty: {remedy}")
        first = text.lstrip("\r\n").split("\n", 1)[0]
        if start not in "{[" and any(separator in first for separator in tabular.SEPARATORS):
            rows = tabular.table_rows(text, first, path, what)
        else:
            rows = _unwrapped(list(_values(text, path, what, remedy)), path, what, start == "[")
    rows = list(rows)
    for where, row in rows:
        if not isinstance(row, dict):
            raise DataError(f"{where}: expected a JSON object, found {str(row)[:40]!r}: {remedy}")
    if not rows:
        raise DataError(f"{what} {path} holds an empty list: {remedy}")
    return rows


# JSON


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(n for n in names if names.count(n) > 1)!r} stands twice in one object")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


def _values(text: str, path: Path, what: str, remedy: str) -> Iterator[tuple[int, Any]]:
    """JSON values one behind the other, or the entries of one list, each with its line."""
    position, line, counted = _skip(text, 0), 1, 0
    listed = text[position] == "["
    position = _skip(text, position + 1) if listed else position
    try:
        while position < len(text) and not (listed and text[position] == "]"):
            line, counted = line + text.count("\n", counted, position), position
            value, end = _DECODER.raw_decode(text, position)
            yield line, value
            position = _skip(text, end)
            if listed:
                if text[position : position + 1] not in (",", "]"):
                    raise json.JSONDecodeError("Expecting ',' delimiter", text, position)
                position = _skip(text, position + 1) if text[position] == "," else position
            elif position < len(text) and "\n" not in text[end:position]:
                raise json.JSONDecodeError("Extra data", text, position)
        if listed and position >= len(text):
            raise json.JSONDecodeError("Expecting value", text, position)
        if listed and (position := _skip(text, position + 1)) < len(text):
            raise json.JSONDecodeError("Extra data", text, position)
    except RecursionError as error:
        raise DataError(f"{what} {path} line {line}: JSON nested too deeply: {remedy}") from error
    except json.JSONDecodeError as error:
        if listed:
            raise broken_json(error, text, path, what, remedy) from error
        _refuse_line(error, text, line, path, what, remedy)
    except ValueError as error:
        raise DataError(f"{what} {path} line {line}: not JSON ({error}): {remedy}") from error


def _refuse_line(error: json.JSONDecodeError, text: str, line: int, path: Path, what: str, remedy: str) -> NoReturn:
    """Say what is wrong with a value that begins on a line."""
    # A line that lacks its end is noticed where the next one begins.
    number = line if text[error.pos : error.pos + 1] == "{" else error.lineno
    found = text.split("\n")[number - 1].strip()
    excerpt = repr(found if len(found) <= 60 else f"{found[:40]}...{found[-12:]}")
    if error.msg == "Extra data":
        advice = f"there is more behind the first JSON value (column {error.colno}); {remedy}"
    elif error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated string"):
        advice = f"the file seems cut off here; delete this line, or {remedy}"
    else:
        advice = remedy
    raise DataError(f"{what} {path} line {number}: not JSON ({error.msg}), found {excerpt}: {advice}") from error


def _skip(text: str, position: int) -> int:
    found = _BLANK.match(text, position)
    return found.end() if found else position


def _unwrapped(values: Sequence[tuple[int, Any]], path: Path, what: str, listed: bool) -> Iterable[tuple[str, Any]]:
    """The rows that values are or hold."""
    if listed:
        return ((f"{path} line {line}, entry {i}", value) for i, (line, value) in enumerate(values, 1))
    if len(values) > 1 or not isinstance(values[0][1], dict):
        return ((f"{path} line {line}", value) for line, value in values)
    value = values[0][1]
    if isinstance(value.get("images"), list) and isinstance(value.get("annotations"), list):
        raise DataError(f"{what} {path} holds COCO's annotations, which are the truth: give what a model generated")
    held = [name for name in WRAPPERS if _holds_rows(value.get(name))]
    if len(held) > 1:
        names = " and ".join(map(repr, held))
        raise DataError(f"{what} {path} line 1: expected one list of rows, found lists under {names}: give one of them")
    if held and not {"image_id", "question_id"} & value.keys():
        return ((f"{path} entry {i} of {held[0]!r}", entry) for i, entry in enumerate(value[held[0]], 1))
    by_id = value.get("imgToEval")
    if isinstance(by_id, dict) and by_id:
        return [_named(f"{path} entry {key!r} of 'imgToEval'", "image_id", key, row) for key, row in by_id.items()]
    if value and all(
        isinstance(v, dict) and v and all(isinstance(r, dict) for r in v.values()) for v in value.values()
    ):
        return [
            _named(f"{path} entry {key!r} of {split!r}", "question_id", key, {"split": split, **row})
            for split, rows in value.items()
            for key, row in rows.items()
        ]
    return [(f"{path} line {values[0][0]}", value)]


def _holds_rows(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(entry, dict) for entry in value)


def _named(where: str, name: str, key: str, row: Any) -> tuple[str, Any]:
    """A row that stands under its id: if it says the id itself, it must be the same one."""
    if isinstance(row, dict) and str(row.setdefault(name, key)) != key:
        raise DataError(f"{where}: {name} is {row[name]!r}, and the entry stands under {key!r}")
    return where, row


# Fields


def text_of(row: Mapping[str, Any], where: str, keys: Sequence[str]) -> str:
    """The text under the first of ``keys`` that the row has.

    Raises:
        DataError: It has none of them, or the first one holds null, NaN, a list or an object.
    """
    key = next((key for key in keys if key in row), None)
    if key is None:
        raise DataError(f"{where}: expected one of {', '.join(keys)}, found the keys {', '.join(row) or 'none'}")
    value = row[key]
    if value is None or (isinstance(value, float) and math.isnan(value)):
        found = "null" if value is None else "NaN"
        raise DataError(f"{where}: {key!r} is {found}; give the text, or an empty one if there is no answer")
    if isinstance(value, list | dict):
        raise DataError(f"{where}: expected text in {key!r}, found {str(value)[:40]!r}; write the text itself")
    text = str(value)
    if len(text) > MAX_CHARACTERS:
        raise DataError(
            f"{where}: {key!r} has {len(text)} characters, more than any answer; the file seems to have lost its line "
            "breaks: write one JSON object per line"
        )
    return text


def image_id_of(row: Mapping[str, Any], where: str) -> int:
    """The COCO image id under the usual names that the row has.

    Raises:
        DataError: It has none, what it has is no id, or two of them are of different images.
    """
    keys = [name for name in IMAGE_KEYS if name in row]
    if not keys:
        raise DataError(
            f"{where}: expected 'image_id' (or {', '.join(IMAGE_KEYS[1:])}), found the keys {', '.join(row) or 'none'}"
        )
    found = parse_image_id(row[keys[0]], where)
    for key in keys[1:]:
        if (other := _image_id(row[key])) not in (None, found):
            raise DataError(f"{where}: {keys[0]!r} is image {found}, and {key!r} is image {other}: which one is it?")
    return found


def parse_image_id(value: Any, source: str) -> int:
    """A COCO image id from an integer, its digits, or a file name such as ``COCO_val2014_000000002239.jpg``.

    A number is never cut out of a longer name: ``226988_9`` is no id.

    Raises:
        DataError: The value holds no id; the message names ``source``.
    """
    found = _image_id(value)
    if found is None:
        raise DataError(
            f"{source}: {str(value)[:60]!r} is no image id; expected an integer or a COCO file name such as "
            "COCO_val2014_000000002239.jpg"
        )
    return found


def _image_id(value: Any) -> int | None:
    if isinstance(value, bool | list | dict):
        return None
    name = re.split(r"[/\\]", str(value).strip())[-1]
    found = _IMAGE_ID.fullmatch(name)
    return int(found[1] or found[2]) if found else None


def read_ids(path: Path, flag: str) -> list[int]:
    """Image ids of a file: one per line (or between blanks), or a JSON list; integers, or COCO file names.

    Args:
        path: The file.
        flag: The option it was given with ("--ids"), for messages.

    Returns:
        Sorted, each once.

    Raises:
        DataError: As of ``read_text``; an entry is no id, or there is none.
    """
    remedy = "write one image id per line, or a JSON list of them"
    text = read_text(path, what=f"{flag} file", remedy=remedy)
    entries: Iterable[tuple[str, Any]]
    if text.lstrip().startswith("["):
        entries = _unwrapped(list(_values(text, path, flag, remedy)), path, flag, True)
    else:
        lines = enumerate(text.split("\n"), 1)
        entries = ((f"{path} line {number}", word) for number, line in lines for word in line.split())
    ids = sorted({parse_image_id(entry, f"{flag} {where}") for where, entry in entries})
    if not ids:
        raise DataError(f"{flag} {path} names no image: {remedy}")
    return ids


def number_of(row: Mapping[str, Any], where: str, key: str) -> float:
    """A finite number under a key.

    Raises:
        DataError: The key is missing, or holds anything else.
    """
    value = row.get(key)
    if isinstance(value, str):  # Out of a table, where everything is text.
        with contextlib.suppress(ValueError):
            value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        found = f"{value!r}"[:40] if key in row else f"the keys {', '.join(row)}"
        raise DataError(f"{where}: expected a finite number in {key!r}, found {found}; leave --scores out without one")
    return float(value)
