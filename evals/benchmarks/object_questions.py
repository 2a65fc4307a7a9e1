"""POPE questions: "Is there a dog in the image?" (Li et al. 2023, arXiv:2305.10355).

Per image ``num_positive`` objects that are in it are asked for, each followed by one object that is not, chosen
at random (``random``), as the most frequent object (``popular``) or as the object that most often occurs together with
the positive (``adversarial``).
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from vlmfix.errors import DataError

from ..data.matching import Row, id_text, image_name, plain
from ..data.records import read_rows

PopeSplit = Literal["random", "popular", "adversarial"]

SPLITS: tuple[PopeSplit, ...] = get_args(PopeSplit)

#: POPE's question. The first release replaced every "a" of the template before a vowel, hence "imange".
_QUESTION = re.compile(r"\s*Is there an? (?P<object>.+?) in the im(?:an|a)ge\?", re.IGNORECASE)

# GQA names some of its images "n123.jpg"; a number is never cut out of any other name.
_IMAGE_ID = re.compile(r"(?:.*/)?(?:COCO_[a-z]+\d{4}_|n)?(\d+)\.\w+", re.ASCII)

_QUESTIONS_OF_A_SPLIT = 3000  # of POPE's current release

_REMEDY = (
    "download coco_pope_random.json, coco_pope_popular.json and coco_pope_adversarial.json from RUCAIBox/POPE, or "
    "write one JSON object with question_id, image, text and label per line"
)


@dataclass(frozen=True)
class PopeQuestion:
    """One yes/no question about one object in one image.

    Attributes:
        question_id: Its id within the split, as a string.
        image_id: COCO id of the image.
        image: File name of the image.
        object: The object asked for.
        text: The question, without any instruction how to answer.
        label: Whether the object is there (yes).
        split: "random", "popular" or "adversarial", with the name of its set before it if that is not COCO's own
            ("gqa_random"); or the name of the file it was read from.
    """

    question_id: str
    image_id: int
    image: str
    object: str
    text: str
    label: bool
    split: str


def load_questions(path: Path | str) -> list[PopeQuestion]:
    """Read a POPE question file: JSON lines or one JSON list, with question_id, image, text and label (yes or no).

    The split comes from a field "category" if the line has one, else from the file name: "random" of
    ``coco_pope_random.json``, and "gqa_random" of ``gqa_pope_random.json``, with the name of the set.

    Raises:
        DataError: the file is missing or empty, a line is broken or incomplete, or an id occurs twice. The message
            names the line.
    """
    path = Path(path)
    rows = read_rows(path, what="POPE question file", remedy=_REMEDY)
    return read_questions(rows, split_name(path))


def split_name(path: Path) -> str:
    """The split of a question file, with the name of its set if that is not COCO's own."""
    split = next((name for name in SPLITS if name in path.stem), None)
    if split is None:
        return path.stem
    source, found, _ = path.stem.partition("_pope")
    return f"{source}_{split}" if found and source not in ("", "coco") else split


def read_questions(rows: Iterable[tuple[str, Mapping[str, Any]]], split: str) -> list[PopeQuestion]:
    """Read questions from rows with question_id, image, text and label, each with its place for messages.

    Args:
        rows: Place and fields.
        split: Of rows without "category".

    Raises:
        DataError: a row is incomplete, or an id occurs twice within a split.
    """
    questions: list[PopeQuestion] = []
    places: dict[tuple[str, str], str] = {}
    for where, row in rows:
        question = _question(row, split, where)
        first = places.setdefault((question.split, question.question_id), where)
        if first is not where:
            raise DataError(
                f"{where}: the question id {question.question_id} is used already, on {first}: make the ids unique"
            )
        questions.append(question)
    return questions


def _question(row: Mapping[str, Any], split: str, where: str) -> PopeQuestion:
    fields = ("question_id", "image", "text", "label")
    if not all(isinstance(row.get(name), str | int) for name in fields):
        raise DataError(
            f"{where}: expected question_id, image, text and label, found {str(dict(row))[:80]!r}: {_REMEDY}"
        )
    number, image, text, label = (str(row[name]) for name in fields)
    label = label.strip().lower()
    asked, image_number = _QUESTION.match(text), _IMAGE_ID.fullmatch(image)
    if asked is None:
        raise DataError(f"{where}: expected 'Is there a ... in the image?', found {text!r}")
    if image_number is None:
        raise DataError(
            f"{where}: expected an image name that ends in its COCO id, like COCO_val2014_000000310196.jpg, "
            f"found {image!r}"
        )
    if label not in ("yes", "no"):
        raise DataError(f"{where}: expected the label yes or no, found {label!r}")
    return PopeQuestion(
        number, int(image_number[1]), image, asked["object"], text, label == "yes", str(row.get("category", split))
    )


def is_repope(path: Path) -> bool:
    """Whether a question file is one of RePOPE, which nothing but its name tells: POPE's have the same fields."""
    return "repope" in path.name.lower()


