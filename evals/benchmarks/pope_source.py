"""POPE's questions with their images from anywhere but a COCO folder: the A-OKVQA and GQA variants, or a data set."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vlmfix.errors import DataError, VlmfixError

from ..data.pope import PopeQuestion, load_questions, read_questions
from .source import dataset_rows, find_image, is_dataset, row_image

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
