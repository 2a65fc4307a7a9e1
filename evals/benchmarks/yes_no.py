"""POPE: yes/no answers about single objects (Li et al. 2023, arXiv:2305.10355). The positive class is yes.

    accuracy = (TP + TN) / n,  precision = TP / (TP + FP),  recall = TP / |label yes|,  F1 = 2 TP / (2 TP + FP + FN')
    with FN' = |label yes| - TP

An answer that a parser leaves open is wrong: it is in n and in the positives, and in no cell of the confusion matrix.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from vlmfix.errors import DataError

from ..stats.bootstrap import _difference
from ..stats.intervals import (
    CONFIDENCE,
    RESAMPLES,
    FloatArray,
    Interval,
    Statistic,
    _share,
    by_name,
    columns,
    divide,
    one,
    percentile_interval,
    ratio,
)
from ..stats.tests import mcnemar
from .pope.questions import PopeQuestion

Parser = Literal["official", "official_raw", "opera", "vcd", "lmms", "vlmeval"]


PARSERS: tuple[Parser, ...] = get_args(Parser)


_YES = re.compile(r"\byes\b")


_PUNCTUATION = re.compile(r"[^\w\s']")


def _official(text: str) -> bool:
    words = text.split(".", 1)[0].replace(",", "").split(" ")
    return not {"No", "not", "no"}.intersection(words)


def _opera(text: str) -> bool:
    words = text.replace(".", "").replace(",", "").split(" ")
    return not any(word in ("No", "not", "no", "NO") or word.endswith("n't") for word in words)


def _lmms(text: str) -> bool | None:
    return {"yes": True, "no": False}.get(text.strip().lower())


def _vlmeval(text: str) -> bool | None:
    words = _PUNCTUATION.sub(" ", text.lower()).split()
    return ("yes" in words) if ("yes" in words) != ("no" in words) else None


_RULES: Mapping[str, Callable[[str], bool | None]] = {
    "official": lambda text: _official(text.strip()),
    "official_raw": _official,
    "opera": _opera,
    "lmms": _lmms,
    "vlmeval": _vlmeval,
}


def parse_answer(text: str, parser: Parser = "official", *, label: bool | None = None) -> bool | None:
    """Read yes (True) or no (False) from an answer; None if the parser leaves it open.

    Args:
        text: The answer.
        parser: ``official`` is the rule of RUCAIBox/POPE after ``strip()``: no if the text before the first full stop
            has the word "No", "not" or "no", else yes. ``official_raw`` is the same without ``strip()``. ``opera``
            (OPERA, PAI): the whole text, also "NO" and words in n't. ``vcd`` looks for "yes" in answers to positives
            and for "no" in answers to negatives, so it needs the ``label``. ``lmms`` (lmms-eval): the whole answer must
            be yes or no. ``vlmeval`` (VLMEvalKit without judge): one of the words, not both.
        label: The right answer, read by ``vcd`` only.

    Raises:
        DataError: unknown parser, or ``vcd`` without a label.
    """
    if parser == "vcd":
        if label is None:
            raise DataError("the parser 'vcd' reads an answer by its label: give label=True or label=False")
        return "yes" in text.lower() if label else "no" not in text.lower()
    if parser not in _RULES:
        raise DataError(f"unknown POPE parser {parser!r}: choose one of {', '.join(PARSERS)}")
    return _RULES[parser](text)


def is_unparsed(text: str, parser: Parser = "official") -> bool:
    """Whether the parser found nothing to go by.

    ``lmms`` and ``vlmeval`` leave such an answer open. The others always decide: ``official``, ``official_raw`` and
    ``opera`` take it as yes, so an answer counts as unparsed if it is read as yes without the word yes in it ("NO" and
    "none" in the official rule); ``vcd`` takes it as wrong, so unparsed means neither "yes" nor "no" is in it.
    """
    lowered = text.lower()
    if parser == "vcd":
        return "yes" not in lowered and "no" not in lowered
    prediction = parse_answer(text, parser)
    return prediction is None or (prediction and _YES.search(lowered) is None)


@dataclass(frozen=True, eq=False)
class PopeTable:
    """Labels and predictions, one row per question; every figure is made of their counts.

    Attributes:
        image_ids: int64 [n], the image of each question.
        label: bool [n], whether the object is there.
        prediction: int8 [n], 1 yes, 0 no, -1 left open by the parser.
        unparsed: bool [n], answers the parser found nothing in to go by (see :func:`is_unparsed`).
        score: float64 [n], higher means yes (logit of yes minus logit of no), or None.
        parser: How the answers were read; "score" if predictions come from scores.
        question_ids: Key of each question, for pairing two tables.
    """

    image_ids: NDArray[np.int64]
    label: NDArray[np.bool_]
    prediction: NDArray[np.int8]
    unparsed: NDArray[np.bool_]
    score: NDArray[np.float64] | None
    parser: str
    question_ids: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.label)

    @property
    def correct(self) -> NDArray[np.bool_]:
        """Whether the prediction is the label, bool [n]."""
        return np.asarray(self.prediction == self.label.astype(np.int8))

    def take(self, rows: Sequence[int] | NDArray[np.int64]) -> PopeTable:
        """The table of some of the questions, in the order of ``rows``, int [k]."""
        index = np.asarray(rows, dtype=np.int64)
        return PopeTable(
            image_ids=self.image_ids[index],
            label=self.label[index],
            prediction=self.prediction[index],
            unparsed=self.unparsed[index],
            score=None if self.score is None else self.score[index],
            parser=self.parser,
            question_ids=tuple(self.question_ids[i] for i in index),
        )

    def counts(self) -> dict[str, int]:
        """n, the confusion matrix (open answers are in none of its cells), and the unparsed answers."""
        yes, no = self.prediction == 1, self.prediction == 0
        return {
            "n": len(self),
            "TP": int((yes & self.label).sum()),
            "FP": int((yes & ~self.label).sum()),
            "TN": int((no & ~self.label).sum()),
            "FN": int((no & self.label).sum()),
            "unparsed": int(self.unparsed.sum()),
        }

    def summary(self) -> dict[str, float]:
        """Accuracy, precision, recall, F1, yes_ratio (of the predictions), MCC, and AUC if there are scores.

        Fractions are 0 to 1. As in the official script a precision, recall or F1 without any predicted or labelled yes
        is 0. MCC is 0 if a margin of the confusion matrix is empty, AUC is NaN if one of the labels does not occur.
        """
        c = self.counts()
        positives = int(self.label.sum())
        summary = {
            "accuracy": (c["TP"] + c["TN"]) / c["n"],
            "precision": _ratio(c["TP"], c["TP"] + c["FP"]),
            "recall": _ratio(c["TP"], positives),
            "f1": _ratio(2 * c["TP"], c["TP"] + c["FP"] + positives),
            "yes_ratio": (c["TP"] + c["FP"]) / c["n"],
            "mcc": _mcc_of_counts(c["TP"], c["FP"], c["TN"], c["FN"]),
        }
        if self.score is not None:
            summary["auc"] = auc(self.score, self.label)
        return summary


def score_answers(
    questions: Sequence[PopeQuestion],
    answers: Sequence[str],
    *,
    parser: Parser = "official",
    scores: Sequence[float] | None = None,
) -> PopeTable:
    """Read the answers to POPE questions.

    Args:
        questions: The questions.
        answers: One answer per question, in the same order.
        parser: See :func:`parse_answer`.
        scores: One number per question, higher means yes, or None.

    Raises:
        DataError: no questions, different lengths, or an unknown parser.
    """
    return score_labels(
        [q.label for q in questions],
        answers,
        image_ids=[q.image_id for q in questions],
        question_ids=[f"{q.split}:{q.question_id}" for q in questions],
        parser=parser,
        scores=scores,
    )


def score_labels(
    labels: Sequence[bool],
    answers: Sequence[str],
    *,
    image_ids: Sequence[int],
    question_ids: Sequence[str] | None = None,
    parser: Parser = "official",
    scores: Sequence[float] | None = None,
) -> PopeTable:
    """Read yes/no answers to questions known only by label and image (see :func:`score_answers`).

    Raises:
        DataError: no questions, different lengths, or an unknown parser.
    """
    _check_lengths(len(labels), answers=answers, image_ids=image_ids, question_ids=question_ids, scores=scores)
    parsed = [parse_answer(text, parser, label=bool(label)) for text, label in zip(answers, labels, strict=True)]
    return PopeTable(
        image_ids=np.asarray(image_ids, dtype=np.int64),
        label=np.asarray(labels, dtype=np.bool_),
        prediction=np.asarray([-1 if value is None else int(value) for value in parsed], dtype=np.int8),
        unparsed=np.asarray([is_unparsed(text, parser) for text in answers], dtype=np.bool_),
        score=None if scores is None else _finite(scores),
        parser=parser,
        question_ids=tuple(str(i) for i in (range(len(labels)) if question_ids is None else question_ids)),
    )


def score_logits(
    labels: Sequence[bool],
    scores: Sequence[float],
    *,
    image_ids: Sequence[int],
    question_ids: Sequence[str] | None = None,
    bias: float = 0.0,
) -> PopeTable:
    """Predict yes where ``score + bias > 0``; the scores in the table stay as given.

    Raises:
        DataError: no questions, different lengths, or a score that is not finite.
    """
    _check_lengths(len(labels), scores=scores, image_ids=image_ids, question_ids=question_ids)
    values = _finite(scores)
    return PopeTable(
        image_ids=np.asarray(image_ids, dtype=np.int64),
        label=np.asarray(labels, dtype=np.bool_),
        prediction=(values > -bias).astype(np.int8),
        unparsed=np.zeros(len(values), dtype=np.bool_),
        score=values,
        parser="score",
        question_ids=tuple(str(i) for i in (range(len(labels)) if question_ids is None else question_ids)),
    )


def auc(scores: Iterable[float], labels: Iterable[bool]) -> float:
    """Area under the ROC curve: how often a positive scores above a negative, ties counted half.

    The Mann-Whitney statistic from mean ranks, exact for ties.

    Args:
        scores: [n], higher means yes.
        labels: [n].

    Returns:
        0 to 1; NaN if there are no positives or no negatives.
    """
    values, positive = np.asarray(list(scores), dtype=np.float64), np.asarray(list(labels), dtype=np.bool_)
    n_pos = int(positive.sum())
    n_neg = len(positive) - n_pos
    if not n_pos or not n_neg:
        return math.nan
    _, inverse, count = np.unique(values, return_inverse=True, return_counts=True)
    rank = (np.cumsum(count) - (count - 1) / 2)[inverse]  # mean rank of equal scores, from 1
    return float((rank[positive].sum() - n_pos * (n_pos + 1) / 2) / (n_pos * n_neg))


def _check_lengths(n: int, **columns: Sequence[object] | None) -> None:
    if not n:
        raise DataError("POPE got no questions to score: give at least one")
    for name, column in columns.items():
        if column is not None and len(column) != n:
            raise DataError(
                f"POPE got {n} questions but {len(column)} {name.replace('_', ' ')}: give one per question, "
                "in the same order"
            )


def _finite(scores: Sequence[float]) -> NDArray[np.float64]:
    values = np.asarray(scores, dtype=np.float64)
    bad = np.flatnonzero(~np.isfinite(values))
    if len(bad):
        raise DataError(f"the yes/no score of question {bad[0]} is {values[bad[0]]}: scores must be finite")
    return values


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else 0.0


def _mcc_of_counts(tp: int, fp: int, tn: int, fn: int) -> float:
    margins = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
    return (tp * tn - fp * fn) / math.sqrt(margins) if margins else 0.0


def paired_auc(table: PopeTable, other: PopeTable, *, seed: int = 0) -> Interval:
    """Paired interval of an AUC difference: images are resampled, and each question weighs as often as its image.

    Args:
        table: Answers with scores, float64 [n].
        other: Answers with scores to the same questions in the same order.
        seed: Seed of the resampling.

    Returns:
        Estimate and percentile interval; not defined (NaN ends) with fewer than two images.
    """
    images, inverse = np.unique(table.image_ids, return_inverse=True)
    n = len(images)
    ranked = [ranked_questions(t) for t in (table, other)]
    ones = np.ones((1, n))
    estimate = float(np.subtract(*(weighted_auc(r, ones[:, inverse]) for r in ranked))[0])
    rng = np.random.default_rng(seed)
    draws = [np.empty(0)]
    for start in range(0, RESAMPLES if n > 1 else 0, 250):  # Bounds the memory at 250 weights per question.
        count = min(250, RESAMPLES - start)
        weights = rng.multinomial(n, np.full(n, 1 / n), size=count).astype(np.float64)[:, inverse]
        draws.append(np.subtract(*(weighted_auc(r, weights) for r in ranked)))
    return percentile_interval(estimate, np.concatenate(draws), n, CONFIDENCE, difference=True)


def ranked_questions(table: PopeTable) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
    """Questions by rising score: their order, the last index of each one's run of equal scores, and their labels."""
    assert table.score is not None
    order = np.argsort(table.score, kind="stable")
    scores = table.score[order]
    first = np.searchsorted(scores, scores, side="left")
    return order, np.stack([first, np.searchsorted(scores, scores, side="right")]), table.label[order]


