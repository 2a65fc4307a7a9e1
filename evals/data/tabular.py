"""Rows out of tables: CSV and TSV, Excel workbooks, parquet and arrow, each with its place for messages."""

from __future__ import annotations

import csv
import importlib
import io
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from vlmfix.errors import DataError

SEPARATORS = ("\t", ",", ";")
"""What may separate columns: the first of them that the first line has. Excel writes semicolons in many languages."""

_STREAM = b"\xff\xff\xff\xff"
"""How an arrow stream begins."""


def table_rows(text: str, first: str, path: Path, what: str) -> Iterator[tuple[str, Any]]:
    """The rows of a table, its columns separated by one of ``SEPARATORS``.

    Args:
        text: The file's.
        first: Its first line, which names the columns.
        path: The file.
        what: What it is, for messages.

    Raises:
        DataError: A line has another number of columns, or stray quotes.
    """
    delimiter = next(separator for separator in SEPARATORS if separator in first)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        lines = ((f"{path} line {reader.line_num}", values) for values in reader if values)
        yield from _under_header(lines, path, what)
    except csv.Error as error:
        raise DataError(
            f"{what} {path} line {reader.line_num}: no table ({error}): quote texts that hold quotes, separators or "
            "line breaks, or write JSON lines"
        ) from error


def _under_header(lines: Iterable[tuple[str, Sequence[Any]]], path: Path, what: str) -> Iterator[tuple[str, Any]]:
    """Rows of a table whose first line names the columns; a first column without a name is pandas' index."""
    names: list[str] | None = None
    for where, values in lines:
        if names is None:
            names = [str("" if name is None else name).strip() for name in values]
            twice = [name for name in names[1:] if not name or names.count(name) > 1]
            if twice:
                raise DataError(f"{what} {where}: the first line must name every column, once; see {twice[0]!r}")
        elif len(values) != len(names):
            raise DataError(
                f"{what} {where}: {len(values)} columns, and the first line has {len(names)}: quote texts that hold "
                "separators or line breaks, or write JSON lines"
            )
        elif any(value is not None for value in values):
            yield where, {name: value for name, value in zip(names, values, strict=True) if name}


def is_workbook(data: bytes) -> bool:
    """Whether a file is an Excel workbook (which is a zip archive)."""
    try:
        return data.startswith(b"PK\x03\x04") and "xl/workbook.xml" in zipfile.ZipFile(io.BytesIO(data)).namelist()
    except (zipfile.BadZipFile, OSError, ValueError):
        return False


def _library(name: str, kind: str, path: Path, what: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise DataError(
            f"{what} {path} is {kind}: type `pip install {package}` to have it read, or write its rows as JSON lines"
        ) from error


def workbook_rows(data: bytes, path: Path, what: str) -> Iterator[tuple[str, Any]]:
    """The rows of an Excel workbook: of the sheet with a column ``prediction``, else of the first.

    Raises:
        DataError: openpyxl is not installed, or the workbook is damaged.
    """
    openpyxl = _library("openpyxl", "an Excel workbook", path, what)
    try:
        sheets = openpyxl.load_workbook(io.BytesIO(data), read_only=True, data_only=True).worksheets
        tables = [(sheet.title, list(sheet.iter_rows(values_only=True))) for sheet in sheets]
    except Exception as error:  # Whatever a damaged archive or its XML raises.
        raise DataError(f"{what} {path} is a damaged Excel workbook ({error}): save it again") from error
    title, rows = next(((t, rows) for t, rows in tables if rows and "prediction" in rows[0]), tables[0])
    lines = ((f"{path} sheet {title}, row {number}", values) for number, values in enumerate(rows, 1))
    yield from _under_header(lines, path, what)


def is_arrow(data: bytes) -> bool:
    """Whether a file is parquet or arrow."""
    return data.startswith((b"PAR1", b"ARROW1", _STREAM))


def arrow_rows(data: bytes, path: Path, what: str) -> Iterator[tuple[str, Any]]:
    """The rows of parquet, or of arrow as a file or as a stream (what ``datasets`` saves); see :func:`table_rows`.

    Raises:
        DataError: pyarrow is not installed, or the file is damaged.
    """
    kind = "a parquet file" if data.startswith(b"PAR1") else "an arrow file"
    arrow = _library("pyarrow", kind, path, what)
    try:
        source = arrow.BufferReader(data)
        if data.startswith(b"PAR1"):
            table = importlib.import_module("pyarrow.parquet").read_table(source)
        else:
            ipc = importlib.import_module("pyarrow.ipc")
            table = (ipc.open_stream if data.startswith(_STREAM) else ipc.open_file)(source).read_all()
        names, rows = table.column_names, table.to_pylist()
    except (arrow.ArrowException, OSError, ValueError) as error:
        reason = str(error).partition("\n")[0][:120]
        raise DataError(f"{what} {path} is a damaged {kind.partition(' ')[2]} ({reason}): write it again") from error
    if len(set(names)) < len(names):
        raise DataError(f"{what} {path} has two columns of one name ({', '.join(names)}): rename one")
    for number, row in enumerate(rows):
        yield f"{path} row {number}", row
