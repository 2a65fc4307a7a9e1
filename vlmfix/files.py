"""Text and JSON files that people hand in: every error names the file, the line and the remedy.

Text is UTF-8 (with or without a byte-order mark), plain or packed with gzip, bzip2 or xz.
"""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import zlib
from pathlib import Path
from typing import Any

from vlmfix.errors import DataError

_MARKS = (
    (b"\xff\xfe\x00\x00", "UTF-32"),
    (b"\x00\x00\xfe\xff", "UTF-32"),
    (b"\xff\xfe", "UTF-16"),
    (b"\xfe\xff", "UTF-16"),
)

_PACKED = (
    (b"\x1f\x8b", "gzip", gzip.decompress),
    (b"BZh", "bzip2", bz2.decompress),
    (b"\xfd7zXZ\x00", "xz", lzma.decompress),
)

# What is recognised by its first bytes and not read as text, with what to do about it.
_NO_TEXT = (
    (b"\x80", "pickle", "write its content as JSON (VLMEvalKit: run it with PRED_FORMAT=tsv)"),
    (b"PK\x03\x04", "zip archive", "unpack it"),
    (b"\x28\xb5\x2f\xfd", "zstd file", "unpack it with `zstd -d`"),
    (b"7z\xbc\xaf", "7z archive", "unpack it"),
    (b"PAR1", "parquet file", "write its content as JSON"),
    (b"ARROW1", "arrow file", "write its content as JSON"),
    (b"%PDF", "PDF", "write its content as JSON"),
    (b"\x89PNG", "picture", "check the path"),
    (b"\xff\xd8\xff", "picture", "check the path"),
)


def read_text(path: Path, *, what: str = "file", remedy: str = "check the path") -> str:
    """The text of a file, unpacked if it is packed.

    Args:
        path: The file.
        what: What it is, for messages ("annotation file").
        remedy: What to do if it is missing or damaged ("download it again").

    Raises:
        DataError: It is missing, a folder, unreadable, damaged, or no UTF-8; the message names file, line and remedy.
    """
    return as_text(read_bytes(path, what=what, remedy=remedy), path, what=what)


def read_bytes(path: Path, *, what: str = "file", remedy: str = "check the path") -> bytes:
    """The bytes of a file, unpacked if it is packed; arguments and errors as of :func:`read_text`."""
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise DataError(f"there is no {what} {path}: {remedy}") from error
    except IsADirectoryError as error:
        raise DataError(f"{path} is a folder, expected a {what}: give the file in it") from error
    except OSError as error:
        raise DataError(f"cannot read {what} {path} ({error.strerror or error}): {remedy}") from error
    for start, name, unpack in _PACKED:
        if data.startswith(start):
            try:
                return unpack(data)
            except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
                raise DataError(f"{what} {path} is a damaged {name} file ({error}): {remedy}") from error
    return data


def as_text(data: bytes, path: Path, *, what: str = "file") -> str:
    """The bytes of a file as text.

    Raises:
        DataError: They are something else, or no UTF-8; the message names file, line and remedy.
    """
    found = [(kind, advice) for start, kind, advice in _NO_TEXT if data.startswith(start)]
    if data[257:262] == b"ustar":
        found.append(("tar archive", "unpack it"))
    for kind, advice in found:
        raise DataError(f"{what} {path} is a {kind}, which is not read: {advice}")
    return _decoded(data, path, what)


def _decoded(data: bytes, path: Path, what: str) -> str:
    mark = next((name for mark, name in _MARKS if data.startswith(mark)), None)
    if mark is None and b"\x00" in data[:1000]:
        mark = "UTF-16"
    if mark is not None:
        raise DataError(
            f"{what} {path} line 1: expected UTF-8, found what looks like {mark}; type "
            f"`iconv -f {mark} -t UTF-8 {path} > utf8.json` and give that file"
        )
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{what} {path} line {line}: byte 0x{data[error.start]:02x} is no UTF-8; if the file is Latin-1, type "
            f"`iconv -f LATIN1 -t UTF-8 {path} > utf8.json` and give that file"
        ) from error


def read_json(path: Path, *, what: str = "file", remedy: str = "write it again") -> Any:
    """The value of a file that is one JSON document; arguments and errors as of :func:`read_text`."""
    text = read_text(path, what=what, remedy=remedy)
    if not text.strip():
        raise DataError(f"{what} {path} is empty: {remedy}")
    return parse_json(text, path, what, remedy)


def parse_json(text: str, path: Path, what: str, remedy: str) -> Any:
    """The value of a JSON document, the text of ``path``; errors as of :func:`read_text`."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise DataError(f"{what} {path} line 1: JSON nested too deeply: {remedy}") from error
    except json.JSONDecodeError as error:
        raise broken_json(error, text, path, what, remedy) from error
    except ValueError as error:  # A number of thousands of digits.
        raise DataError(f"{what} {path}: not JSON ({error}): {remedy}") from error


def broken_json(error: json.JSONDecodeError, text: str, path: Path, what: str, remedy: str) -> DataError:
    """What is said of a document that cannot be parsed."""
    place = f"{what} {path} line {error.lineno}: not readable JSON ({error.msg}, column {error.colno})"
    if error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated string"):
        return DataError(f"{place}, the file seems cut off: {remedy}")
    return DataError(f"{place}: {remedy}")
