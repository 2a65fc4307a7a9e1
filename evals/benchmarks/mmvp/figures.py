"""MMVP (Tong et al. 2024, arXiv:2401.06209): pairs of images, one question with two options, opposite right answers.

    accuracy = right answers / answers,  pair accuracy = pairs with both right / pairs

Two pairs were released with turned labels, which others have corrected since; both readings are figures. Officially
GPT-4 judges the answers; the rules here read letters and options.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from vlmfix.errors import DataError

from ...data.source import image_number
from ...stats.figures import Column, Figure, one, share
from ...stats.table import Table
from ..base import whole_groups
from ..yes_no import ACCURACY, YES_RATIO, says_yes, yes_no_columns

RELEASED: Mapping[int, tuple[str, bool]] = {
    99: ("tusk", True),
    100: ("tusk", False),
    279: ("sitting", True),
    280: ("sitting", False),
}
"""Ids whose label was released turned: a word of the question, and whether option (a) was right in the release."""

_OPTIONS = re.compile(r"\s*\(a\)\s*(.*?)\s*\(b\)\s*(.*?)\s*", re.IGNORECASE | re.DOTALL)

# A letter that is no word: behind it the answer ends, or a mark stands.
_ALONE = r"([ab])(?=\W*$|[.):,;\]*\"'])"
_LETTERS = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (r"\(([ab])\)", rf"^\W*{_ALONE}", rf"\banswer\s+is\W*{_ALONE}", r"\boption\s+\(?([ab])\b")
)

_LMMS = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        r"^\s*\(?([AB])\)?\.?\s*$",
        r"^\s*\(?([AB])\)?[\.\s]",
        r"answer\s+is\s+\(?([AB])\)?",
        r"option\s+\(?([AB])\)?",
        r"\(?([AB])\)?(?:\s|$)",
    )
)


@dataclass(frozen=True)
class MmvpQuestion:
    """One image with its question.

    Attributes:
        number: Its id, from 1; 1 and 2 are a pair.
        question: The question; empty where only answers are scored.
        options: ``(a) ... (b) ...``; empty where they are not known.
        label: Whether (a) is right, as the file says.
        path: The image's file; None where only answers are scored.
    """

    number: int
    question: str
    options: str
    label: bool
    path: Path | None = None

    @property
    def unit(self) -> str:
        """The pair."""
        return str((self.number - 1) // 2)

    @property
    def picture(self) -> str:
        """The image."""
        return str(self.number)

    @property
    def text(self) -> str:
        """The question with its options, as in the official code."""
        return f"{self.question} {self.options}".strip()

    @property
    def was_corrected(self) -> bool:
        """Whether its label was released turned."""
        word = RELEASED[self.number][0] if self.number in RELEASED else None
        return word is not None and (not self.question or word in self.question.lower())

    @property
    def released(self) -> bool:
        """Whether (a) is right in the release, whichever the file is."""
        return RELEASED[self.number][1] if self.was_corrected else self.label

    @property
    def corrected(self) -> bool:
        """Whether (a) is right after the corrections."""
        return not self.released if self.was_corrected else self.label


def split_options(text: str) -> tuple[str, str] | None:
    """The two options of ``(a) ... (b) ...``; None if it is something else."""
    found = _OPTIONS.fullmatch(text)
    return (found[1], found[2]) if found and found[1] and found[2] else None


def _letter_or_text(text: str, options: tuple[str, str] | None) -> bool | None:
    said = {found.lower() for letters in _LETTERS for found in letters.findall(text)}
    lowered = text.lower()
    # The longer option first, so that "not open" does not hold "open" too.
    for letter, option in sorted(zip("ab", options or (), strict=False), key=lambda each: -len(each[1])):
        rest = re.sub(rf"(?<!\w){re.escape(option.lower().rstrip('.'))}(?!\w)", " ", lowered)
        said |= {letter} if rest != lowered else set()
        lowered = rest
    return said == {"a"} if len(said) == 1 else None


def _lmms(text: str, options: tuple[str, str] | None) -> bool | None:
    text = text.strip()
    found = next((match[1] for pattern in _LMMS if (match := pattern.search(text))), text[:1])
    return {"a": True, "b": False}.get(found.lower())


PARSERS: Mapping[str, Callable[[str, tuple[str, str] | None], bool | None]] = {
    "letter_or_text": _letter_or_text,
    "lmms": _lmms,
}


def parse_answer(text: str, options: str = "", parser: str = "letter_or_text") -> bool | None:
    """Read option (a) (True) or (b) (False) from an answer; None for neither, which is wrong.

    Args:
        text: The answer.
        options: ``(a) ... (b) ...``, if they are known.
        parser: ``letter_or_text``: (a) or (b), the letter alone at the start or behind "answer is" or "option", or the
            words of an option; what names both is neither. ``lmms`` (lmms-eval): its five patterns, else the first
            character; it takes "A dog" and "sofa " for A.

    Raises:
        DataError: unknown parser.
    """
    if parser not in PARSERS:
        raise DataError(f"unknown MMVP parser {parser!r}: choose one of {', '.join(PARSERS)}")
    return PARSERS[parser](text, split_options(options))


@dataclass(frozen=True, eq=False)
class MmvpTable(Table):
    """One row per image; what is resampled are pairs.

    Columns: those of yes/no answers, with yes for option (a), by the released labels; on the first row of each pair
    with both answers ``pairs`` and ``whole_pairs`` if both are right; ``correct_corrected`` and ``whole_corrected`` by
    the corrected labels.
    """

    FIGURES: ClassVar[tuple[Figure, ...]] = (
        Figure(
            "pair_accuracy",
            "pairs",
            1,
            share("whole_pairs", "pairs"),
            head_control=True,
            headline=True,
            help="pairs with both answers right, by the released labels",
        ),
        Figure("accuracy", "accuracy", 1, ACCURACY, help="right answers, by the released labels"),
        Figure(
            "pair_accuracy_corrected",
            "pairs, corrected",
            1,
            share("whole_corrected", "pairs"),
            help="pairs with both answers right, with the labels of two pairs corrected",
        ),
        Figure(
            "accuracy_corrected",
            "accuracy, corrected",
            1,
            share("correct_corrected"),
            help="right answers, with the labels of two pairs corrected",
        ),
        Figure("a_ratio", "(a)", 0, YES_RATIO, help="answers that choose (a)"),
    )
    COUNTS: ClassVar[Mapping[str, Column]] = {
        "n": one,
        "correct": "correct",
        "pairs": "pairs",
        "pairs_correct": "whole_pairs",
        "correct_corrected": "correct_corrected",
        "pairs_correct_corrected": "whole_corrected",
        "a": says_yes,
        "unparsed": "unparsed",
    }


def whole_pairs(questions: Sequence[MmvpQuestion]) -> set[str]:
    """The pairs of which both images are there.

    Raises:
        DataError: The images of a pair have another question, or one right answer.
    """
    pairs: dict[str, list[MmvpQuestion]] = {}
    for question in questions:
        pairs.setdefault(question.unit, []).append(question)
    for pair in pairs.values():
        first, last = pair[0], pair[-1]
        if len(pair) > 2 or (len(pair) == 2 and first.number == last.number):
            raise DataError(f"MMVP image {first.number} is answered twice")
        if len(pair) == 2 and (first.text != last.text or first.released == last.released):
            raise DataError(
                f"MMVP images {first.number} and {last.number}: expected one question with opposite right answers: the "
                "ids are not those of the benchmark"
            )
    return {unit for unit, pair in pairs.items() if len(pair) == 2}


def score_answers(
    questions: Sequence[MmvpQuestion], answers: Sequence[str], *, parser: str = "letter_or_text"
) -> MmvpTable:
    """Score answers; a pair without one of its answers counts in the accuracy only.

    Args:
        questions: In any order.
        answers: One per question.
        parser: See :func:`parse_answer`.

    Raises:
        DataError: there is no question, a pair is none, or the parser is unknown.
    """
    if not questions:
        raise DataError("MMVP got no answers to score")
    whole = whole_pairs(questions)
    read = [parse_answer(text, q.options, parser) for q, text in zip(questions, answers, strict=True)]
    columns: dict[str, Any] = yes_no_columns([q.released for q in questions], read)
    units = [q.unit for q in questions]
    rows = np.asarray([unit in whole for unit in units], dtype=np.bool_)
    columns["correct_corrected"] = columns["prediction"] == np.asarray([q.corrected for q in questions])
    columns["pairs"], columns["whole_pairs"] = whole_groups(units, columns["correct"], rows)
    columns["whole_corrected"] = whole_groups(units, columns["correct_corrected"], rows)[1]
    return MmvpTable(
        np.asarray([image_number("mmvp", unit) for unit in units], dtype=np.int64),
        columns,
        items=tuple(str(q.number) for q in questions),
    )
