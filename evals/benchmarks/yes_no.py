"""Yes/no answers: how they are read, and the figures they have in common.

The figures are POPE's (Li et al. 2023, arXiv:2305.10355). The positive class is yes:

    accuracy = (TP + TN) / n,  precision = TP / (TP + FP),  recall = TP / |label yes|,  F1 = 2 TP / (2 TP + FP + FN')
    with FN' = |label yes| - TP

An answer that a parser leaves open is wrong: it is in n and in the positives, and in no cell of the confusion matrix.
Only the parser ``repope`` leaves such answers out of all figures, as its official script does.

The columns that tables with yes/no answers share, each [n]:

    label       bool   whether yes is right
    prediction  int8   1 yes, 0 no, -1 left open
    correct     bool   whether the prediction is the label
    unparsed    bool   the parser found nothing to go by
    score       float  logit of yes minus logit of no; present only if every row has one
    margin      float  the same where some rows are no questions (NaN there)
    questions   bool   which rows are yes/no questions; without it, all
    counted     bool   which rows figures are made of; without it, all (the parser repope leaves open answers out)
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from vlmfix.errors import DataError

from ..stats.bootstrap import FloatArray, interval_dict
from ..stats.figures import Auc, Column, Figure, SumStatistic, divide, one, read_column, share, stacked
from ..stats.table import Table, check_columns
from ..stats.tests import mcnemar

Parser = Literal["official", "official_raw", "opera", "vcd", "lmms", "vlmeval", "repope"]

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


def _repope(text: str) -> bool | None:
    return True if "yes" in text.lower() else False if "no" in text.lower() else None


_RULES: Mapping[str, Callable[[str], bool | None]] = {
    "official": lambda text: _official(text.strip()),
    "official_raw": _official,
    "opera": _opera,
    "lmms": _lmms,
    "vlmeval": _vlmeval,
    "repope": _repope,
}


def parse_answer(text: str, parser: Parser = "official", *, label: bool | None = None) -> bool | None:
    """Read yes (True) or no (False) from an answer; None if the parser leaves it open.

    Args:
        text: The answer.
        parser: ``official`` is the rule of RUCAIBox/POPE after ``strip()``: no if the text before the first full stop
            has the word "No", "not" or "no", else yes. ``official_raw`` is the same without ``strip()``. ``opera``
            (OPERA, PAI): the whole text, also "NO" and words in n't. ``vcd`` looks for "yes" in answers to positives
            and for "no" in answers to negatives, so it needs the ``label``. ``lmms`` (lmms-eval): the whole answer must
            be yes or no. ``vlmeval`` (VLMEvalKit without judge): one of the words, not both. ``repope``
            (YanNeu/RePOPE): yes if "yes" is anywhere in the text, else no if "no" is, within words too.
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

    ``lmms``, ``vlmeval`` and ``repope`` leave such an answer open. The others always decide: ``official``,
    ``official_raw`` and ``opera`` take it as yes, so an answer counts as unparsed if it is read as yes without the word
    yes in it ("NO" and "none" in the official rule); ``vcd`` takes it as wrong, so unparsed means neither "yes" nor
    "no" is in it.
    """
    lowered = text.lower()
    if parser == "vcd":
        return "yes" not in lowered and "no" not in lowered
    prediction = parse_answer(text, parser)
    return prediction is None or (prediction and parser != "repope" and _YES.search(lowered) is None)


def readings(text: str, parser: Parser = "official") -> tuple[bool | None, ...]:
    """What a given parser and those that look for words make of an answer, in this order; None where one finds nothing.

    ``vcd`` is no such parser, because it looks at the label, nor is ``repope``, which finds "no" within many words.
    """
    asked = dict.fromkeys([parser, *(each for each in PARSERS if each != "repope")])
    asked.pop("vcd", None)
    return tuple(None if is_unparsed(text, each) else parse_answer(text, each) for each in asked)


def says_yes(table: Any) -> NDArray[np.bool_]:
    """Which answers say yes, [n]."""
    return np.asarray(table.prediction == 1)


CELLS: Mapping[str, Column] = {
    "TP": lambda table: says_yes(table) & table.label,
    "FP": lambda table: says_yes(table) & ~table.label,
    "TN": lambda table: (table.prediction == 0) & ~table.label,
    "FN": lambda table: (table.prediction == 0) & table.label,
}
"""The confusion matrix; open answers are in none of its cells."""


def _confusion(table: Any) -> FloatArray:
    return stacked(*(read_column(cell)(table) for cell in CELLS.values()))


def _mcc(sums: FloatArray) -> FloatArray:
    tp, fp, tn, fn = np.moveaxis(sums, -1, 0)
    return divide(tp * tn - fp * fn, np.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)), 0.0)


def _counted(table: Any) -> NDArray[np.bool_]:
    return np.asarray(table.columns.get("counted", np.ones(len(table), dtype=np.bool_)))


def _positives(table: Any) -> NDArray[np.bool_]:
    return np.asarray(table.label & _counted(table))


ACCURACY = share("correct", _counted)
YES_RATIO = share(says_yes, _counted)
PRECISION = share(lambda t: says_yes(t) & t.label, says_yes, empty=0.0)
RECALL = share(lambda t: says_yes(t) & t.label, _positives, empty=0.0)
F1 = share(lambda t: 2 * (says_yes(t) & t.label), lambda t: says_yes(t).astype(int) + _positives(t), empty=0.0)
MCC = SumStatistic(_confusion, _mcc)
"""Matthews correlation; 0 if a margin of the confusion matrix is empty."""


@dataclass(frozen=True, eq=False)
class YesNoTable(Table):
    """Answers of which each is read as yes or no.

    Columns as in the module's text, without ``margin`` and ``questions``.

    Attributes:
        parser: How the answers were read.
    """

    FIGURES: ClassVar[tuple[Figure, ...]] = (
        Figure("accuracy", "accuracy", 1, ACCURACY, control="yes bias", headline=True, help="right answers"),
        Figure("precision", "precision", 1, PRECISION, column=False),
        Figure("recall", "recall", 1, RECALL, column=False),
        Figure("f1", "F1", 1, F1, help="harmonic mean of precision and recall of the answer yes"),
        Figure("yes_ratio", "yes", 0, YES_RATIO, help="answers that say yes"),
        Figure("mcc", "MCC", 1, MCC, column=False),
        Figure("auc", "AUC", 1, Auc(), head_control=True, help="how often a yes question scores above a no question"),
    )

    COUNTS: ClassVar[Mapping[str, Column]] = {"n": one, **CELLS, "unparsed": "unparsed"}

    parser: str = "official"


def yes_no_columns(
    labels: Sequence[bool],
    predictions: Sequence[bool | None],
    scores: Sequence[float | None] = (),
    *,
    unparsed: Sequence[bool] | None = None,
) -> dict[str, NDArray[Any]]:
    """The columns of yes/no answers.

    Args:
        labels: Whether yes is right, [n].
        predictions: What was read from the answers, None for neither, [n].
        scores: Yes-minus-no logits, [n]; a column only if all are there. One missing score (a method that overflows, a
            vocabulary without a yes token) leaves the table without any.
        unparsed: Which answers count as unparsed, [n]; by default those that are neither.
    """
    label = np.asarray(labels, dtype=np.bool_)
    prediction = np.asarray([-1 if p is None else int(p) for p in predictions], dtype=np.int8)
    open_ = prediction < 0 if unparsed is None else np.asarray(unparsed, dtype=np.bool_)
    columns = {"label": label, "prediction": prediction, "correct": prediction == label, "unparsed": open_}
    given = [score for score in scores if score is not None]
    return {**columns, "score": np.asarray(given)} if given and len(given) == len(labels) else columns


def read_columns(
    labels: Sequence[bool], answers: Sequence[str], parser: Parser = "official", scores: Sequence[float | None] = ()
) -> dict[str, NDArray[Any]]:
    """The columns of yes/no answers, read by a parser of :func:`parse_answer`; arguments as of :func:`score_labels`."""
    read = [parse_answer(text, parser, label=bool(label)) for text, label in zip(answers, labels, strict=True)]
    columns = yes_no_columns(labels, read, scores, unparsed=[is_unparsed(text, parser) for text in answers])
    if parser == "repope":  # As in its official script, an open answer leaves every denominator.
        columns["counted"] = ~columns["unparsed"]
    return columns


def score_labels(
    labels: Sequence[bool],
    answers: Sequence[str],
    *,
    image_ids: Sequence[int],
    splits: Sequence[str] = (),
    items: Sequence[str] = (),
    parser: Parser = "official",
    scores: Sequence[float | None] = (),
) -> YesNoTable:
    """Read yes/no answers.

    Args:
        labels: Whether yes is right, one per question.
        answers: One answer per question, in the same order.
        image_ids: The image of each question.
        splits: The part of the benchmark each belongs to.
        items: The questions, which name the rows; by default their number.
        parser: See :func:`parse_answer`.
        scores: One number per question, higher means yes.

    Raises:
        DataError: no questions, different lengths, a score that is not finite, or an unknown parser.
    """
    given = {"splits": splits or None, "items": items or None, "scores": scores or None}
    check_columns("POPE", len(labels), answers=answers, image_ids=image_ids, **given)
    bad = next((i for i, score in enumerate(scores) if score is not None and not math.isfinite(score)), None)
    if bad is not None:
        raise DataError(f"the yes/no score of question {bad} is {scores[bad]}: scores must be finite")
    return YesNoTable(
        np.asarray(image_ids, dtype=np.int64),
        read_columns(labels, answers, parser, scores),
        tuple(splits),
        tuple(items) or tuple(map(str, range(len(labels)))),
        parser=parser,
    )


def question_rows(table: Table) -> NDArray[np.int64]:
    """The rows that are yes/no questions, int64 [m]."""
    if not {"label", "prediction"} <= table.columns.keys():
        return np.arange(0)
    return np.flatnonzero(table.columns.get("questions", np.ones(len(table))))


def mcnemar_once(table: Table, baseline: Table) -> dict[str, Any]:
    """McNemar's test of two methods' answers to the same questions, for JSON.

    It takes every question about an image once: splits share their positives, and one answer counted three times would
    make the test see more evidence than there is.
    """
    first: dict[tuple[int, str], int] = {}
    for row, (image_id, _, item) in enumerate(table.keys):
        first.setdefault((image_id, item), row)
    once = list(first.values())
    test = mcnemar(table.take(once), baseline.take(once))
    found = {"only_method": test.only_a, "only_baseline": test.only_b, "p_value": test.p_value}
    return {"questions": len(once), **found}


def paired_answers(table: Table, baseline: Table, seed: int) -> dict[str, Any] | None:
    """McNemar's test and the difference in MCC of a method's yes/no answers to the baseline's; None without any.

    Args:
        table: The method's answers.
        baseline: The baseline's answers to the same questions.
        seed: Seed of the bootstrap.
    """
    rows = question_rows(table)
    if not len(rows):
        return None
    own, other = table.take(rows), baseline.take(rows)
    mcc = interval_dict(MCC.difference(own, other, seed=seed))
    return {"mcnemar": mcnemar_once(own, other), "mcc": mcc}
