"""The lines of an answer file and the questions they answer: which line is about which, and what has none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlmfix.errors import DataError

Rows = Sequence[tuple[str, Mapping[str, Any]]]


def matched_rows(
    rows: Rows, wanted: Sequence[tuple[str, ...]], fields: Sequence[str], path: Path, *, subset: bool = False
) -> list[tuple[int, str, Mapping[str, Any]]]:
    """The rows in the order of the questions, found by their key fields, or by order if no row has these.

    Args:
        rows: (place, row) pairs.
        wanted: The key of each question.
        fields: Names of the key's parts.
        path: The file.
        subset: Whether questions may lack an answer.

    Returns:
        Index of the question, place and row of every answer.

    Raises:
        DataError: A row is about no question, two are about one, or a question has none.
    """
    keyed = [all(name in row for name in fields) for _, row in rows]
    if not any(keyed):
        if len(rows) != len(wanted):
            raise DataError(
                f"{path} has {len(rows)} answers without {', '.join(fields)}, and there are {len(wanted)} questions: "
                "give one answer per question in their order, or these fields"
            )
        return [(index, where, row) for index, (where, row) in enumerate(rows)]
    known = set(wanted)
    found: dict[tuple[str, ...], tuple[str, Mapping[str, Any]]] = {}
    for (where, row), complete in zip(rows, keyed, strict=True):
        if not complete:
            raise DataError(f"{where}: expected {', '.join(fields)} as on the other lines")
        key = tuple(str(row[name]) for name in fields)
        if key not in known:
            raise DataError(f"{where}: the question file has no question {'/'.join(key)}")
        if key in found:
            raise DataError(f"{where}: question {'/'.join(key)} is answered already, on {found[key][0]}")
        found[key] = (where, row)
    missing = [key for key in wanted if key not in found]
    if missing and not subset:
        raise DataError(
            f"{path} answers {len(found)} of {len(wanted)} questions; the first without an answer is "
            f"{'/'.join(missing[0])}; --subset scores those that are there"
        )
    return [(index, *found[key]) for index, key in enumerate(wanted) if key in found]


#: Name of a part of a benchmark -> how many of its items are answered, and how many there are.
Parts = Mapping[str, tuple[int, int]]


def answered(parts: Parts) -> dict[str, dict[str, int]]:
    """The parts for JSON."""
    return {name: {"answered": there, "of": total} for name, (there, total) in parts.items()}


def check_whole(parts: Parts, path: Path) -> None:
    """Refuse answers to something else than the whole of every part.

    Raises:
        DataError: A part has fewer answers than items, or more.
    """
    for name, (there, total) in parts.items():
        if there != total:
            raise DataError(
                f"{path} has answers to {there} of {total} {name}: answer them all, leave the task out, or type "
                "--subset to score what is there"
            )


def subset_lines(parts: Parts) -> list[str]:
    """The line that says what a subset lacks; none if every part is whole."""
    lacking = [f"{there} of {total} {name}" for name, (there, total) in parts.items() if there < total]
    return [f"SUBSET: {', '.join(lacking)}; not comparable with figures of the whole"] if lacking else []


def code_of(row: Mapping[str, Any], key: str, where: str, largest: int) -> int:
    """A whole number from 0 to ``largest`` out of a row.

    Raises:
        DataError: It is something else.
    """
    value = str(row.get(key)).strip()
    if value not in [str(code) for code in range(largest + 1)]:
        raise DataError(f"{where}: expected {key!r} from 0 to {largest}, found {row.get(key)!r}")
    return int(value)
