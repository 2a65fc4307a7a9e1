"""MMHal-Bench: open answers rated 0 to 6 by a judge (Sun et al. 2023, arXiv:2309.14525).

    average score = mean rating,  hallucination rate = share of ratings below 3

The judge is a language model that sees text only: the content of the image, a human's answer and the model's
(officially gpt-4-0314, temperature 0). None comes with this package: pass a callable, or write the requests to a file,
have them judged elsewhere, and score the ratings. **The choice of the judge and of its instruction changes the
figures**: report both. The instruction below is ours, not the official one; ``instruction`` replaces it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from vlmfix.errors import DataError

from ...data.source import image_number
from ...stats.figures import Figure, share
from ...stats.table import Table
from .data import TYPES, MmhalItem

Judge = Callable[[str], str]


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


def judge_prompt(item: MmhalItem, answer: str, *, instruction: str = INSTRUCTION) -> str:
    """What the judge is asked about one answer."""
    return (
        f"{instruction}\n\nImage contents: {', '.join(item.image_content)}\nQuestion: {item.question}\n"
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

    judge: str = "unnamed"

    def counts(self) -> dict[str, int]:
        """Questions, sum of the ratings, hallucinations, unparsed judgements."""
        return {
            "n": len(self),
            "rating_sum": int(self.rating.sum()),
            "hallucinated": int(self.hallucinated.sum()),
            "unparsed": int(self.unparsed.sum()),
        }

    def by_type(self) -> dict[str, float]:
        """Average score of each type that occurs, in the official order, two decimals."""
        kinds = np.asarray(self.splits)
        return {name: round(float(self.rating[kinds == name].mean()), 2) for name in TYPES if name in self.splits}


def score_judgements(items: Sequence[MmhalItem], judgements: Sequence[str], *, judge: str = "unnamed") -> MmhalTable:
    """Score what a judge wrote about each answer (see :func:`parse_rating`).

    Raises:
        DataError: no items, or different lengths.
    """
    return _table(items, [parse_rating(text) for text in judgements], judge)


def score_ratings(items: Sequence[MmhalItem], ratings: Sequence[int], *, judge: str = "unnamed") -> MmhalTable:
    """Score ratings, 0 to 6.

    Raises:
        DataError: no items, different lengths, or a rating out of range.
    """
    bad = [i for i, rating in enumerate(ratings) if rating not in range(MAX_RATING + 1)]
    if bad:
        raise DataError(f"rating {ratings[bad[0]]!r} of question {bad[0]}: expected an integer from 0 to {MAX_RATING}")
    return _table(items, ratings, judge)


def score_answers(
    items: Sequence[MmhalItem],
    answers: Sequence[str],
    judge: Judge,
    *,
    judge_name: str = "unnamed",
    instruction: str = INSTRUCTION,
) -> MmhalTable:
    """Have answers judged, and score them.

    Args:
        items: The questions.
        answers: One answer per question, in the same order.
        judge: From a prompt to the judgement, such as a call of a language model at temperature 0.
        judge_name: Its name, for the table.
        instruction: See :data:`INSTRUCTION`.

    Raises:
        DataError: no items, or different lengths.
    """
    _check(items, answers)
    prompts = [judge_prompt(item, text, instruction=instruction) for item, text in zip(items, answers, strict=True)]
    return score_judgements(items, [judge(prompt) for prompt in prompts], judge=judge_name)


def _table(items: Sequence[MmhalItem], ratings: Sequence[int | None], judge: str) -> MmhalTable:
    _check(items, ratings)
    rating = np.asarray([rating or 0 for rating in ratings], dtype=np.int64)
    return MmhalTable(
        np.asarray([image_number("mmhal", item.image_id) for item in items], dtype=np.int64),
        {
            "rating": rating,
            "hallucinated": rating < HALLUCINATION_BELOW,
            "unparsed": np.asarray([rating is None for rating in ratings], dtype=np.bool_),
        },
        tuple(item.type for item in items),
        tuple(item.question for item in items),
        judge=judge,
    )


def _check(items: Sequence[MmhalItem], column: Sequence[object]) -> None:
    if not items:
        raise DataError("MMHal-Bench got no questions to score: give at least one")
    if len(column) != len(items):
        raise DataError(
            f"MMHal-Bench got {len(items)} questions but {len(column)} answers or ratings: give one per question, in "
            "the same order"
        )
