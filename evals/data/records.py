"""Records that people hand in: JSON lines, one JSON list, or one JSON object with the list under a usual name.

Every entry comes with its place, so that every error names the file, the line and the remedy.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlmfix.errors import DataError
from vlmfix.files import broken_json, parse_json, read_text

Records = Sequence[tuple[str, Mapping[str, Any]]]
"""Pairs of a place for messages ("FILE line 3") and a JSON object."""


WRAPPERS = ("annotations", "sentences", "captions", "answers", "results", "data")


TEXT_KEYS = (
    *("caption", "text", "answer", "response", "ans", "output", "outputs", "prediction", "pred", "generated_text"),
    *("model_answer", "model_prediction"),
)


IMAGE_KEYS = (
    *("image_id", "image", "image_path", "img_id", "image_name", "image_file", "file_name", "filename", "img"),
    "img_path",
)


#: No caption is that long; a text that is comes from a file that lost its line breaks.
MAX_CHARACTERS = 1_000_000


_BLANK = re.compile(r"[ \t\r\n]*")


def read_rows(
    path: Path, *, what: str = "file", remedy: str = "write one JSON object per line, or one JSON list of objects"
) -> list[tuple[str, dict[str, Any]]]:
    """JSON objects of a file of JSON lines, of one JSON list, or of one JSON object that holds the list.

    Args:
        path: The file.
        what: As of :func:`read_text`.
        remedy: Likewise.

    Returns:
        (where, object) pairs; ``where`` names file and line (or entry) for messages.

    Raises:
        DataError: As of :func:`read_text`; or the file is empty, a line is no JSON, or an entry is no object.
    """
    text = read_text(path, what=what, remedy=remedy)
    start = text.lstrip()[:1]
    if not start:
        raise DataError(f"{what} {path} is empty: {remedy}")
    if start == "[":
        rows = list(_listed(text, path, what, remedy))
    elif start == "{" and not _is_lines(text):
        rows = _wrapped(parse_json(text, path, what, remedy), path, what, remedy)
    else:
        rows = list(_lines(text, path, what, remedy))
    for where, row in rows:
        if not isinstance(row, dict):
            raise DataError(f"{where}: expected a JSON object, found {str(row)[:40]!r}: {remedy}")
    if not rows:
        raise DataError(f"{what} {path} holds an empty list: {remedy}")
    return rows


def _is_lines(text: str) -> bool:
    """Whether a text that begins with ``{`` is JSON lines and not one document over several lines."""
    lines = [line for line in text.split("\n") if line.strip()]
    if len(lines) == 1:
        return not any(f'"{name}"' in lines[0] for name in WRAPPERS) or _is_record(lines[0])
    try:
        json.loads(lines[0])
        return True
    except (ValueError, RecursionError):
        return any(line.startswith("{") for line in lines[1:])


def _is_record(line: str) -> bool:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return True
    return not any(isinstance(value.get(name), list) for name in WRAPPERS)


def _lines(text: str, path: Path, what: str, remedy: str) -> Iterator[tuple[str, Any]]:
    lines = text.split("\n")
    last = max(i for i, line in enumerate(lines) if line.strip())
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        try:
            yield where, json.loads(line)
        except RecursionError as error:
            raise DataError(f"{what} {where}: JSON nested too deeply: {remedy}") from error
        except json.JSONDecodeError as error:
            if error.msg == "Extra data":
                advice = f"there is more behind the first JSON value (column {error.colno}); {remedy}"
            elif number - 1 == last and not text.endswith("\n"):
                advice = f"the file seems cut off here; delete this line, or {remedy}"
            else:
                advice = remedy
            raise DataError(f"{what} {where}: not JSON ({error.msg}), found {_excerpt(line)}: {advice}") from error
        except ValueError as error:
            raise DataError(f"{what} {where}: not JSON ({error}): {remedy}") from error


def _listed(text: str, path: Path, what: str, remedy: str) -> Iterator[tuple[str, Any]]:
    """The entries of one JSON list, each with its line."""
    decoder = json.JSONDecoder()
    position, line, number = text.index("[") + 1, 1, 0
    counted = 0
    try:
        position = _skip(text, position)
        while text[position : position + 1] != "]" or number:
            number += 1
            line, counted = line + text.count("\n", counted, position), position
            value, end = decoder.raw_decode(text, position)
            yield f"{path} line {line}, entry {number}", value
            position = _skip(text, end)
            if text[position : position + 1] == "]":
                break
            if text[position : position + 1] != ",":
                raise json.JSONDecodeError("Expecting ',' delimiter", text, position)
            position = _skip(text, position + 1)
        if (position := _skip(text, position + 1)) < len(text):
            raise json.JSONDecodeError("Extra data", text, position)
    except RecursionError as error:
        raise DataError(f"{what} {path} line {line}: JSON nested too deeply: {remedy}") from error
    except json.JSONDecodeError as error:
        raise broken_json(error, text, path, what, remedy) from error
    except ValueError as error:
        raise DataError(f"{what} {path} line {line}: not JSON ({error}): {remedy}") from error


def _skip(text: str, position: int) -> int:
    found = _BLANK.match(text, position)
    return found.end() if found else position


def _wrapped(value: Any, path: Path, what: str, remedy: str) -> list[tuple[str, Any]]:
    names = [name for name in WRAPPERS if isinstance(value.get(name), list)]
    if len(names) != 1:
        found = ", ".join(map(repr, list(value)[:8]))
        raise DataError(
            f"{what} {path} line 1: expected JSON lines, or a list under one of {', '.join(WRAPPERS)}, found one JSON "
            f"object with {found or 'nothing in it'}: {remedy}"
        )
    return [(f"{path} entry {i} of {names[0]!r}", entry) for i, entry in enumerate(value[names[0]], 1)]


def _excerpt(line: str) -> str:
    line = line.strip()
    return repr(line if len(line) <= 60 else f"{line[:40]}...{line[-12:]}")


def text_of(row: Mapping[str, Any], where: str, keys: Sequence[str] = TEXT_KEYS) -> str:
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


def answer_of(row: Mapping[str, Any], where: str, key: str | None = None) -> str:
    """The text that a model generated: under ``key``, or under the one usual name the row has.

    Raises:
        DataError: As of :func:`text_of`; it is no string; or several usual names hold different values.
    """
    names = [key] if key is not None else [name for name in TEXT_KEYS if name in row]
    if len(names) > 1 and any(row[name] != row[names[0]] for name in names[1:]):
        raise DataError(
            f"{where}: {' and '.join(map(repr, names))} differ, and either can be the model's text; say which with "
            f"--text-key {names[0]}"
        )
    text = text_of(row, where, names[:1] or TEXT_KEYS)
    if not isinstance(row[names[0]], str):
        raise DataError(f"{where}: expected text in {names[0]!r}, found {row[names[0]]!r}; write it as a string")
    return text


def image_id_of(row: Mapping[str, Any], where: str) -> int:
    """The COCO image id under the first usual name that the row has.

    Raises:
        DataError: It has none, or what it has is no id.
    """
    key = next((name for name in IMAGE_KEYS if name in row), None)
    if key is None:
        raise DataError(
            f"{where}: expected 'image_id' (or {', '.join(IMAGE_KEYS[1:])}), found the keys {', '.join(row) or 'none'}"
        )
    return parse_image_id(row[key], where)


def parse_image_id(value: Any, source: str) -> int:
    """A COCO image id from an integer, its digits, or a file name such as ``COCO_val2014_000000002239.jpg``.

    Raises:
        DataError: The value holds no id; the message names ``source``.
    """
    stem = Path(str(value)).stem.rpartition("_")[2]
    if isinstance(value, bool | list | dict) or not (stem.isascii() and stem.isdigit() and len(stem) < 19):
        raise DataError(
            f"{source}: {str(value)[:60]!r} is no image id; expected an integer or a COCO file name such as "
            "COCO_val2014_000000002239.jpg"
        )
    return int(stem)


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
    if text.lstrip().startswith("["):
        entries = _listed(text, path, flag, remedy)
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
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        found = f"{value!r}"[:40] if key in row else f"the keys {', '.join(row)}"
        raise DataError(f"{where}: expected a finite number in {key!r}, found {found}; leave --scores out without one")
    return float(value)
