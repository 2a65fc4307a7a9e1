"""What a run asks: images, captioning samples and POPE questions, chosen by seed and never by file order."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlmfix.errors import DataError, VlmfixError

from ..data.coco import CocoData, load_image
from ..data.records import read_ids
from ..data.samples import Sample
from ..data.write import file_digest
from ..options import BENCHMARKS, CHAIR_PROMPT, COCO_BENCHMARKS, OWN_BENCHMARKS, POPE_PROMPT, POPE_SPLITS, EvalOptions
from .amber import task as amber
from .base import Task
from .chair.matcher import ChairMatcher, ground_truth
from .chair.task import ChairTask
from .custom import task as custom
from .hallusionbench import task as hallusionbench
from .mme import task as mme
from .mmhal import task as mmhal
from .pope.questions import Asked, PopeQuestion, build_questions, load_asked, load_questions
from .pope.task import PopeTask
from .sycophancy.task import SPLIT as SYCOPHANCY_SPLIT
from .sycophancy.task import SycophancyTask

#: Descriptions of AMBER: as captions, but for the testbed, whose captions have about 40 tokens.
DESCRIPTION_NEW_TOKENS = 512


TESTBED_NEW_TOKENS = 128


def make_own(name: str, options: EvalOptions) -> Task:
    """Read a benchmark's questions and choose images.

    Args:
        name: One of ``config.OWN_BENCHMARKS``.
        options: Of the run; ``--max-new-tokens`` limits open answers, ``--pope-max-new-tokens`` yes/no answers.

    Raises:
        DataError: A file is missing or broken; the message names it.
    """
    return _MAKERS[name](options.data_of[name], options.prompt_of.get(name), options)


def _short(options: EvalOptions, default: int) -> int:
    return options.pope_max_new_tokens or min(options.max_new_tokens or default, default)


def _amber(where: str, prompt: str | None, options: EvalOptions) -> Task:
    long = options.max_new_tokens or (TESTBED_NEW_TOKENS if options.model is None else DESCRIPTION_NEW_TOKENS)
    return amber.AmberTask.make(
        where,
        limit=options.limit,
        seed=options.seed,
        prompt=prompt,
        max_new_tokens=(long, _short(options, amber.NEW_TOKENS)),
        spacy=options.spacy,
    )


def _mme(where: str, prompt: str | None, options: EvalOptions) -> Task:
    return mme.MmeTask.make(
        where,
        limit=options.limit,
        seed=options.seed,
        prompt=prompt,
        max_new_tokens=_short(options, mme.NEW_TOKENS),
    )


def _hallusionbench(where: str, prompt: str | None, options: EvalOptions) -> Task:
    return hallusionbench.HallusionTask.make(
        where,
        limit=options.limit,
        seed=options.seed,
        prompt=prompt,
        max_new_tokens=options.max_new_tokens or hallusionbench.NEW_TOKENS,
    )


def _mmhal(where: str, prompt: str | None, options: EvalOptions) -> Task:
    judge = None
    if isinstance(options.judge, str):
        judge = mmhal.Judge.of_command(options.judge, options.judge_name)
    elif options.judge is not None:
        judge = mmhal.Judge(str(options.judge_name), options.judge)
    return mmhal.MmhalTask.make(
        where,
        limit=options.limit,
        seed=options.seed,
        prompt=prompt,
        max_new_tokens=options.max_new_tokens or mmhal.NEW_TOKENS,
        judge=judge,
    )


def _custom(where: str, prompt: str | None, options: EvalOptions) -> Task:
    return custom.CustomTask.make(
        where,
        limit=options.limit,
        seed=options.seed,
        prompt=prompt,
        max_new_tokens=options.max_new_tokens or custom.NEW_TOKENS,
    )


_MAKERS: Mapping[str, Callable[[str, str | None, EvalOptions], Task]] = {
    "amber": _amber,
    "mme": _mme,
    "hallusionbench": _hallusionbench,
    "mmhal": _mmhal,
    "custom": _custom,
}


#: Images per benchmark of a run that names no limit: the testbed's run fits into three minutes on two cores (a POPE
#: image costs ten answers, one of sycophancy 24, a caption one), COCO's follow the papers.
TESTBED_IMAGES = {"chair": 400, "pope": 200, "sycophancy": 100}


COCO_IMAGES = {"chair": 500, "pope": 500, "sycophancy": 500}


MIN_POPE_OBJECTS = 3


CHAIR_NEW_TOKENS = 512


#: The testbed's captions have about 40 tokens; a method that breaks its text shows as truncated captions.
TESTBED_CHAIR_NEW_TOKENS = 128


POPE_NEW_TOKENS = 16


@dataclass(frozen=True, eq=False)
class CocoChoice:
    """A COCO folder and the images to choose from.

    Attributes:
        data: The folder.
        description: One line on it, for the report.
        pool: Image ids.
        limits: Benchmark to its number of images, None for all.
    """

    data: CocoData
    description: str
    pool: tuple[int, ...]
    limits: Mapping[str, int | None]

    @classmethod
    def load(cls, options: EvalOptions, notes: list[str]) -> CocoChoice:
        """Read the folder, or make the testbed's; what the reader must know goes to ``notes``."""
        data, description = _load_data(options)
        pool = read_ids(options.ids, "--ids") if options.ids is not None else _present(data, notes)
        return cls(data, description, tuple(pool), _limits(options))


