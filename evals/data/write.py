"""Files written as a whole or not at all, and the digests of what is in them."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlmfix.errors import DataError, VlmfixError

SCHEMA_VERSION = 1
"""Of the results that ``vlmfix eval`` and ``vlmfix score`` write."""


def canonical_json(value: Any) -> str:
    """The one JSON spelling of a value: sorted keys, no spaces, ASCII, no NaN (a ``ValueError``)."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest(value: Any) -> str:
    """SHA-256 (hex) of the canonical JSON of a value."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 (hex) of a file's bytes, read in pieces."""
    hasher = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            hasher.update(block)
    return hasher.hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write a whole text file or leave the old one untouched (see ``write_bytes``)."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, data: bytes) -> None:
    """Write a whole file or leave the old one untouched (temporary file, fsync, ``os.replace``).

    A link stays one: what it leads to is written. A device or pipe (/dev/stdout) is written to as it is.

    Raises:
        VlmfixError: The file could not be written; the message names it and the reason.
    """
    real = Path(os.path.realpath(path))
    temporary = real.with_name(f".{real.name}.{os.getpid()}.tmp")
    try:
        if _is_stream(path):
            with path.open("ab", buffering=0) as device:
                device.write(data)
            return
        real.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, real)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise write_error(path, error) from error


def remove_unfinished(folder: Path) -> None:
    """Remove what a killed process left of files that it was writing; nobody else may be writing there."""
    for path in folder.rglob(".*.tmp"):
        path.unlink()


_STREAMS = (Path("/dev/stdout"), Path("/dev/stderr"))

_OPENED = (Path("/dev/fd"), Path("/proc/self/fd"))


def _is_stream(path: Path) -> bool:
    """Whether a path leads to a device, a pipe or what this process has open, and not to a file of its own."""
    is_open = path in _STREAMS or path.parent in _OPENED
    return path.exists() and not path.is_dir() and (is_open or not path.is_file())


def check_parent(path: Path) -> None:
    """Make sure that a file that ``--out`` names can be written once its content is there.

    Raises:
        DataError: It is a folder, or its folder does not exist or takes no files.
    """
    if path.is_dir():
        raise DataError(f"--out {path} is a folder; name a file in it")
    if not path.parent.is_dir():
        raise DataError(f"--out {path}: there is no folder {path.parent}; make it first")
    if not os.access(path.parent, os.W_OK):
        raise DataError(f"--out {path}: no file can be written to {path.parent}; name another folder")


_OF_A_RUN = frozenset({"answers.jsonl", "config.json", "counts.json", "results.json", "report.html", "report.md"})


def check_not_read(path: Path, options: Mapping[str, Any]) -> None:
    """Make sure that a file that ``--out`` names is none of those that a command reads, and none of a run's folder.

    Args:
        path: The file.
        options: The command's options: paths, and lists of paths, among others.

    Raises:
        DataError: It is one of them.
    """
    if path.name in _OF_A_RUN and (path.parent / "counts.json").is_file():
        raise DataError(f"--out {path} would overwrite a file of the run in {path.parent}; name another file")
    for name, value in options.items():
        for each in value if isinstance(value, list) else [value]:
            if name != "out" and isinstance(each, (str, Path)) and path.is_file() and _is_file(each, path):
                raise DataError(f"--out {path} would overwrite what is read ({each}); name another file")


def _is_file(given: str | Path, path: Path) -> bool:
    try:
        return os.path.samefile(given, path)
    except (OSError, ValueError):  # no file, or no path at all
        return False


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON, atomically (see ``write_text``)."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False) + "\n")


def write_error(path: Path, error: OSError) -> VlmfixError:
    """The error a user sees when a file of the run folder cannot be written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        advice = "free some space and type the same command again: the answers written so far are kept"
    else:
        advice = "choose a writable folder with --out DIR"
    return VlmfixError(f"cannot write {path}: {error.strerror or error}; {advice}")


def canonical_line(record: Mapping[str, Any]) -> str:
    """One line of the log: the keys in the order given, so that a reader sees the identifying ones first."""
    return json.dumps(dict(record), separators=(",", ":"), allow_nan=False, ensure_ascii=False)
