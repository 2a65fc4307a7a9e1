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
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from vlmfix.errors import DataError

from ...data.source import image_number
from ...stats.figures import Auc, Column, Figure, one, share
from ...stats.table import Table, check_columns
from ..base import whole_groups
from ..yes_no import ACCURACY, YES_RATIO, parse_answer, yes_no_columns
from .data import HallusionQuestion

INCORRECT, CORRECT, UNCLEAR = 0, 1, 2


@dataclass(frozen=True, eq=False)
class HallusionTable(Table):
    """Judgements, one row per question; the category is the split.

    Columns: ``code`` int8 [n], 0 incorrect, 1 correct, 2 unclear; ``correct`` bool [n], whether the answer counts;
    those of yes/no answers (see :mod:`vlmfix.evals.benchmarks.yes_no`) where the answer itself was read. On the first
    question of each group, figure, group of easy and group of hard variants ``groups``, ``figures``, ``easy`` and
    ``hard``, and ``group_right``, ``figure_right``, ``easy_right`` and ``hard_right`` if all its answers are correct,
    bool [n].

    Attributes:
        questions: The questions.
        same: bool [n], whether the answer agrees with that to the original variant, or None if not judged.
        judge: Who gave the codes, for the table.
        judged: Whether a judge gave the codes; otherwise the answer's yes or no did.
    """

    FIGURES: ClassVar[tuple[Figure, ...]] = (
        Figure("aacc", "aAcc", 1, ACCURACY, control="yes bias", head_control=True, headline=True, help="right answers"),
        Figure("qacc", "qAcc", 1, share("group_right", "groups"), help="questions with every variant right"),
        Figure("facc", "fAcc", 1, share("figure_right", "figures"), help="figures with every question right"),
        Figure("easy", "easy", 1, share("easy_right", "easy"), help="qAcc of the variants with the original figure"),
        Figure("hard", "hard", 1, share("hard_right", "hard"), help="qAcc of the variants with an edited figure"),
        Figure("yes_ratio", "yes", 0, YES_RATIO, help="answers that say yes"),
        Figure("auc", "AUC", 1, Auc(), column=False),
    )

    COUNTS: ClassVar[Mapping[str, Column]] = {
        "total": one,
        "correct": "correct",
        "unclear": lambda table: table.code == UNCLEAR,
        "easy_total": "easy",
        "easy_correct": "easy_right",
        "hard_total": "hard",
        "hard_correct": "hard_right",
        "unparsed": "unparsed",
    }

    questions: tuple[HallusionQuestion, ...] = field(default=(), repr=False)
    same: NDArray[np.bool_] | None = field(default=None, repr=False)
    judge: str = ""
    judged: bool = True

    def counts(self) -> dict[str, Any]:
        """Integer counts under the official names; LH, VI and Mix are there if ``same`` was judged."""
        pair = self.sums({"total": "groups", "total_q": one, "correct": "group_right"})
        pair["wrong"] = pair["total"] - pair["correct"]
        edited = sum(q.visual_input == 2 for q in self.questions)
        return {
            **super().counts(),
            "consistency": self._consistency(),
            "pair": pair if self.same is None else pair | self._diagnosis(self.same),
            "easy_q": len(self) - edited,
            "hard_q": edited,
        }

    def _consistency(self) -> dict[str, int]:
        """Figures with all answers right, with none, and with some."""
        total, right = int(self.columns["figures"].sum()), int(self.figure_right.sum())
        some = {q.figure for q, correct in zip(self.questions, self.correct.tolist(), strict=True) if correct}
        any_right = len(some - {None})
        return {"total": total, "correct": right, "wrong": total - any_right, "inconsistent": any_right - right}

    def percentages(self) -> dict[str, float]:
        """aAcc, qAcc, fAcc, easy and hard; NaN if there is nothing to count."""
        return {
            f.title: 100 * f.statistic.of(self)
            for f in self.FIGURES
            if f.name in ("aacc", "qacc", "facc", "easy", "hard")
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
    check_columns("HallusionBench", len(questions), codes=codes, same=same)
    bad = [i for i, code in enumerate(codes) if code not in (INCORRECT, CORRECT, UNCLEAR)]
    if bad:
        raise DataError(f"judge code {codes[bad[0]]!r} of question {bad[0]}: expected 0, 1 or 2")
    agreed = None if same is None else np.asarray(same, dtype=np.bool_)
    return _table(questions, codes, {}, same=agreed, judge=judge)


def score_answers(
    questions: Sequence[HallusionQuestion], answers: Sequence[str], scores: Sequence[float | None] = ()
) -> HallusionTable:
    """Score answers without a judge: the word yes or no, not both, is read (POPE's parser ``vlmeval``), else unclear.

    This is not the official judgement, which a model makes from the whole answer; the table says so.

    Args:
        questions: The questions.
        answers: One answer per question, in the same order.
        scores: Yes-minus-no logits of the answers, if there are any.

    Raises:
        DataError: no questions, or different lengths.
    """
    check_columns("HallusionBench", len(questions), answers=answers)
    read = [parse_answer(text, "vlmeval") for text in answers]
    codes = [UNCLEAR if r is None else int(r == q.label) for q, r in zip(questions, read, strict=True)]
    columns = yes_no_columns([q.label for q in questions], read, scores)
    return _table(questions, codes, columns, judge="the word yes or no (not official)", judged=False)


def _table(
    questions: Sequence[HallusionQuestion], codes: Sequence[int], read: dict[str, NDArray[Any]], **more: Any
) -> HallusionTable:
    """The table of judged answers, with the columns of yes/no answers that were read."""
    code = np.asarray(codes, dtype=np.int8)
    excused = np.asarray([q.without_image for q in questions], dtype=np.bool_)
    correct = np.asarray((code == CORRECT) | ((code == UNCLEAR) & excused))
    groups = [q.group for q in questions]
    edited = np.asarray([q.visual_input == 2 for q in questions], dtype=np.bool_)
    figures = [q.figure for q in questions]
    shown = np.asarray([figure is not None for figure in figures], dtype=np.bool_)
    grouped: dict[str, NDArray[np.bool_]] = {}
    for first, right, keys, rows in (
        ("groups", "group_right", groups, None),
        ("figures", "figure_right", figures, shown),
        ("easy", "easy_right", groups, ~edited),
        ("hard", "hard_right", groups, edited),
    ):
        grouped[first], grouped[right] = whole_groups(keys, correct, rows)
    return HallusionTable(
        np.asarray([image_number("hallusionbench", q.unit) for q in questions], dtype=np.int64),
        {
            **read,
            "code": code,
            "correct": correct,
            **grouped,
        },
        tuple(q.category for q in questions),
        tuple("/".join(q.key) for q in questions),
        questions=tuple(questions),
        **more,
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
