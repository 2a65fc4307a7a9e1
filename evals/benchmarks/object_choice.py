"""What a run asks of POPE's questions: those of a file or a data set, or those built by the published rule."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

from vlmfix.errors import DataError, VlmfixError

from ..data.records import read_ids
from ..data.source import choose, dataset_rows, find_image, is_dataset, row_image
from ..options import EvalOptions
from .choice import PAPER_IMAGES, RunData
from .coco_objects import ChairMatcher, ground_truth
from .object_questions import PopeQuestion, PopeSplit, build_questions, load_questions, read_questions, releases

#: What makes a model answer with one word; ``{question}`` is the question.
PROMPT = "{question}\nAnswer the question using a single word or phrase."

MIN_OBJECTS = 3
"""Images with fewer objects are not asked about."""

Asked = tuple[list[PopeQuestion], dict[int, Path]]


def load_asked(where: str, files: Sequence[Path]) -> Asked:
    """Read questions and find the image of each.

    Args:
        where: The folder of the images that ``files`` name; or a data set with question_id, question, answer,
            image_source (or image_id), image and category, such as lmms-lab/POPE.
        files: POPE question files; none with a data set.

    Returns:
        The questions, and image id to file.

    Raises:
        DataError: A file is broken or an image is missing.
        VlmfixError: Question files are given with a data set, or none with a folder.
    """
    if is_dataset(where):
        if files:
            raise VlmfixError("--benchmark-data pope=datasets:... brings its questions; leave --pope-questions out")
        return _from_dataset(where)
    if not files:
        raise VlmfixError(f"--benchmark-data pope={where} is a folder of images; give --pope-questions FILE with it")
    folder = Path(where)
    questions = [question for file in files for question in load_questions(file)]
    paths: dict[int, Path] = {}
    for question in questions:
        if question.image_id not in paths:
            paths[question.image_id] = find_image([folder, folder / "images"], [question.image], "POPE")
    return questions, paths


def _from_dataset(where: str) -> Asked:
    kept = []
    paths: dict[str, Path] = {}
    for place, row in dataset_rows(where):
        name = str(row.get("image_source") or row.get("image_id") or "")
        if name not in paths:
            path = row_image(row, place)
            if path is None or not name:
                raise DataError(f"{place}: expected an image, and its name under 'image_source' or 'image_id'")
            paths[name] = path
        fields = {
            "question_id": row.get("question_id"),
            "image": name if "." in name else f"{name}.jpg",
            "text": row.get("question", row.get("text")),
            "label": row.get("answer", row.get("label")),
            "category": row.get("category") or row["split"],
        }
        kept.append((place, fields))
    questions = read_questions(kept, "random")
    ids = {question.image: question.image_id for question in questions}
    return questions, {ids[n if "." in n else f"{n}.jpg"]: path for n, path in paths.items()}


def choose_questions(options: EvalOptions, data: RunData, splits: Sequence[PopeSplit], *, testbed_images: int) -> Asked:
    """What a run asks: questions that bring their images, those of the given files, else built by the published rule.

    Args:
        options: Of the run.
        data: Where the run's data are.
        splits: Those to build.
        testbed_images: How many of the testbed's scenes to ask about if nobody says.

    Returns:
        The questions, and image id to file.

    Raises:
        DataError: A file is missing or broken, or the images have too few objects.
    """
    where = data.given("pope")
    if where is not None:
        data.descriptions.append(f"pope from {where}")
        questions, paths = load_asked(where, releases(options.pope_questions)[0])
        return _limited(questions, options, data.limit(PAPER_IMAGES)), paths
    limit = data.limit(testbed_images)
    if options.pope_questions:
        read = [question for path in releases(options.pope_questions)[0] for question in load_questions(path)]
        questions = _limited(read, options, limit)
    else:
        truth = _images_with_objects(options, data, limit)
        questions = [q for split in splits for q in build_questions(truth, split, seed=options.seed)]
    return questions, {i: data.coco.image(i).path for i in dict.fromkeys(q.image_id for q in questions)}


def _limited(questions: Sequence[PopeQuestion], options: EvalOptions, limit: int | None) -> list[PopeQuestion]:
    ids = sorted({question.image_id for question in questions})
    if options.ids is not None:
        ids = sorted(set(ids) & set(read_ids(options.ids, "--ids")))
    chosen = set(choose(ids, limit, options.seed))
    kept = [question for question in questions if question.image_id in chosen]
    if not kept:
        raise DataError("the POPE question files and --ids have no image in common; give matching files")
    return kept


def _images_with_objects(options: EvalOptions, data: RunData, limit: int | None) -> dict[int, frozenset[str]]:
    """Images that the published rule asks about, with their objects: at least three, in CHAIR's original mode."""
    matcher = ChairMatcher("original")
    order = sorted(data.pool)
    random.Random(options.seed).shuffle(order)
    truth: dict[int, frozenset[str]] = {}
    for image_id in order:
        objects = ground_truth(data.coco, [image_id], matcher)[image_id]
        if len(objects) >= MIN_OBJECTS:
            truth[image_id] = objects
        if limit is not None and len(truth) == limit:
            break
    if not truth:
        raise DataError(f"POPE needs images with at least {MIN_OBJECTS} objects, and none of these has as many")
    if limit is not None and len(truth) < min(limit, len(order)):
        data.notes.append(
            f"POPE's rule asks about {len(truth)} images: the others have fewer than {MIN_OBJECTS} objects"
        )
    return {image_id: truth[image_id] for image_id in sorted(truth)}
