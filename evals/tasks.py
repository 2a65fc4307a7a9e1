"""What a run asks: images, captioning samples and POPE questions, chosen by seed and never by file order."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlmfix.errors import VlmfixError

from .benchmarks.base import Task
from .benchmarks.chair import ChairTask
from .benchmarks.make import make_own
from .benchmarks.pope import PopeTask
from .cache import file_digest
from .coco_tasks import CocoChoice, chair_task, coco_questions, given_questions, pope_task, sycophancy_task
from .config import BENCHMARKS, OWN_BENCHMARKS, EvalOptions
from .data.coco import load_image
from .samples import Sample

logger = logging.getLogger("vlmfix.evals")


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
    tasks: tuple[Task, ...]
    image_digests: Mapping[Path, str] = field(repr=False)

    @property
    def chair(self) -> ChairTask | None:
        """The captioning task, if wanted."""
        return next((task for task in self.tasks if isinstance(task, ChairTask)), None)

    @property
    def pope(self) -> PopeTask | None:
        """The POPE task, if wanted."""
        return next((task for task in self.tasks if isinstance(task, PopeTask)), None)

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
        DataError: A file is missing, corrupt or empty, or an id has no annotation; the message names it.
    """
    notes: list[str] = []
    wanted = [name for name in BENCHMARKS if name in options.benchmarks]
    descriptions: list[str] = []
    tasks: list[Task] = []
    asking = [name for name in ("pope", "sycophancy") if name in wanted]
    coco = None
    if "chair" in wanted or (asking and "pope" not in options.data_of):
        coco = CocoChoice.load(options, notes)
        descriptions.append(coco.description)
    elif options.data is not None:
        raise VlmfixError("--data is for chair, pope and sycophancy, and nothing of this run is read from it")
    if coco is not None and "chair" in wanted:
        tasks.append(chair_task(options, coco))
    for name in asking:
        asked = given_questions(options, name)
        if asked is None:
            assert coco is not None
            asked = coco_questions(options, coco, name, notes)
        tasks.append(pope_task(options, asked) if name == "pope" else sycophancy_task(options, asked, notes))
    if asking and "pope" in options.data_of:
        descriptions.append(f"pope from {options.data_of['pope']}")
    for own in wanted:
        if own in OWN_BENCHMARKS:
            tasks.append(make_own(own, options))
            descriptions.append(f"{own} from {options.data_of[own]}")
    paths = {sample.path for task in tasks for sample in task.samples if sample.path is not None}
    digests = {}
    for path in sorted(paths):
        load_image(path)  # An unreadable file is found here, not hours into the run.
        digests[path] = file_digest(path)
    return Tasks("; ".join(descriptions), tuple(dict.fromkeys(notes)), tuple(tasks), digests)
