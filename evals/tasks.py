"""What a run asks: images, captioning samples and POPE questions, chosen by seed and never by file order."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlmfix.errors import DataError

from .benchmarks.base import Task
from .benchmarks.chair import ChairTask
from .benchmarks.make import make_own
from .benchmarks.pope import PopeTask
from .benchmarks.sycophancy import SPLIT as SYCOPHANCY_SPLIT
from .benchmarks.sycophancy import SycophancyTask
from .cache import file_digest
from .config import (
    BENCHMARKS,
    CHAIR_PROMPT,
    COCO_BENCHMARKS,
    OWN_BENCHMARKS,
    POPE_PROMPT,
    POPE_SPLITS,
    EvalOptions,
)
from .data.coco import CocoData, load_image
from .data.pope import PopeQuestion, build_questions, load_questions
from .metrics.chair import ChairMatcher, ground_truth
from .records import read_ids
from .samples import Sample

logger = logging.getLogger("vlmfix.evals")

#: Images per benchmark of a run that names no limit: the testbed's run fits into three minutes on two cores (a POPE
#: image costs ten answers, one of sycophancy 24, a caption one), COCO's follow the papers.
TESTBED_IMAGES = {"chair": 400, "pope": 200, "sycophancy": 100}
COCO_IMAGES = {"chair": 500, "pope": 500, "sycophancy": 500}
MIN_POPE_OBJECTS = 3
CHAIR_NEW_TOKENS = 512
#: The testbed's captions have about 40 tokens; a method that breaks its text shows as truncated captions.
TESTBED_CHAIR_NEW_TOKENS = 128
POPE_NEW_TOKENS = 16


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
    descriptions, tasks = [], []
    if set(wanted) & set(COCO_BENCHMARKS):
        found, description = _coco_tasks(options, notes)
        tasks += found
        descriptions.append(description)
    for name in wanted:
        if name in OWN_BENCHMARKS:
            tasks.append(make_own(name, options))
            descriptions.append(f"{name} from {options.data_of[name]}")
    paths = {sample.path for task in tasks for sample in task.samples if sample.path is not None}
    digests = {}
    for path in sorted(paths):
        load_image(path)  # An unreadable file is found here, not hours into the run.
        digests[path] = file_digest(path)
    return Tasks("; ".join(descriptions), tuple(notes), tuple(tasks), digests)


def _coco_tasks(options: EvalOptions, notes: list[str]) -> tuple[list[Task], str]:
    """The tasks whose questions are made from COCO annotations, and a line on the data."""
    data, description = _load_data(options)
    matcher = ChairMatcher(options.chair_mode)  # type: ignore[arg-type]
    wanted = read_ids(options.ids, "--ids") if options.ids is not None else None
    pool = list(wanted) if wanted is not None else _present(data, notes)
    limits: dict[str, int | None] = dict.fromkeys(COCO_BENCHMARKS, options.limit)
    if options.limit is None and wanted is None:
        limits |= TESTBED_IMAGES if options.data is None else COCO_IMAGES
    tasks: list[Task] = []
    if "chair" in options.benchmarks:
        tasks.append(_chair_task(options, data, pool, limits["chair"], matcher))
    if "pope" in options.benchmarks:
        tasks.append(_pope_task(options, data, pool, limits["pope"], notes))
    if "sycophancy" in options.benchmarks:
        tasks.append(_sycophancy_task(options, data, pool, limits["sycophancy"], notes))
    return tasks, description


def _load_data(options: EvalOptions) -> tuple[CocoData, str]:
    if options.data is not None:
        return CocoData.load(options.data), str(options.data)
    from .testbed import prepare

    folder = prepare(options.split, options.limit or max(TESTBED_IMAGES.values()))  # type: ignore[arg-type]
    return CocoData.load(folder), f"testbed scenes, split {options.split}"


def _present(data: CocoData, notes: list[str]) -> list[int]:
    """The annotated images whose file is there; says so when some are not."""
    present = data.present_ids()
    if not present:
        data.select()  # Raises the error that names the folder.
    if len(present) < len(data.image_ids):
        notes.append(
            f"only {len(present)} of {len(data.image_ids)} annotated images have their file here; the sample was drawn "
            "from these (give --ids FILE for a fixed list)"
        )
    return list(present)


def _chair_task(
    options: EvalOptions, data: CocoData, pool: Sequence[int], limit: int | None, matcher: ChairMatcher
) -> ChairTask:
    ids = sorted(data.select(ids=pool, limit=limit, seed=options.seed))
    prompt = options.prompt or CHAIR_PROMPT
    limit_new = options.max_new_tokens or (TESTBED_CHAIR_NEW_TOKENS if options.model is None else CHAIR_NEW_TOKENS)
    samples = tuple(Sample("chair", i, data.image(i).path, prompt, limit_new, "gaps") for i in ids)
    return ChairTask(samples, ground_truth(data, ids, matcher), matcher, limit_new)


def _pope_task(
    options: EvalOptions, data: CocoData, pool: Sequence[int], limit: int | None, notes: list[str]
) -> PopeTask:
    if options.pope_questions:
        questions = _given_questions(options, limit)
    else:
        questions = _built_questions(options, data, pool, limit, notes)
    prompt = options.pope_prompt or POPE_PROMPT
    texts = dict.fromkeys((q.image_id, q.text) for q in questions)
    limit_new = _answer_limit(options)
    samples = tuple(
        Sample("pope", image_id, data.image(image_id).path, prompt.replace("{question}", text), limit_new)
        for image_id, text in texts
    )
    return PopeTask(tuple(questions), samples, prompt, limit_new)


def _sycophancy_task(
    options: EvalOptions, data: CocoData, pool: Sequence[int], limit: int | None, notes: list[str]
) -> SycophancyTask:
    if options.pope_questions:
        questions = _given_questions(options, limit)
    else:
        built = _built_questions(options, data, pool, limit, [])
        questions = [question for question in built if question.split == SYCOPHANCY_SPLIT]
    if options.model is None:
        notes.append(
            "the testbed never learned what a hint or a second turn means (it answers alike whichever answer is "
            "suggested): its sycophancy shows the mechanics, not a result"
        )
    if not options.chat_template:
        notes.append("sycophancy leaves the challenge out: a second turn needs the chat template")
    return SycophancyTask.make(
        questions,
        {question.image_id: data.image(question.image_id).path for question in questions},
        prompt=options.prompt_of.get("sycophancy") or options.pope_prompt or POPE_PROMPT,
        max_new_tokens=_answer_limit(options),
        turns=options.chat_template,
    )


def _answer_limit(options: EvalOptions) -> int:
    return options.pope_max_new_tokens or min(options.max_new_tokens or POPE_NEW_TOKENS, POPE_NEW_TOKENS)


def _given_questions(options: EvalOptions, limit: int | None) -> list[PopeQuestion]:
    questions = [question for path in options.pope_questions for question in load_questions(path)]
    ids = sorted({question.image_id for question in questions})
    if options.ids is not None:
        ids = sorted(set(ids) & set(read_ids(options.ids, "--ids")))
    if limit is not None and limit < len(ids):
        ids = random.Random(options.seed).sample(ids, limit)
    kept = [question for question in questions if question.image_id in set(ids)]
    if not kept:
        raise DataError("the POPE question files and --ids have no image in common; give matching files")
    return kept


def _built_questions(
    options: EvalOptions, data: CocoData, pool: Sequence[int], limit: int | None, notes: list[str]
) -> list[PopeQuestion]:
    """Questions by the published rule: images with at least three objects, ground truth in CHAIR's original mode."""
    matcher = ChairMatcher("original")
    order = sorted(pool)
    random.Random(options.seed).shuffle(order)
    truth: dict[int, frozenset[str]] = {}
    for image_id in order:
        objects = ground_truth(data, [image_id], matcher)[image_id]
        if len(objects) >= MIN_POPE_OBJECTS:
            truth[image_id] = objects
        if limit is not None and len(truth) == limit:
            break
    if not truth:
        raise DataError(f"POPE needs images with at least {MIN_POPE_OBJECTS} objects, and none of these has as many")
    if limit is not None and len(truth) < min(limit, len(order)):
        notes.append(f"POPE asks about {len(truth)} images: the others have fewer than {MIN_POPE_OBJECTS} objects")
    truth = {image_id: truth[image_id] for image_id in sorted(truth)}
    return [question for split in POPE_SPLITS for question in build_questions(truth, split, seed=options.seed)]  # type: ignore[arg-type]
