"""MMHal-Bench: 96 open questions of eight types, rated 0 to 6 by a judge (Sun et al. 2023, arXiv:2309.14525).

The questions are in ``response_template.json`` of the data set MMHal-Bench (Apache-2.0).

    average score = mean rating,  hallucination rate = share of ratings below 3

The judge is a language model that sees text only: the content of the image, a human's answer and the model's
(officially gpt-4-0314, temperature 0). None comes with this package: name a command or a callable, or have the
requests that are written judged elsewhere, and score the ratings. **The choice of the judge and of its instruction
changes the figures**: report both. The instruction below is ours, not the official one; ``instruction`` replaces it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from vlmfix.errors import DataError

from ...data.records import read_rows
from ...data.source import image_number
from ...stats.figures import Column, Figure, one, share
from ...stats.table import Table, check_columns

#: The types in the official order; an item's type is its index modulo eight.
TYPES = ("attribute", "adversarial", "comparison", "counting", "relation", "environment", "holistic", "other")

_FIELDS = ("question_type", "image_id", "image_content", "question", "gt_answer")

_SOURCE = "download response_template.json of MMHal-Bench"

MAX_RATING = 6

#: An answer rated lower has a hallucination.
HALLUCINATION_BELOW = 3

#: Ratings 3 to 6 mean no hallucination, 0 to 2 a hallucination; within both, more informative is better.
INSTRUCTION = """\
Judge whether an answer to a question about an image claims something that is not in the image. You do not see the \
image, but a list of what is in it and the correct answer of a human. Rate the answer:
6: very informative, no hallucination
5: informative, no hallucination
4: somewhat informative, no hallucination
3: not informative, no hallucination
2: very informative, with hallucination
1: somewhat informative, with hallucination
0: not informative, with hallucination
Explain in a few words, then end with one line "Rating: N"."""


@dataclass(frozen=True)
class MmhalItem:
    """One question.

    Attributes:
        index: Its place in the template, from 0.
        type: One of :data:`TYPES`.
        image_id: OpenImages id of the image.
        image_content: What is in the image.
        text: The question.
        reference: The answer of a human.
        row: Its entry of the template, without the image's bytes.
        path: The image's file; None where only answers are scored.
    """

    index: int
    type: str
    image_id: str
    image_content: tuple[str, ...]
    text: str
    reference: str
    row: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)
    path: Path | None = None

    @property
    def unit(self) -> str:
        """The question itself: each has an image of its own."""
        return f"{self.index:04d}"

    @property
    def picture(self) -> str:
        """The image's id."""
        return self.image_id


def load_mmhal(path: Path) -> list[MmhalItem]:
    """Read the template of MMHal-Bench, in file order; a filled-in ``model_answer`` is ignored.

    Raises:
        DataError: the file is missing or broken, an entry is incomplete or out of order, or a question occurs twice.
    """
    return read_items(read_rows(path, what="MMHal-Bench file", remedy=_SOURCE))


def read_items(rows: Iterable[tuple[str, Mapping[str, Any]]]) -> list[MmhalItem]:
    """Read questions from rows with the fields of the template, in its order, each with its place for messages.

    Raises:
        DataError: a row is incomplete or out of order, or a question occurs twice.
    """
    items: list[MmhalItem] = []
    seen: dict[tuple[str, str], int] = {}
    for number, (where, row) in enumerate(rows, 1):
        item = _item(row, number, where)
        first = seen.setdefault((item.image_id, item.text), number)
        if first != number:
            raise DataError(f"{where}: the same question as entry {first}: {_SOURCE}")
        items.append(item)
    return items


def _item(row: Mapping[str, Any], number: int, where: str) -> MmhalItem:
    if not all(name in row for name in _FIELDS):
        raise DataError(f"{where}: expected an object with {', '.join(_FIELDS)}, found {str(row)[:60]!r}: {_SOURCE}")
    kind = TYPES[(number - 1) % len(TYPES)]
    if row["question_type"] != kind:
        raise DataError(
            f"{where}: expected a question of type {kind!r}, found {row['question_type']!r}; the order of the template "
            "gives the types: leave it as released"
        )
    if not isinstance(row["image_content"], list):
        raise DataError(f"{where}: expected image_content to be a list, found {row['image_content']!r}")
    return MmhalItem(
        index=number - 1,
        type=kind,
        image_id=str(row["image_id"]),
        image_content=tuple(str(name) for name in row["image_content"]),
        text=str(row["question"]),
        reference=str(row["gt_answer"]),
        row={name: value for name, value in row.items() if name != "image"},
    )


def judge_prompt(item: MmhalItem, answer: str, *, instruction: str = INSTRUCTION) -> str:
    """What the judge is asked about one answer."""
    return (
        f"{instruction}\n\nImage contents: {', '.join(item.image_content)}\nQuestion: {item.text}\n"
        f"Answer of a human: {item.reference}\nAnswer to rate: {answer}\n"
    )


def parse_rating(judgement: str) -> int | None:
    """The rating in a judgement: the one s of 0 to 6 with "rating: s" in it, case ignored; None if none or several."""
    found = [s for s in range(MAX_RATING + 1) if f"rating: {s}" in judgement.lower()]
    return found[0] if len(found) == 1 else None


@dataclass(frozen=True, eq=False)
class MmhalTable(Table):
    """Ratings, one row per question; the type of the question is the split.

    Columns: ``rating`` int64 [n], 0 to 6; ``hallucinated`` bool [n], whether the rating says so; ``unparsed`` bool [n],
    judgements without one clear rating: they are rated 0, as in the official script.

    Attributes:
        judge: Who rated, for the table.
    """

    FIGURES: ClassVar[tuple[Figure, ...]] = (
        Figure(
            "average_score",
            "score/6",
            1,
            share("rating"),
            percent=False,
            head_control=True,
            headline=True,
            help="mean rating",
        ),
        Figure(
            "hallucination_rate", "hallucinated", -1, share("hallucinated"), headline=True, help="answers rated below 3"
        ),
    )
    COUNTS: ClassVar[Mapping[str, Column]] = {
        "n": one,
        "rating_sum": "rating",
        "hallucinated": "hallucinated",
        "unparsed": "unparsed",
    }

    judge: str = "unnamed"

    def by_type(self) -> dict[str, float]:
        """Average score of each type that occurs, in the official order, two decimals."""
        kinds = np.asarray(self.splits)
        return {name: round(float(self.rating[kinds == name].mean()), 2) for name in TYPES if name in self.splits}


def score_judgements(items: Sequence[MmhalItem], judgements: Sequence[str], *, judge: str = "unnamed") -> MmhalTable:
    """Score what a judge wrote about each answer (see :func:`parse_rating`).

    Args:
        items: The questions.
        judgements: One per question, in the same order.
        judge: Name of the judge, for the table.

    Raises:
        DataError: no items, or different lengths.
    """
    check_columns("MMHal-Bench", len(items), judgements=judgements)
    ratings = [parse_rating(text) for text in judgements]
    rating = np.asarray([rating or 0 for rating in ratings], dtype=np.int64)
    return MmhalTable(
        np.asarray([image_number("mmhal", item.image_id) for item in items], dtype=np.int64),
        {
            "rating": rating,
            "hallucinated": rating < HALLUCINATION_BELOW,
            "unparsed": np.asarray([rating is None for rating in ratings], dtype=np.bool_),
        },
        tuple(item.type for item in items),
        tuple(item.text for item in items),
        judge=judge,
    )
