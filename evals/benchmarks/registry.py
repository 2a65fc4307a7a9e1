"""The benchmarks there are: the folders beside this file, and those of other packages; and what a run asks of them.

A folder is a benchmark if it has a ``task.py``, which defines one :class:`~vlmfix.evals.benchmarks.base.Benchmark` of
the folder's name. Another package names its class under the entry-point group ``vlmfix.benchmarks``::

    [project.entry-points."vlmfix.benchmarks"]
    mine = "my_package.benchmark:MyBenchmark"
"""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from vlmfix.errors import VlmfixError
from vlmfix.methods.registry import entries_of

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

    from ..data.samples import Sample
    from ..options import EvalOptions
    from .base import Benchmark

GROUP = "vlmfix.benchmarks"

_HERE = Path(__file__).parent

B = TypeVar("B", bound="Benchmark")


def benchmark_names() -> tuple[str, ...]:
    """The names of all benchmarks, without importing any."""
    folders = (path.parent.name for path in _HERE.glob("*/task.py"))
    return tuple(sorted({*folders, *_foreign()}))


def _foreign() -> Mapping[str, EntryPoint]:
    return {entry.name: entry for entry in entries_of(GROUP)}


@functools.cache
def benchmark_class(name: str) -> type[Benchmark]:
    """The benchmark of a name.

    Raises:
        VlmfixError: There is none, or what a package names under it is no benchmark of that name.
    """
    from .base import Benchmark

    if (_HERE / name / "task.py").is_file():
        module = importlib.import_module(f".{name}.task", __package__)
        defined = (each for each in vars(module).values() if getattr(each, "__module__", "") == module.__name__)
        return next(each for each in defined if isinstance(each, type) and issubclass(each, Benchmark))
    entry = _foreign().get(name)
    if entry is None:
        raise VlmfixError(f"unknown --benchmark {name!r}; choose from {', '.join(benchmark_names())}")
    try:
        found = entry.load()
    except Exception as error:
        raise VlmfixError(f"the benchmark {name} ({entry.value}) cannot be imported: {error!r}") from error
    if not (isinstance(found, type) and issubclass(found, Benchmark)) or found.name != name:
        raise VlmfixError(
            f"the entry point {name} of the group {GROUP} names {entry.value}, which is no Benchmark "
            f"with name = {name!r}"
        )
    return found


def names_of_files() -> dict[str, str]:
    """The benchmarks that files may answer and a line on each, read without importing any."""
    found = {name: f"of another package ({entry.value})" for name, entry in _foreign().items()}
    for path in _HERE.glob("*/task.py"):
        text = path.read_text(encoding="utf-8")
        line = re.search(r'summary: ClassVar\[str\] = "(.*)"', text)
        if line and "def from_files" in text:
            found[path.parent.name] = line[1]
    return dict(sorted(found.items()))


@dataclass(frozen=True)
class Tasks:
    """Everything a run asks.

    Attributes:
        description: One line on the data, for the report.
        notes: What the reader of the report must know about the choice of images.
        tasks: The benchmarks, in the order in which they are asked.
        image_digests: SHA-256 of every image file, by path.
    """

    description: str
    notes: tuple[str, ...]
    tasks: tuple[Benchmark, ...]
    image_digests: Mapping[Path, str] = field(repr=False)

    def find(self, kind: type[B]) -> B | None:
        """The benchmark of a class, if it is asked."""
        return next((task for task in self.tasks if isinstance(task, kind)), None)

    def samples(self) -> Iterator[Sample]:
        """All samples, task by task."""
        for task in self.tasks:
            yield from task.samples

    def settings(self) -> dict[str, Any]:
        """What identifies the questions and images, for ``config.json``."""
        return {task.name: task.settings() for task in self.tasks}


def make_tasks(options: EvalOptions) -> Tasks:
    """Choose images and questions, and check that every image can be read, before any model is loaded.

    Raises:
        VlmfixError: The options name no such benchmark, or data that nothing is read from.
        DataError: A file is missing, corrupt or empty, or an id has no annotation; the message names it.
    """
    from ..data.coco import load_image
    from ..data.write import file_digest
    from .choice import RunData

    data = RunData(options)
    tasks = tuple(benchmark_class(name).make(options, data) for name in dict.fromkeys(options.benchmarks))
    if data.unread:
        raise VlmfixError(
            f"--benchmark-data names {data.unread[0]}, and nothing of this run is read from there; add it to "
            "--benchmark, or leave it out"
        )
    if options.data is not None and not data.uses_coco:
        raise VlmfixError("--data is for chair, pope and sycophancy, and nothing of this run is read from it")
    paths = {sample.path for task in tasks for sample in task.samples if sample.path is not None}
    digests = {}
    for path in sorted(paths):
        load_image(path)  # An unreadable file is found here, not hours into the run.
        digests[path] = file_digest(path)
    return Tasks("; ".join(dict.fromkeys(data.descriptions)), tuple(dict.fromkeys(data.notes)), tasks, digests)