def _limits(options: EvalOptions) -> dict[str, int | None]:
    if options.limit is None and options.ids is None:
        return {**(TESTBED_IMAGES if options.data is None else COCO_IMAGES)}
    return dict.fromkeys(COCO_BENCHMARKS, options.limit)


def _load_data(options: EvalOptions) -> tuple[CocoData, str]:
    if options.data is not None:
        return CocoData.load(options.data), str(options.data)
    from ..testbed import prepare

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


def chair_task(options: EvalOptions, coco: CocoChoice) -> ChairTask:
    """Images to caption, with their ground truth."""
    ids = sorted(coco.data.select(ids=coco.pool, limit=coco.limits["chair"], seed=options.seed))
    prompt, matcher = options.prompt or CHAIR_PROMPT, ChairMatcher(options.chair_mode)  # type: ignore[arg-type]
    limit_new = options.max_new_tokens or (TESTBED_CHAIR_NEW_TOKENS if options.model is None else CHAIR_NEW_TOKENS)
    samples = tuple(Sample("chair", i, coco.data.image(i).path, prompt, limit_new, "gaps") for i in ids)
    return ChairTask(samples, ground_truth(coco.data, ids, matcher), matcher, limit_new)


def given_questions(options: EvalOptions, name: str) -> Asked | None:
    """Questions that bring their images (``--benchmark-data pope=...``), at most so many images as are wanted.

    Args:
        options: Of the run.
        name: ``"pope"`` or ``"sycophancy"``.
    """
    where = options.data_of.get("pope")
    if where is None:
        return None
    questions, paths = load_asked(where, options.pope_questions)
    limit = options.limit if options.limit is not None or options.ids is not None else COCO_IMAGES[name]
    return _limited(questions, options, limit), paths


def coco_questions(options: EvalOptions, coco: CocoChoice, name: str, notes: list[str]) -> Asked:
    """Questions about images of a COCO folder: those of the given files, else built by the published rule.

    Args:
        options: Of the run.
        coco: The folder.
        name: ``"pope"`` or ``"sycophancy"``, which takes one split of those built.
        notes: What the reader must know.
    """
    if options.pope_questions:
        read = [question for path in options.pope_questions for question in load_questions(path)]
        questions = _limited(read, options, coco.limits[name])
    else:
        splits = POPE_SPLITS if name == "pope" else (SYCOPHANCY_SPLIT,)
        questions = _built_questions(options, coco, coco.limits[name], splits, notes)
    return questions, {i: coco.data.image(i).path for i in dict.fromkeys(q.image_id for q in questions)}


def pope_task(options: EvalOptions, asked: Asked) -> PopeTask:
    """POPE's questions, each different one asked once."""
    questions, paths = asked
    prompt = options.pope_prompt or POPE_PROMPT
    limit_new = _answer_limit(options)
    samples = tuple(
        Sample("pope", image_id, paths[image_id], prompt.replace("{question}", text), limit_new)
        for image_id, text in dict.fromkeys((q.image_id, q.text) for q in questions)
    )
    return PopeTask(tuple(questions), samples, prompt, limit_new)


def sycophancy_task(options: EvalOptions, asked: Asked, notes: list[str]) -> SycophancyTask:
    """POPE's questions with hints and doubts."""
    if options.model is None:
        notes.append(
            "the testbed never learned what a hint or a second turn means (it answers alike whichever answer is "
            "suggested): its sycophancy shows the mechanics, not a result"
        )
    if not options.chat_template:
        notes.append("sycophancy leaves the challenge out: a second turn needs the chat template")
    return SycophancyTask.make(
        *asked,
        prompt=options.prompt_of.get("sycophancy") or options.pope_prompt or POPE_PROMPT,
        max_new_tokens=_answer_limit(options),
        turns=options.chat_template,
    )


def _answer_limit(options: EvalOptions) -> int:
    return options.pope_max_new_tokens or min(options.max_new_tokens or POPE_NEW_TOKENS, POPE_NEW_TOKENS)


def _limited(questions: Sequence[PopeQuestion], options: EvalOptions, limit: int | None) -> list[PopeQuestion]:
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
    options: EvalOptions, coco: CocoChoice, limit: int | None, splits: Sequence[str], notes: list[str]
) -> list[PopeQuestion]:
    """Questions by the published rule: images with at least three objects, ground truth in CHAIR's original mode."""
    matcher = ChairMatcher("original")
    order = sorted(coco.pool)
    random.Random(options.seed).shuffle(order)
    truth: dict[int, frozenset[str]] = {}
    for image_id in order:
        objects = ground_truth(coco.data, [image_id], matcher)[image_id]
        if len(objects) >= MIN_POPE_OBJECTS:
            truth[image_id] = objects
        if limit is not None and len(truth) == limit:
            break
    if not truth:
        raise DataError(f"POPE needs images with at least {MIN_POPE_OBJECTS} objects, and none of these has as many")
    if limit is not None and len(truth) < min(limit, len(order)):
        notes.append(
            f"POPE's rule asks about {len(truth)} images: the others have fewer than {MIN_POPE_OBJECTS} objects"
        )
    truth = {image_id: truth[image_id] for image_id in sorted(truth)}
    return [question for split in splits for question in build_questions(truth, split, seed=options.seed)]  # type: ignore[arg-type]


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