def weighted_auc(
    ranked: tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]], weights: NDArray[np.float64]
) -> NDArray[np.float64]:
    """AUC [k] of weighted questions, weights [k, n]: P(positive above negative), ties counted half."""
    order, (first, last), label = ranked
    sorted_weights = weights[:, order]
    negative = np.where(label, 0.0, sorted_weights)
    positive = sorted_weights - negative
    below = np.concatenate([np.zeros((len(weights), 1)), np.cumsum(negative, axis=1)], axis=1)
    wins = (positive * (below[:, first] + below[:, last]) / 2).sum(axis=1)
    pairs = positive.sum(axis=1) * negative.sum(axis=1)
    auc: NDArray[np.float64] = np.divide(wins, pairs, out=np.full(len(weights), np.nan), where=pairs > 0)
    return auc


YES_NO_STATISTICS: Mapping[str, Statistic] = by_name(
    _share("accuracy", "correct", "questions"),
    ratio(
        "f1",
        lambda t: 2 * ((t.prediction == 1) & t.label),
        lambda t: (t.prediction == 1).astype(int) + t.label,
    ),
    ratio("yes_ratio", lambda t: t.prediction == 1, lambda t: t.questions),
    _share("exact", "exact", "free"),
    _share("contains", "contains", "free"),
)
"""Questions of one's own: yes/no ones, and those with a free answer."""


