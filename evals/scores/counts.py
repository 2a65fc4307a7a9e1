"""``counts.json``: what a run's figures are sums of, one row per caption or question.

With it two runs are compared image by image without their data, their answers or a model. Every column of integers,
truth values or scores that a table has is kept under its name, and the statistics of :mod:`vlmfix.evals.stats` read
what is loaded here as they read the table itself.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vlmfix.errors import DataError
from vlmfix.files import read_json

from ..data.write import canonical_json, write_text
from ..stats.table import Table

if TYPE_CHECKING:
    from ..benchmarks.registry import Tasks


COUNTS = "counts.json"

SCHEMA_VERSION = 1

_KINDS = {"b": "bool", "i": "int", "u": "int", "f": "float"}

_DTYPES: Mapping[str, Any] = {"bool": np.bool_, "int": np.int64, "float": np.float64}


def benchmark_counts(
    tables: Mapping[str, Table], controls: Mapping[str, Mapping[str, Table]] | None = None
) -> dict[str, Any]:
    """One benchmark's part of ``counts.json``.

    Args:
        tables: Method label -> table; all about the same rows in the same order.
        controls: Method label -> name of a control -> its table, about the same rows.
    """
    first = next(iter(tables.values()))
    common = {
        name: values
        for name, values in first.columns.items()
        if all(name in table.columns and np.array_equal(values, table.columns[name]) for table in tables.values())
    }
    if len(tables) == 1:  # Nothing says which columns belong to the rows and which to the method.
        common = {}
    return {
        "image_ids": [int(i) for i in first.image_ids],
        "splits": list(first.splits),
        "items": list(first.items),
        "truth": list(first.truth),
        "common": _packed(common),
        "methods": {
            label: _packed({name: values for name, values in table.columns.items() if name not in common})
            for label, table in tables.items()
        },
        "controls": {
            label: {name: _packed(table.columns) for name, table in named.items()}
            for label, named in (controls or {}).items()
        },
    }


def _packed(columns: Mapping[str, NDArray[Any]]) -> dict[str, Any]:
    return {
        name: {"kind": _KINDS[values.dtype.kind], "values": [_plain(v) for v in values.tolist()]}
        for name, values in columns.items()
    }


def _plain(value: Any) -> Any:
    if isinstance(value, bool):
        return int(value)
    return None if value != value else value  # JSON has no NaN


def write_counts(path: Path, settings_digest: str, images: Mapping[int, str], parts: Mapping[str, Any]) -> None:
    """Write ``counts.json``.

    Args:
        path: The file.
        settings_digest: Of the run, as in ``results.json``.
        images: Image id -> digest of the file.
        parts: Benchmark -> :func:`benchmark_counts`.
    """
    head = {"schema_version": SCHEMA_VERSION, "settings_digest": settings_digest}
    short = {str(image_id): digest[:16] for image_id, digest in images.items()}
    write_text(path, canonical_json({**head, "images": short, "benchmarks": parts}) + "\n")


@dataclass(frozen=True)
class BenchmarkCounts:
    """One benchmark of a run.

    Attributes:
        methods: Label -> table, in the order of the run.
        controls: Label -> name of a control -> table.
    """

    methods: Mapping[str, Table]
    controls: Mapping[str, Mapping[str, Table]]


@dataclass(frozen=True)
class RunCounts:
    """A run folder as far as comparing needs it.

    Attributes:
        folder: The folder.
        results: ``results.json``.
        images: Image id -> digest of the file.
        benchmarks: Benchmark -> its tables.
    """

    folder: Path
    results: Mapping[str, Any] = field(repr=False)
    images: Mapping[int, str] = field(repr=False)
    benchmarks: Mapping[str, BenchmarkCounts] = field(repr=False)


def load_run(folder: Path) -> RunCounts:
    """Read a run folder's figures and counts.

    Raises:
        DataError: It is no finished run folder, a file is broken, or the run was scored before counts were kept; the
            message says what to type.
    """
    results = load_results(folder)
    path = folder / COUNTS
    if not path.is_file():
        raise DataError(
            f"{folder} has no {COUNTS} (it was scored by an older vlmfix). Score it again, which generates nothing: "
            f"{_rescore(results, folder)}"
        )
    stored = _read_object(path, folder)
    if stored.get("settings_digest") != results["settings_digest"]:
        raise DataError(f"{path} belongs to another run than results.json; type again: {_rescore(results, folder)}")
    try:
        benchmarks = {name: _benchmark(part) for name, part in stored["benchmarks"].items()}
        images = {int(i): str(d) for i, d in stored["images"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"{path} is broken ({type(error).__name__}: {error}); score the run again: {_rescore(results, folder)}"
        ) from error
    return RunCounts(folder, results, images, benchmarks)


def _rescore(results: Mapping[str, Any], folder: Path) -> str:
    """The command that scores a run's answers again."""
    words = shlex.split(str(results["command"]))
    where = [] if "--out" in words else ["--out", str(folder)]
    return shlex.join([*words, *where, "--rescore"])


