"""What files of answers to several benchmarks have in common: parts that are answered or not, and judge codes."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlmfix.errors import DataError

from ..data.matching import id_text


def add_by_order(parser: ArgumentParser) -> None:
    """Add the flag without which order is never taken for identity."""
    parser.add_argument("--by-order", action="store_true", help="answers are in the order of the questions, ids or not")


Parts = Mapping[str, tuple[int, int]]
"""Name of a part of a benchmark -> how many of its items are answered, and how many there are."""


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
    value = id_text(row.get(key))
    if value not in [str(code) for code in range(largest + 1)]:
        raise DataError(f"{where}: expected {key!r} from 0 to {largest}, found {row.get(key)!r}")
    return int(value)