@dataclass(frozen=True, eq=False)
class YesBiasControl:
    """The unpatched model's answers under a bias on yes.

    Attributes:
        bias: Added to the logit of yes.
        target_yes_ratio: What was asked for; ``table.summary()["yes_ratio"]`` is what ties allow.
        table: Answers under the bias; its scores, and so its AUC, are the unpatched model's.
    """

    bias: float
    target_yes_ratio: float
    table: PopeTable


def yes_bias_control(baseline: PopeTable, target_yes_ratio: float) -> YesBiasControl:
    """Shift the unpatched model's yes/no decision until it says yes as often as a method does.

    Answers are taken from the scores alone. Equal scores cannot be parted, so the yes-ratio is the nearest possible
    one; of two equally near ones, and of all biases that give it, the one closest to zero is taken (zero itself, or the
    middle between two scores).

    Args:
        baseline: Answers of the unpatched model with scores (logit of yes minus logit of no, float64 [n]).
        target_yes_ratio: Share of yes answers to match, 0 to 1.

    Raises:
        DataError: the table has no scores, or the target is not in [0, 1].
    """
    if baseline.score is None:
        raise DataError("the yes-bias control needs yes/no scores: run the baseline with scores stored")
    if not 0 <= target_yes_ratio <= 1:
        raise DataError(f"the target yes-ratio must be between 0 and 1, not {target_yes_ratio}")
    levels, counts = np.unique(baseline.score, return_counts=True)
    levels, counts = levels[::-1], counts[::-1]
    said_yes = np.concatenate([[0], np.cumsum(counts)])  # with the j highest levels as yes
    thresholds = [_threshold(levels, j) for j in range(len(levels) + 1)]
    distance = np.abs(said_yes - target_yes_ratio * len(baseline))
    best = min(range(len(thresholds)), key=lambda j: (distance[j], abs(thresholds[j])))
    bias = 0.0 - thresholds[best]
    table = score_logits(
        baseline.label.tolist(),
        baseline.score.tolist(),
        image_ids=baseline.image_ids.tolist(),
        question_ids=baseline.question_ids,
        bias=bias,
    )
    return YesBiasControl(bias, target_yes_ratio, table)