def releases(files: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """Tell POPE's question files from RePOPE's beside them; RePOPE's alone are taken as POPE's are."""
    repope = [path for path in files if is_repope(path)]
    pope = [path for path in files if not is_repope(path)]
    return (pope, repope) if pope else (repope, [])


def corrections(questions: Sequence[PopeQuestion], corrected: Sequence[PopeQuestion]) -> list[PopeQuestion]:
    """RePOPE's questions among some of POPE's, in the order of the latter.

    Args:
        questions: Of POPE.
        corrected: Of RePOPE.

    Raises:
        DataError: An id means another question in RePOPE.
    """
    by_id = {(q.split, q.question_id): q for q in corrected}
    found = [(q, by_id[q.split, q.question_id]) for q in questions if (q.split, q.question_id) in by_id]
    for ours, theirs in found:
        if (ours.image_id, plain(ours.text)) != (theirs.image_id, plain(theirs.text)):
            raise DataError(
                f"the {ours.split} question {ours.question_id} is {ours.text!r} about {ours.image} in POPE's file, and "
                f"{theirs.text!r} about {theirs.image} in RePOPE's, which corrects POPE's current release (3000 "
                "questions a split)"
            )
    return [theirs for _, theirs in found]


def without_removed(rows: Sequence[Row], questions: Sequence[PopeQuestion]) -> Sequence[Row]:
    """The rows without answers to questions of POPE that RePOPE leaves out, as in its official script.

    The question that stands beside such an answer is one of POPE's, about an image of RePOPE, and not asked there.

    Args:
        rows: Of an answer file.
        questions: Those of RePOPE.
    """
    splits = list(dict.fromkeys(q.split for q in questions))
    ids = {(q.split, q.question_id) for q in questions}
    asked = {(q.split, image_name(q.image), plain(q.text)) for q in questions}
    images = {image for _, image, _ in asked}

    def is_removed(row: Row) -> bool:
        said = [split for split in splits if row.fields.get("split") in (None, split)]
        found = next((match for text in row.texts.values() if (match := _QUESTION.search(text))), None)
        number = id_text(row.fields.get("question_id"))
        if found is None or any((split, number) in ids for split in said):
            return False
        known = number.isdecimal() and 1 <= int(number) <= _QUESTIONS_OF_A_SPLIT
        if row.image is None:
            return known
        there = any((split, row.image, plain(found[0])) in asked for split in said)
        return (known or not number) and row.image in images and not there

    return [row for row in rows if not is_removed(row)] or rows


def question_text(name: str) -> str:
    """The question for an object, with "an" before a vowel and no grammar for plurals, as in the current release."""
    return f"Is there {'an' if name[:1].lower() in 'aeiou' else 'a'} {name} in the image?"


@dataclass(frozen=True)
class ObjectStatistics:
    """How often objects occur, and occur together, in a set of images.

    Attributes:
        frequency: Object -> number of images with it; most frequent first, ties in the order of first occurrence.
        together: Object -> (other object -> number of images with both), in the same order.
    """

    frequency: Mapping[str, int]
    together: Mapping[str, Mapping[str, int]] = field(repr=False)

    @classmethod
    def of(cls, images: Iterable[Sequence[str]]) -> ObjectStatistics:
        """Count over the object lists of images."""
        frequency: Counter[str] = Counter()
        together: dict[str, Counter[str]] = {}
        for names in images:
            frequency.update(names)
            for name in names:
                together.setdefault(name, Counter()).update(other for other in names if other != name)
        return cls(
            dict(frequency.most_common()), {name: dict(counts.most_common()) for name, counts in together.items()}
        )


def build_questions(
    ground_truth: Mapping[int, Collection[str]],
    split: PopeSplit,
    *,
    num_positive: int = 3,
    seed: int = 0,
    image_name: str = "COCO_val2014_{:012d}.jpg",
) -> list[PopeQuestion]:
    """Make POPE questions by the published rule: 2 * ``num_positive`` per image, positives and negatives in turn.

    Images with fewer than ``num_positive`` objects are left out, of the counts too. Positives are the first objects of
    an image: in the given order if its collection is a sequence, else in an order drawn from ``seed``. A negative is
    never in the image and never asked twice for it; ties go to the object that occurred first; if no object ever occurs
    together with the positive, the adversarial negative is drawn at random.

    Args:
        ground_truth: Image id -> objects in the image. The published questions follow CHAIR's ``original`` ground
            truth.
        split: Rule of the negatives.
        num_positive: Positives per image.
        seed: Of every random choice.
        image_name: Format of the image file names.

    Raises:
        DataError: unknown split, no image has enough objects, or an image has all objects so that nothing is left to
            ask for.
    """
    if split not in SPLITS:
        raise DataError(f"POPE has the splits {', '.join(SPLITS)}, not {split!r}")
    if num_positive < 1:
        raise DataError(f"num_positive must be at least 1, not {num_positive}")
    rng = random.Random(seed)
    images = {i: _ordered(names, rng) for i, names in ground_truth.items()}
    images = {i: names for i, names in images.items() if len(names) >= num_positive}
    if not images:
        raise DataError(f"no image has {num_positive} objects or more: lower num_positive, or give more images")
    statistics = ObjectStatistics.of(images.values())
    questions: list[PopeQuestion] = []
    for image_id, names in images.items():
        asked: set[str] = set()
        for positive in names[:num_positive]:
            asked.add(positive)
            negative = _negative(split, positive, asked.union(names), statistics, rng)
            if negative is None:
                raise DataError(
                    f"the images show no object besides those that are in image {image_id} or were asked about: give "
                    "more images"
                )
            asked.add(negative)
            for name in (positive, negative):
                file_name = image_name.format(image_id)
                questions.append(
                    PopeQuestion(
                        str(len(questions) + 1), image_id, file_name, name, question_text(name), name == positive, split
                    )
                )
    return questions


def _ordered(names: Collection[str], rng: random.Random) -> list[str]:
    if isinstance(names, Sequence):
        return list(dict.fromkeys(names))
    order = sorted(names)
    rng.shuffle(order)
    return order


def _negative(
    split: PopeSplit, positive: str, excluded: Collection[str], statistics: ObjectStatistics, rng: random.Random
) -> str | None:
    everything = [name for name in statistics.frequency if name not in excluded]
    if not everything:
        return None
    ranked = {
        "random": [],
        "popular": everything,
        "adversarial": [n for n in statistics.together[positive] if n not in excluded],
    }[split]
    return ranked[0] if ranked else rng.choice(everything)
