"""HallusionBench: are the answers to all variants of a question right? (Guan et al. 2024, arXiv:2310.14566).

A judge (officially GPT-4) marks each answer: 1 correct, 0 incorrect, 2 unclear. Unclear is correct for a question
without an image, else wrong.

    aAcc  = correct questions / questions
    qAcc  = groups (category, subcategory, set_id, question_id) with every variant correct / groups
    fAcc  = figures with every question correct / figures (questions without an image belong to none)
    easy, hard = qAcc of the variants with visual_input != 2, and == 2 (edited images)

The diagnosis blames each wrong answer on language (LH), vision (VI) or either (Mix); it needs a second judgement,
``same``: does the answer agree with that to the original variant?
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vlmfix.errors import DataError

from ..yes_no import parse_answer
from .data import HallusionQuestion

INCORRECT, CORRECT, UNCLEAR = 0, 1, 2


@dataclass(frozen=True, eq=False)
class HallusionTable:
    """Judgements, one per question; every figure is made of their counts.

    Attributes:
        questions: The questions.
        code: int8 [n], 0 incorrect, 1 correct, 2 unclear.
        same: bool [n], whether the answer agrees with that to the original variant, or None if not judged.
        judge: Who gave the codes, for the table.
        unparsed: Answers that the offline reader left open (they are code 2); None if a judge gave the codes.
    """

    questions: tuple[HallusionQuestion, ...]
    code: NDArray[np.int8]
    same: NDArray[np.bool_] | None
    judge: str
    unparsed: int | None

    def __len__(self) -> int:
        return len(self.questions)

    @property
    def correct(self) -> NDArray[np.bool_]:
        """Whether the answer counts as correct, bool [n]."""
        excused = np.asarray([q.without_image for q in self.questions])
        return np.asarray((self.code == CORRECT) | ((self.code == UNCLEAR) & excused))

    def counts(self) -> dict[str, dict[str, int] | int]:
        """Integer counts under the official names; LH, VI and Mix are there if ``same`` was judged."""
        pairs, figures, easy, hard = self._groups()
        pair = {"total": len(pairs), "total_q": len(self), "correct": _all_right(pairs)}
        pair["wrong"] = pair["total"] - pair["correct"]
        counts: dict[str, dict[str, int] | int] = {
            "total": len(self),
            "correct": int(self.correct.sum()),
            "unclear": int((self.code == UNCLEAR).sum()),
            "consistency": {
                "total": len(figures),
                "correct": _all_right(figures),
                "wrong": sum(not any(group) for group in figures),
                "inconsistent": sum(any(group) and not all(group) for group in figures),
            },
            "pair": pair if self.same is None else pair | self._diagnosis(self.same),
            "easy_total": len(easy),
            "easy_correct": _all_right(easy),
            "easy_q": sum(map(len, easy)),
            "hard_total": len(hard),
            "hard_correct": _all_right(hard),
            "hard_q": sum(map(len, hard)),
        }
        return counts if self.unparsed is None else {**counts, "unparsed": self.unparsed}

    def figures(self) -> dict[str, float]:
        """aAcc, qAcc, fAcc, easy and hard as percentages; NaN if there is nothing to count."""
        pairs, figures, easy, hard = self._groups()
        return {
            "aAcc": 100 * float(self.correct.mean()),
            "qAcc": _percent(pairs),
            "fAcc": _percent(figures),
            "easy": _percent(easy),
            "hard": _percent(hard),
        }

    def yes_no(self) -> dict[str, float]:
        """``diff``: share of yes in the answers (a wrong answer is the opposite of the label) minus that in the labels.

        ``fp``: share of the wrong answers whose label is no; NaN without wrong answers.
        """
        label = np.asarray([q.label for q in self.questions])
        wrong = ~self.correct
        answered_yes = self.correct == label
        return {
            "diff": float(answered_yes.mean()) - float(label.mean()),
            "fp": float((~label[wrong]).mean()) if wrong.any() else math.nan,
        }

    def _groups(self) -> tuple[list[list[bool]], ...]:
        """Which answers are correct, per question group, per figure, and per group of easy and of hard variants."""
        rows = list(zip(self.questions, self.correct.tolist(), strict=True))
        return (
            _groups((q.group, c) for q, c in rows),
            _groups((q.figure, c) for q, c in rows if q.figure is not None),
            _groups((q.group, c) for q, c in rows if q.visual_input != 2),
            _groups((q.group, c) for q, c in rows if q.visual_input == 2),
        )

    def _diagnosis(self, same: NDArray[np.bool_]) -> dict[str, int]:
        """Groups (LH, VI, Mix) and answers (LH_cg, VI_cg, Mix_cg) by cause; a group has the causes of its answers."""
        codes = self.code.tolist()
        original = {q.group: code for q, code in zip(self.questions, codes, strict=True) if q.original}
        causes: dict[Hashable, set[str]] = {}
        single = {"LH": 0, "VI": 0, "Mix": 0}
        for q, code, agrees in zip(self.questions, codes, same.tolist(), strict=True):
            if q.group not in original:
                raise DataError(
                    f"the diagnosis of HallusionBench needs the original (figure_id 0) of {'/'.join(q.group)}: answer "
                    "it too, or leave 'same' out"
                )
            cause = _causes(q, code, original[q.group], agrees)
            causes.setdefault(q.group, set()).update(cause)
            if cause:
                single["Mix" if len(cause) == 2 else next(iter(cause))] += 1
        grouped = [("Mix" if len(cause) == 2 else next(iter(cause))) for cause in causes.values() if cause]
        return {name: grouped.count(name) for name in single} | {f"{name}_cg": n for name, n in single.items()}


def score_judgements(
    questions: Sequence[HallusionQuestion],
    codes: Sequence[int],
    *,
    same: Sequence[bool] | None = None,
    judge: str = "given codes",
) -> HallusionTable:
    """Score judged answers.

    Args:
        questions: The questions.
        codes: Judge code of each answer: 0 incorrect, 1 correct, 2 unclear.
        same: Whether each answer agrees with that to the original variant of the question, for the diagnosis.
        judge: Who gave the codes, for the table.

    Raises:
        DataError: no questions, different lengths, or another code.
    """
    _check(questions, codes=codes, same=same)
    bad = [i for i, code in enumerate(codes) if code not in (INCORRECT, CORRECT, UNCLEAR)]
    if bad:
        raise DataError(f"judge code {codes[bad[0]]!r} of question {bad[0]}: expected 0, 1 or 2")
    return HallusionTable(
        questions=tuple(questions),
        code=np.asarray(codes, dtype=np.int8),
        same=None if same is None else np.asarray(same, dtype=np.bool_),
        judge=judge,
        unparsed=None,
    )


def score_answers(questions: Sequence[HallusionQuestion], answers: Sequence[str]) -> HallusionTable:
    """Score answers without a judge: the word yes or no, not both, is read (POPE's parser ``vlmeval``), else unclear.

    This is not the official judgement, which a model makes from the whole answer; the table says so.

    Raises:
        DataError: no questions, or different lengths.
    """
    _check(questions, answers=answers)
    read = [parse_answer(text, "vlmeval") for text in answers]
    codes = [UNCLEAR if r is None else int(r == q.label) for q, r in zip(questions, read, strict=True)]
    return HallusionTable(
        questions=tuple(questions),
        code=np.asarray(codes, dtype=np.int8),
        same=None,
        judge="the word yes or no (not official)",
        unparsed=sum(value is None for value in read),
    )


def _check(questions: Sequence[HallusionQuestion], **columns: Sequence[object] | None) -> None:
    if not questions:
        raise DataError("HallusionBench got no questions to score: give at least one")
    for name, column in columns.items():
        if column is not None and len(column) != len(questions):
            raise DataError(
                f"HallusionBench got {len(questions)} questions but {len(column)} {name}: give one per question, in "
                "the same order"
            )


def _causes(q: HallusionQuestion, code: int, original: int, same: bool) -> set[str]:
    """What a wrong answer is blamed on: language (LH), vision (VI), or both, which means either."""
    if code == CORRECT or (q.without_image and code == UNCLEAR):
        return set()
    if q.without_image:
        return {"LH"}  # made up without anything to see
    wrong_as_before = code == INCORRECT and same
    if q.category == "VD":
        return {"LH", "VI"} if wrong_as_before and original == CORRECT else {"VI"}
    if original == INCORRECT:
        return {"LH"} if wrong_as_before else {"LH", "VI"}
    # Right without an image, and the edited image does not change the answer: language overrules vision.
    return {"LH"} if wrong_as_before and original == CORRECT and q.visual_input == 2 else {"VI"}


def _groups(rows: Iterable[tuple[Hashable, bool]]) -> list[list[bool]]:
    groups: dict[Hashable, list[bool]] = {}
    for key, correct in rows:
        groups.setdefault(key, []).append(correct)
    return list(groups.values())


def _all_right(groups: Sequence[Sequence[bool]]) -> int:
    return sum(map(all, groups))


def _percent(groups: Sequence[Sequence[bool]]) -> float:
    return 100 * _all_right(groups) / len(groups) if groups else math.nan