def load_results(folder: Path) -> dict[str, Any]:
    """Read a run folder's ``results.json``.

    Raises:
        DataError: It is no finished run folder, or the file is broken.
    """
    results = _read_object(folder / "results.json", folder)
    for key in ("methods", "settings", "settings_digest", "command"):
        if key not in results:
            raise DataError(f"{folder / 'results.json'} is not that of a run: expected {key!r} in it")
    return results


def _read_object(path: Path, folder: Path) -> dict[str, Any]:
    if folder.is_file():
        raise DataError(
            f"{folder} is a file; expected a run folder of vlmfix eval. Two files of answers are compared by vlmfix "
            "score BENCHMARK FILE --baseline FILE"
        )
    if not folder.is_dir():
        raise DataError(f"no such run folder: {folder}; expected what vlmfix eval wrote (--out DIR, or runs/...)")
    if not path.is_file():
        raise DataError(
            f"{folder} is no finished run: expected {path.name} in it. Type the vlmfix eval command that began it "
            "again, or name another folder"
        )
    found = read_json(path, what="result file", remedy="score the run again with its vlmfix eval command")
    if not isinstance(found, dict):
        raise DataError(f"{path}: expected a JSON object, found {type(found).__name__}")
    return found


def _benchmark(part: Mapping[str, Any]) -> BenchmarkCounts:
    image_ids = np.asarray(part["image_ids"], dtype=np.int64)
    splits, items = (tuple(map(str, part[name])) for name in ("splits", "items"))
    truth = tuple(map(str, part["truth"]))
    common = _unpacked(part["common"], len(image_ids))

    def table(columns: Mapping[str, Any], shared: Mapping[str, NDArray[Any]]) -> Table:
        return Table(image_ids, {**shared, **_unpacked(columns, len(image_ids))}, splits, items, truth)

    if not len(image_ids) == len(splits) == len(items) == len(truth):
        raise ValueError("columns of different length")
    return BenchmarkCounts(
        {label: table(columns, common) for label, columns in part["methods"].items()},
        {
            label: {name: table(columns, {}) for name, columns in named.items()}
            for label, named in part["controls"].items()
        },
    )


def _unpacked(columns: Mapping[str, Any], n: int) -> dict[str, NDArray[Any]]:
    found = {name: np.asarray(c["values"], dtype=_DTYPES[c["kind"]]) for name, c in columns.items()}
    for name, values in found.items():
        if values.shape != (n,):
            raise ValueError(f"column {name!r} has {values.shape} values for {n} rows")
    return found


def image_digests(tasks: Tasks) -> dict[int, str]:
    """Image id -> digest of its file, of every image of a run."""
    return {sample.image_id: tasks.image_digests[sample.path] for sample in tasks.samples() if sample.path is not None}


def count_run(
    tables: Mapping[str, Mapping[str, Any]], controls: Mapping[str, Mapping[str, Mapping[str, Table]]]
) -> dict[str, Any]:
    """The ``benchmarks`` of ``counts.json``.

    Args:
        tables: Benchmark -> method label -> table; side tables under their names.
        controls: Benchmark -> method label -> name of a control -> its table.
    """
    return {
        name: benchmark_counts(by_label, controls.get(name))
        for name, by_label in tables.items()
        if all(table is not None for table in by_label.values())  # Answers that nobody has judged have no table.
    }
