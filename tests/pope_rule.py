"""POPE's published rule, checked on questions that were made elsewhere; and answers that scores stand for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np

from vlmfix.errors import DataError
from vlmfix.evals.benchmarks.object_questions import ObjectStatistics, PopeQuestion
from vlmfix.evals.benchmarks.yes_no import YesNoTable, yes_no_columns


def score_logits(
    labels: Sequence[bool], scores: Sequence[float], *, image_ids: Sequence[int], bias: float = 0.0
) -> YesNoTable:
    """Predict yes where ``score + bias > 0``; the scores in the table stay as given."""
    columns = yes_no_columns(labels, [score > -bias for score in scores], scores)
    items = tuple(map(str, range(len(labels))))
    return YesNoTable(np.asarray(image_ids, dtype=np.int64), columns, items=items)


def check_questions(questions: Iterable[PopeQuestion], ground_truth: Mapping[int, Collection[str]]) -> dict[str, int]:
    """Compare POPE questions with a ground truth, for question files that were made elsewhere.

    Args:
        questions: Questions of one split, positives and negatives in turn per image.
        ground_truth: Image id -> objects; frequencies are counted over the images of the questions.

    Returns:
        Counts: ``yes_not_in_gt`` and ``no_but_in_gt`` (labels that contradict the ground truth), and for the splits
        popular and adversarial how many negatives are an object of maximal frequency or co-occurrence
        (``consistent``, ``of_which_tied``), how many had no candidate (``no_candidate_random_fallback``), and the rest
        (``inconsistent``).

    Raises:
        DataError: a question's image has no ground truth, or an image's first question is negative.
    """
    rows = list(questions)
    missing = [q.image_id for q in rows if q.image_id not in ground_truth]
    if missing:
        raise DataError(
            f"image {missing[0]} of the POPE questions has no ground truth: give that of all "
            f"{len(set(missing))} such images"
        )
    statistics = ObjectStatistics.of([list(ground_truth[i]) for i in dict.fromkeys(q.image_id for q in rows)])
    counts: Counter[str] = Counter()
    asked: dict[int, list[str]] = {}
    for q in rows:
        present = ground_truth[q.image_id]
        counts["yes_not_in_gt"] += q.label and q.object not in present
        counts["no_but_in_gt"] += not q.label and q.object in present
        before = asked.setdefault(q.image_id, [])
        if not q.label and q.split in ("popular", "adversarial"):
            if not before:
                raise DataError(f"the first question of image {q.image_id} is negative: POPE asks for a positive first")
            weights = statistics.frequency if q.split == "popular" else statistics.together.get(before[-1], {})
            counts[_verdict(q.object, {n: w for n, w in weights.items() if n not in present and n not in before})] += 1
        before.append(q.object)
    tied = counts.pop("tied", 0)
    counts["consistent"] += tied
    counts["of_which_tied"] = tied
    names = (
        "yes_not_in_gt",
        "no_but_in_gt",
        "consistent",
        "of_which_tied",
        "no_candidate_random_fallback",
        "inconsistent",
    )
    return {name: counts[name] for name in names}


def _verdict(chosen: str, candidates: Mapping[str, int]) -> str:
    if not candidates:
        return "no_candidate_random_fallback"
    best = max(candidates.values())
    if candidates.get(chosen) != best:
        return "inconsistent"
    return "tied" if sum(weight == best for weight in candidates.values()) > 1 else "consistent"
