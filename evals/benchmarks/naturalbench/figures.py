"""NaturalBench (Li et al. 2024, arXiv:2410.14669): two questions about two images, their figures.

The right answers of a group are yes, no, no, yes (or A, B, B, A), in the order of :data:`ORDER`. So a model that
ignores the image, or the question, or leans to yes has no group right:

    Acc    right answers / answers
    Q-Acc  questions right on both images / questions
    I-Acc  images with both questions right / images
    G-Acc  groups with all four right / groups
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from vlmfix.errors import DataError

from ...data.source import image_number
from ...stats.figures import Column, Figure, one, share
from ...stats.table import Table
from ..base import whole_groups
from ..yes_no import ACCURACY, says_yes, yes_no_columns

ORDER = ((0, 0, True), (0, 1, False), (1, 0, False), (1, 1, True))
"""Question, image and whether the first option (yes, A) is right, of each item of a group."""

SUFFIXES: Mapping[str, str] = {
    "yes_no": "Please answer Yes or No.",
    "multiple_choice": "Please output the letter corresponding to the correct option.",
}
"""Kinds of questions, and what is asked behind them."""

OPTIONS: Mapping[str, tuple[str, str]] = {"yes_no": ("Yes", "No"), "multiple_choice": ("A", "B")}

_WORDS = {
    kind: tuple(re.compile(rf"\b{option}\b", re.IGNORECASE) for option in options) for kind, options in OPTIONS.items()
}
_ARTICLE = re.compile(r"\ba\b")
_B = re.compile(r"\bB\b")


@dataclass(frozen=True)
class NaturalItem:
    """One question about one image.

    Attributes:
        number: Its place in the benchmark: four times the group, and the place in :data:`ORDER`.
        kind: One of :data:`SUFFIXES`.
        question: The question, with its options; empty where only answers are scored.
        label: Whether the first option is right.
        image: Name of the image.
        path: Its file; None where only answers are scored.
    """

    number: int
    kind: str
    question: str
    label: bool
    image: str = ""
    path: Path | None = None

    @property
    def unit(self) -> str:
        """The group."""
        return str(self.number // 4)

    @property
    def picture(self) -> str:
        """The image within the benchmark."""
        return f"{self.unit}/{ORDER[self.number % 4][1]}"

    @property
    def text(self) -> str:
        """The question with what its kind adds, which official code joins without the blank."""
        return f"{self.question} {SUFFIXES[self.kind]}"

    @property
    def right(self) -> str:
        """The right answer."""
        return OPTIONS[self.kind][0 if self.label else 1]


def parse_answer(text: str, kind: str) -> bool | None:
    """Whether the first option (True) or the second is named first, as a word of any case; None for neither.

    Args:
        text: The answer.
        kind: ``yes_no`` or ``multiple_choice``. The official rule takes the article "a" for the option A.
    """
    first, second = (found.start() if (found := word.search(text)) else None for word in _WORDS[kind])
    if first is None or second is None:
        return None if first is second else second is None
    return first < second


def is_article(text: str) -> bool:
    """Whether a lower-case "a", which may be an article, stands before the option B and is read as A."""
    article, option = _ARTICLE.search(text), _B.search(text)
    return bool(article and option and article.start() < option.start() and parse_answer(text, "multiple_choice"))


def _yes_no(table: Any) -> Any:
    return np.asarray(table.splits) == "yes_no"


@dataclass(frozen=True, eq=False)
class NaturalTable(Table):
    """One row per answer; its splits are the kinds of questions, and what is resampled are groups.

    Columns: those of yes/no answers, with yes for the option A. On the first row of each group, question and image
    ``groups``, ``both_images`` (of a question) and ``both_questions`` (of an image), bool [n], and ``whole_...`` if all
    answers of it are right. ``article`` marks answers read as A that may be B.
    """

    FIGURES: ClassVar[tuple[Figure, ...]] = (
        Figure(
            "g_acc",
            "G-Acc",
            1,
            share("whole_groups", "groups"),
            head_control=True,
            headline=True,
            help="groups with all four answers right",
        ),
        Figure("q_acc", "Q-Acc", 1, share("whole_both_images", "both_images"), help="questions right on both images"),
        Figure(
            "i_acc",
            "I-Acc",
            1,
            share("whole_both_questions", "both_questions"),
            help="images with both questions right",
        ),
        Figure("acc", "Acc", 1, ACCURACY, help="right answers"),
        Figure(
            "yes_ratio",
            "yes",
            0,
            share(lambda t: says_yes(t) & _yes_no(t), _yes_no),
            help="answers to yes/no questions that say yes",
        ),
    )
    COUNTS: ClassVar[Mapping[str, Column]] = {
        "n": one,
        "correct": "correct",
        "questions": "both_images",
        "questions_right": "whole_both_images",
        "images": "both_questions",
        "images_right": "whole_both_questions",
        "groups": "groups",
        "groups_right": "whole_groups",
        "unparsed": "unparsed",
        "article_before_b": "article",
    }


def whole(items: Sequence[NaturalItem]) -> set[str]:
    """The groups of which all four items are there.

    Raises:
        DataError: The right answers of a group are not as in :data:`ORDER`: the file is in another order.
    """
    groups: dict[str, set[int]] = {}
    for item in items:
        place = item.number % 4
        if item.label != ORDER[place][2]:
            options = OPTIONS[item.kind]
            expected = ", ".join(options[0 if label else 1] for *_, label in ORDER)
            raise DataError(
                f"NaturalBench item {item.number}: the right answer is {item.right}, and those of a group are "
                f"{expected}: the items are in another order than the benchmark's"
            )
        groups.setdefault(item.unit, set()).add(place)
    return {unit for unit, places in groups.items() if len(places) == len(ORDER)}


def score_answers(items: Sequence[NaturalItem], answers: Sequence[str]) -> NaturalTable:
    """Score answers by the official rule, against the right answers.

    Args:
        items: Of whole groups, in any order.
        answers: One per item.

    Raises:
        DataError: there is no item, one stands twice, a group lacks one, or the right answers are no group's.
    """
    numbers = {item.number for item in items}
    if not items or len(numbers) != len(items):
        raise DataError("NaturalBench needs answers to whole groups, one to each item")
    lacking = {item.unit for item in items} - whole(items)
    if lacking:
        raise DataError(f"NaturalBench group {min(lacking, key=int)}: expected answers to all of its four items")
    read = [parse_answer(text, item.kind) for item, text in zip(items, answers, strict=True)]
    columns = yes_no_columns([item.label for item in items], read)
    parts: dict[str, list[Any]] = {
        "groups": [item.unit for item in items],
        "both_images": [(item.unit, ORDER[item.number % 4][0]) for item in items],
        "both_questions": [(item.unit, ORDER[item.number % 4][1]) for item in items],
    }
    for name, keys in parts.items():
        columns[name], columns[f"whole_{name}"] = whole_groups(keys, columns["correct"])
    articles = [item.kind == "multiple_choice" and is_article(t) for item, t in zip(items, answers, strict=True)]
    return NaturalTable(
        np.asarray([image_number("naturalbench", item.unit) for item in items], dtype=np.int64),
        {**columns, "article": np.asarray(articles, dtype=np.bool_)},
        tuple(item.kind for item in items),
        tuple(str(item.number) for item in items),
    )
