"""POPE's questions for the answers of a file: those of question files, or those that bring their labels."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from vlmfix.errors import DataError

from ...data.answers import AnswerFile, yes_no
from ...data.matching import SPLIT_KEYS, Asked, Row
from ..object_questions import PopeQuestion, corrections, is_repope, load_questions, releases, without_removed

_REMEDY = "answer it, leave its question file out, or type --subset to score what is answered"


def answered_questions(
    file: AnswerFile, rows: Sequence[Row], options: Namespace
) -> tuple[list[PopeQuestion], list[Row], list[PopeQuestion]]:
    """The questions of the question files that are answered, the row that answers each, and those of RePOPE."""
    files, beside = releases(options.questions)
    questions, corrected = read_files(files), read_files(beside)
    if any(map(is_repope, files)):
        file.notes.append("the labels are RePOPE's: not comparable with figures of POPE")
        everything, rows = rows, without_removed(rows, questions)
        if removed := len(everything) - len(rows):
            file.facts["removed"] = removed
            file.notes.append(f"{removed} answers to questions that RePOPE leaves out are ignored")
    file.facts["questions"] = {
        path.name: sum(q.split == split for q in own)
        for paths, own in ((files, questions), (beside, corrected))
        for path, split in zip(paths, dict.fromkeys(q.split for q in own), strict=False)
    }
    found = file.matched(
        rows,
        [Asked((q.question_id,), q.text, q.image, yes_no(q.label), q.split) for q in questions],
        remedy=_REMEDY,
        source="the question files",
    )
    if unknown := len(corrected) - len(corrections(questions, corrected)):
        raise DataError(
            f"{unknown} questions of RePOPE's files are in none of POPE's; give the files of the same splits"
        )
    asked = [questions[index] for index in found]
    return asked, list(found.values()), corrections(asked, corrected)


def read_files(files: Sequence[Path]) -> list[PopeQuestion]:
    """The questions of several files.

    Raises:
        DataError: Two files are of one split: two releases, or one file twice.
    """
    questions: list[PopeQuestion] = []
    of_split: dict[str, tuple[Path, int]] = {}
    for path in files:
        own = load_questions(path)
        for split in dict.fromkeys(q.split for q in own):
            count = sum(q.split == split for q in own)
            first, others = of_split.setdefault(split, (path, count))
            if first is not path:
                raise DataError(
                    f"{first} and {path} both hold {split} questions ({others} and {count}): releases differ in "
                    "questions and labels (POPE's first has 2910 random ones, the current one 3000; RePOPE corrects "
                    "labels) and are never merged: give one of them (RePOPE's files are told by their names)"
                )
        questions += own
    return questions


def labelled_questions(file: AnswerFile, rows: Sequence[Row]) -> tuple[list[PopeQuestion], list[Row]]:
    """Questions made of rows that bring their labels.

    Raises:
        DataError: A label is missing or none, or two rows answer one question.
    """
    if all(row.image is not None and row.texts for row in rows):
        rows = file.distinct(rows)
    _refuse_second_answers(rows)
    labels = file.labels(rows, "without --questions every line needs one")
    images: dict[str, int] = {}
    known = all(row.image is not None for row in rows)
    asked = []
    for place, (row, label) in enumerate(zip(rows, labels, strict=True)):
        name = str(row.image) if row.image is not None else ""
        cluster = images.setdefault(name, len(images)) if known else place
        text = next(iter(row.texts.values()), None)
        item = f"{name}: {text}" if text is not None else f"{name}:{place}"
        asked.append(PopeQuestion(str(place), cluster, name, "", item, label, "all"))
    return asked, list(rows)


def _refuse_second_answers(rows: Sequence[Row]) -> None:
    """Refuse two rows about one question, as far as its id, or its image and text, say that it is one.

    Raises:
        DataError: There are such rows. Ids alone start again in every split, so that what they name must be said.
    """
    first: dict[tuple[object, ...], Row] = {}
    for row in rows:
        number, texts = row.id(("question_id",)), tuple(row.texts.values())
        if number is None and (row.image is None or not texts):
            continue
        split = tuple(str(row.fields.get(key)) for key in SPLIT_KEYS)
        if (other := first.setdefault((number, split, row.image, texts), row)) is not row:
            name = f"question {number[0]}" if number else f"{texts[0][:60]!r} about the image {row.image!r}"
            raise DataError(
                f"{row.where}: {name} is answered already, on {other.where}: keep only one of these lines, or say what "
                "tells them apart ('split', or image and question)"
            )
