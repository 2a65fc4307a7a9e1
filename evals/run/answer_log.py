"""The answers of a run on disk: an append-only log that survives a kill, and that one run at a time writes to."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import FileLock, Timeout

from vlmfix.errors import DataError, VlmfixError

from ..data.write import canonical_line, write_error

logger = logging.getLogger("vlmfix.evals")


class AnswerLog:
    """Append-only JSON lines, one per answer, each with a unique ``key``.

    A torn last line (the process was killed, the disk was full) is dropped with a log message when the file is opened
    again; any other line that cannot be read is an error. While the log is open, a second run cannot open it.

    Attributes:
        path: The file.
        records: Everything in it, by key; grows with ``append``.
    """

    def __init__(self, path: Path, *, keep: bool = True, known: Mapping[str, Mapping[str, Any]] | None = None) -> None:
        """Open (or create) the log and read what it holds.

        Args:
            path: The file.
            keep: Otherwise what it holds is thrown away, once the file is locked.
            known: Answers that are kept elsewhere, by key: not written again.

        Raises:
            DataError: A line other than a torn last one is not an answer.
            VlmfixError: The file cannot be opened, or another run has it open.
        """
        self.path = path
        self.records: dict[str, dict[str, Any]] = {key: dict(record) for key, record in (known or {}).items()}
        self._lock = FileLock(path.with_name(f".{path.name}.lock"))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._take_lock()
            # Unbuffered: a line is on its way to the disk when `append` returns, and nothing is left to fail at close.
            self._file = path.open("a+b" if keep else "w+b", buffering=0)
        except OSError as error:
            self._release_lock()
            raise write_error(path, error) from error
        try:
            self._read()
        except BaseException:
            self.close()
            raise

    def _take_lock(self) -> None:
        try:
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise VlmfixError(
                f"another run is writing to {self.path.parent}; wait for it or choose --out DIR"
            ) from error
        except NotImplementedError:  # Some network file systems have no locks; that must not stop a run.
            logger.warning("no file lock on %s: make sure that only one run writes to it", self.path)

    def _release_lock(self) -> None:
        if self._lock.is_locked:
            with suppress(OSError):  # Windows does not remove what is open, and filelock removes it there.
                Path(self._lock.lock_file).unlink()  # While it is held: nobody else's lock is removed.
            self._lock.release()

    def _read(self) -> None:
        data = self.path.read_bytes()
        complete = data.rfind(b"\n") + 1
        for key, record in _parsed(data[:complete], self.path):
            self.records.setdefault(key, record)
        if complete < len(data):
            if not data[complete:].lstrip().startswith(b"{"):  # No answer is torn here: this is some other file.
                number, found = data[:complete].count(b"\n") + 1, data[complete : complete + 20]
                raise DataError(
                    f"{self.path} line {number}: expected an answer of a run, found {found!r}; move the file away, or "
                    "choose --out DIR"
                )
            logger.warning("%s: dropped a torn last line (%d bytes)", self.path, len(data) - complete)
            os.truncate(self.path, complete)

    def append(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Write answers whose key is not there yet, one line each, and flush them to the disk.

        Raises:
            VlmfixError: The disk is full or not writable; what was written before stays readable.
        """
        try:
            for record in records:
                if record["key"] in self.records:
                    continue
                self._write_all((canonical_line(record) + "\n").encode())
                self.records[record["key"]] = dict(record)
            os.fsync(self._file.fileno())
        except OSError as error:
            raise write_error(self.path, error) from error

    def _write_all(self, data: bytes) -> None:
        view = memoryview(data)
        while view:  # A raw write may be short, for example just before the disk is full.
            view = view[self._file.write(view) :]

    def close(self) -> None:
        """Close the file and release the lock; a second call does nothing."""
        self._file.close()
        self._release_lock()

    def __enter__(self) -> AnswerLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_records(path: Path) -> dict[str, dict[str, Any]]:
    """Read a log that another process holds: its complete lines, by key.

    Raises:
        DataError: A complete line is not an answer.
    """
    if not path.is_file():
        return {}
    data = path.read_bytes()
    return dict(_parsed(data[: data.rfind(b"\n") + 1], path))


def _parsed(data: bytes, path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(data.split(b"\n")[:-1], start=1):
        try:
            record = json.loads(line.decode("utf-8"))  # bytes would be read as UTF-16 too
            key = record["key"]
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            found = line if len(line) <= 60 else line[:60] + b"..."
            raise DataError(
                f"{path} line {number}: expected a JSON object with a 'key', found {found!r}; repair or delete that "
                "line, or start afresh with --no-resume"
            ) from error
        if not isinstance(key, str):
            raise DataError(f"{path} line {number}: expected text in 'key', found {str(key)[:40]!r}; delete that line")
        yield key, record
