"""POPE: yes/no answers about single objects (Li et al. 2023, arXiv:2305.10355). The positive class is yes.

    accuracy = (TP + TN) / n,  precision = TP / (TP + FP),  recall = TP / |label yes|,  F1 = 2 TP / (2 TP + FP + FN')
    with FN' = |label yes| - TP

An answer that a parser leaves open is wrong: it is in n and in the positives, and in no cell of the confusion matrix.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from vlmfix.errors import DataError

from ..data.pope import PopeQuestion

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

    def take(self, rows: Sequence[int] | NDArray[np.int64]) -> "PopeTable":
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