def _threshold(levels: NDArray[np.float64], j: int) -> float:
    """A threshold that exactly the j highest levels exceed, zero if possible; ``levels`` descend."""
    upper = float(levels[j - 1]) if j else np.inf
    lower = float(levels[j]) if j < len(levels) else -np.inf
    if lower <= 0 < upper:
        return 0.0
    if j == 0:
        return lower
    if j == len(levels):
        return upper - max(1.0, abs(upper) * 1e-6)
    middle = (lower + upper) / 2
    return middle if lower <= middle < upper else lower


def _mcc(sums: FloatArray) -> FloatArray:
    tp, fp, tn, fn = np.moveaxis(sums, -1, 0)
    return divide(tp * tn - fp * fn, np.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)), 0.0)


def _confusion(table: Any) -> FloatArray:
    yes, no = table.prediction == 1, table.prediction == 0
    return columns(yes & table.label, yes & ~table.label, no & ~table.label, no & table.label)


POPE_STATISTICS: Mapping[str, Statistic] = by_name(
    ratio("accuracy", lambda t: t.correct, one),
    ratio("precision", lambda t: (t.prediction == 1) & t.label, lambda t: t.prediction == 1, empty=0.0),
    ratio("recall", lambda t: (t.prediction == 1) & t.label, lambda t: t.label, empty=0.0),
    ratio(
        "f1",
        lambda t: 2 * ((t.prediction == 1) & t.label),
        lambda t: (t.prediction == 1).astype(int) + t.label,
        empty=0.0,
    ),
    ratio("yes_ratio", lambda t: t.prediction == 1, one),
    Statistic("mcc", _confusion, _mcc),
)
"""Statistics of a ``PopeTable``, named as in its ``summary()``."""


def paired_answers(
    table: PopeTable, baseline: PopeTable, distinct: Sequence[int] | NDArray[np.int64], seed: int
) -> dict[str, Any]:
    """McNemar's test and the difference in MCC of a method's answers to the baseline's.

    Args:
        table: The method's answers.
        baseline: The baseline's answers to the same questions.
        distinct: Rows with every question once: the splits share their positives, and one answer counted three times
            would make the test see more evidence than there is.
        seed: Seed of the bootstrap.
    """
    test = mcnemar(table.take(distinct), baseline.take(distinct))
    return {
        "mcnemar": {
            "questions": len(distinct),
            "only_method": test.only_a,
            "only_baseline": test.only_b,
            "p_value": test.p_value,
        },
        "mcc": _difference(POPE_STATISTICS["mcc"], table, baseline, seed),
    }
