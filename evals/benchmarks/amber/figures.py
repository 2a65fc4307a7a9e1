"""AMBER: invented objects in descriptions, and yes/no questions (Wang et al. 2023, arXiv:2311.07397).

Descriptions. With N the nouns of a response that are in the vocabulary (repeats count), T the objects of the image,
each with the words associated to it, and H the objects a model may well invent for it:

    CHAIR = hallucinated nouns / |N|,  Cover = objects of T named / |T|,  Cog = objects of H named / |H|,
    Hal = responses with a hallucinated noun / responses

Questions. The positive class is *no*: precision = right no / answered no, recall = right no / truth no. A response must
equal "Yes" or "No"; any other is wrong and counted as unparsed. AMBER = (100 - CHAIR + F1) / 2.

As in the official script sums run over all responses (micro average), every denominator starts at 0.001, F1 is made of
rounded precision and recall, and figures are percentages rounded to one decimal. The script also takes a noun for an
object if spaCy's en_core_web_lg gives a similarity above 0.8: this needs word vectors, which the caller plugs in
(``similarity``, such as ``objects.spacy_similarity()``). Without it only exact words count, as with similarity 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from vlmfix.errors import DataError

from ...stats.bootstrap import FloatArray
from ...stats.figures import Column, Figure, SumStatistic, divide, share, stacked
from ...stats.table import Table
from ..yes_no import yes_no_columns
from .data import TASKS, AmberData, AmberTask
from .objects import (
    DESCRIPTION_COUNTS,
    Nouns,
    Similarity,
    caption_counts,
    compared,
    known_lemmas,
    tagged_nouns,
)

#: The official prefixes of the counts of each dimension.
_PREFIX: Mapping[AmberTask, str] = {
    "existence": "ha",
    "state": "as",
    "number": "an",
    "action": "aa",
    "relation": "asso",
}

#: The official names of the figures (spelt as printed), and the dimensions they sum over.
_GROUPS: Mapping[str, tuple[AmberTask, ...]] = {
    "Descriminative Task": ("existence", "state", "number", "action", "relation"),
    "Exsitence": ("existence",),
    "Attribute": ("state", "number", "action"),
    "State": ("state",),
    "Number": ("number",),
    "Action": ("action",),
    "Relation": ("relation",),
}

_DESCRIPTION_SUMS: Mapping[str, Column] = {
    "chair_num": "nouns",
    "chair_score": "hallucinated",
    "safe_cover_num": "truth_objects",
    "safe_cover_score": "covered",
    "hallu_cover_num": "cognitive_objects",
    "hallu_cover_score": "cognitive",
    "non_hallu_num": "descriptions",
    "non_hallu_score": lambda table: table.descriptions & ~table.hallucinating,
}
"""Official name -> column, of descriptions."""

_QUESTION_SUMS: Mapping[str, Column] = {
    "qa_correct_num": "questions",
    "qa_correct_score": "correct",
    "qa_no_num": "truth_no",
    "qa_no_score": "right_no",
    "qa_ans_no_num": "answered_no",
    "qa_ans_no_score": "right_no",
}
"""Likewise of questions; the counts of a dimension have its prefix before them."""

_NONE = (0,) * len(DESCRIPTION_COUNTS)

_WORDS = {"Yes": True, "No": False}
"""The only answers that are read."""

_EMPTY = 0.001


def _score_columns(table: Any) -> FloatArray:
    names = ("hallucinated", "nouns", "right_no", "answered_no", "truth_no")
    return stacked(*(table.columns[name] for name in names))


def _score(sums: FloatArray) -> FloatArray:
    hallucinated, nouns, right_no, answered_no, truth_no = np.moveaxis(sums, -1, 0)
    return (1 - divide(hallucinated, nouns) + divide(2 * right_no, answered_no + truth_no)) / 2


@dataclass(frozen=True, eq=False)
class AmberTable(Table):
    """Integer counts, a row per description, then one per question; the task is the split, AMBER's id the item.

    Columns, [n]. Of descriptions, zero on questions: ``descriptions`` (which rows are some), ``nouns`` (in the
    vocabulary), ``hallucinated`` (nouns neither in the image nor safe), ``hallucinating`` (whether there is one),
    ``covered`` (objects of the image that are named), ``truth_objects`` (objects of the image), ``cognitive`` (objects
    of the hallucination list that are named), ``cognitive_objects`` (its length). Of questions, zero on descriptions:
    those of yes/no answers with ``questions`` and ``margin`` (see :mod:`vlmfix.evals.benchmarks.yes_no`),
    ``answered_no``, ``truth_no``, ``right_no``.

    Attributes:
        empty: Descriptions without any text.
        dimensions: Those that the annotations have questions of.
        similarity: What the word similarity was, for the table: "none" or a name.
    """

    FIGURES: ClassVar[tuple[Figure, ...]] = (
        Figure(
            "chair",
            "CHAIR",
            -1,
            share("hallucinated", "nouns"),
            control="early stop",
            head_control=True,
            headline=True,
            help="nouns of descriptions that are not in the image",
        ),
        Figure(
            "cover",
            "Cover",
            1,
            share("covered", "truth_objects"),
            headline=True,
            help="objects of the image that are named",
        ),
        Figure(
            "hal",
            "Hal",
            -1,
            share("hallucinating", "descriptions"),
            control="early stop",
            help="descriptions that invent",
        ),
        Figure(
            "cog",
            "Cog",
            -1,
            share("cognitive", "cognitive_objects"),
            help="objects a model may well invent that are named",
        ),
        Figure("accuracy", "accuracy", 1, share("correct", "questions"), control="yes bias", help="right answers"),
        Figure(
            "f1",
            "F1",
            1,
            share(lambda t: 2 * t.right_no, lambda t: t.answered_no.astype(int) + t.truth_no),
            head_control=True,
            headline=True,
            help="harmonic mean of precision and recall of the answer no",
        ),
        Figure(
            "yes_ratio", "yes", 0, share(lambda t: t.prediction == 1, "questions"), help="questions answered with yes"
        ),
        Figure("amber", "score", 1, SumStatistic(_score_columns, _score), help="mean of 1 - CHAIR and F1"),
    )

    empty: int = 0
    dimensions: tuple[AmberTask, ...] = ()
    similarity: str = "none"

    def counts(self) -> dict[str, int]:
        """The sums under the official names (metrics.txt), as integers, with ``unparsed`` and ``empty``."""
        counts: dict[str, int] = {}
        if self.descriptions.any():
            counts |= self.sums(_DESCRIPTION_SUMS) | {"empty": self.empty}
        if self.columns["questions"].any():
            counts |= self.sums(_QUESTION_SUMS) | self.sums({"unparsed": "unparsed"})
            parts = self.by_split()
            for prefix, part in ((prefix, parts[task]) for task, prefix in _PREFIX.items() if task in parts):
                counts |= {f"{prefix}_{name}": n for name, n in part.sums(_QUESTION_SUMS).items()}
        return counts

    def figures(self) -> dict[str, dict[str, float]]:
        """What the official script prints, under its names: percentages with one decimal.

        A group is present if all its dimensions were answered; those the annotations have no question of are no part
        of it.
        """
        c = self.counts()
        figures: dict[str, dict[str, float]] = {}
        if self.descriptions.any():
            figures["Generative Task"] = {
                "CHAIR": _percent(c["chair_score"], c["chair_num"]),
                "Cover": _percent(c["safe_cover_score"], c["safe_cover_num"]),
                "Hal": round(100 - c["non_hallu_score"] / (c["non_hallu_num"] + _EMPTY) * 100, 1),
                "Cog": _percent(c["hallu_cover_score"], c["hallu_cover_num"]),
            }
        for name, group in _GROUPS.items():
            tasks = tuple(task for task in group if task in self.dimensions)
            if tasks and all(f"{_PREFIX[task]}_qa_correct_num" in c for task in tasks):
                figures[name] = _question_figures(c, name, tasks)
        return figures

    def official_score(self) -> float | None:
        """The AMBER score (100 - CHAIR + F1) / 2 of the printed figures, as in the paper; None with one part only."""
        figures = self.figures()
        if "Generative Task" not in figures or "Descriminative Task" not in figures:
            return None
        return (100 - figures["Generative Task"]["CHAIR"] + figures["Descriminative Task"]["F1"]) / 2


def score_responses(
    data: AmberData,
    responses: Mapping[int, str],
    *,
    nouns: Nouns | None = None,
    similarity: Similarity | None = None,
    similarity_name: str | None = None,
    image_ids: Mapping[int, int] | None = None,
    scores: Mapping[int, float | None] = MappingProxyType({}),
) -> AmberTable:
    """Score the responses to AMBER, to all of it or to some of its tasks.

    Args:
        data: The annotations.
        responses: Item id -> response. A task (descriptions, or a dimension of the questions) is answered in full or
            not at all.
        nouns: From a response to its lemmatised nouns; default
            :func:`~vlmfix.evals.benchmarks.amber.objects.tagged_nouns`.
        similarity: Similarity of two words, or None for exact words only.
        similarity_name: Its name, for the table.
        image_ids: Item id -> number of its image; by default each item has its own.
        scores: Item id -> logit of yes minus that of no, of questions that it is known of.

    Raises:
        DataError: no responses, an unknown id, a task with missing answers, or a vocabulary the default lemmas do not
            cover.
    """
    items = sorted((data.items[i] for i in _checked_ids(data, responses)), key=lambda item: item.task != "generative")
    described = np.asarray([item.task == "generative" for item in items], dtype=np.bool_)
    if described.any() and nouns is None:
        known_lemmas(data)
        nouns = tagged_nouns()
    same = None if similarity is None else compared(similarity)
    counted = np.asarray(
        [
            caption_counts(nouns(responses[item.id]), item, data, same)
            if nouns and item.task == "generative"
            else _NONE
            for item in items
        ],
        dtype=np.int64,
    )
    columns: dict[str, NDArray[Any]] = dict(zip(DESCRIPTION_COUNTS, counted.T, strict=True))
    columns |= {"descriptions": described, "hallucinating": columns["hallucinated"] > 0, "questions": ~described}
    said = [None if item.task == "generative" else _WORDS.get(responses[item.id]) for item in items]
    columns |= yes_no_columns([bool(item.label) for item in items], said)
    answered_no, truth_no = columns["prediction"] == 0, ~columns["label"] & ~described
    columns |= {"answered_no": answered_no, "truth_no": truth_no, "right_no": answered_no & truth_no}
    columns["unparsed"][described], columns["prediction"][described] = False, 0
    margins = [np.nan if (score := scores.get(item.id)) is None else score for item in items]
    columns["margin"] = np.where(described, np.nan, np.asarray(margins, dtype=np.float64))
    return AmberTable(
        np.asarray([(image_ids or {}).get(item.id, item.id) for item in items], dtype=np.int64),
        columns,
        tuple(item.task for item in items),
        tuple(str(item.id) for item in items),
        empty=sum(not responses[item.id].strip() for item in items if item.task == "generative"),
        dimensions=tuple(task for task in _PREFIX if any(item.task == task for item in data.items.values())),
        similarity="none" if similarity is None else (similarity_name or "custom"),
    )


def _checked_ids(data: AmberData, responses: Mapping[int, str]) -> list[int]:
    if not responses:
        raise DataError("AMBER got no responses to score: give at least one task's")
    unknown = [i for i in responses if i not in data.items]
    if unknown:
        raise DataError(f"AMBER has no item {unknown[0]}: the ids are those of annotations.json")
    for task in TASKS:
        wanted = [i for i, item in data.items.items() if item.task == task]
        missing = [i for i in wanted if i not in responses]
        if missing and len(missing) < len(wanted):
            raise DataError(
                f"{len(missing)} of the {len(wanted)} {task} items of AMBER have no response (first: id {missing[0]}): "
                "answer them all, leave the task out, or type --subset to score what is there"
            )
    return sorted(responses)


def _percent(count: int, total: int, parts: int = 1) -> float:
    return round(count / (total + parts * _EMPTY) * 100, 1)


def _question_figures(c: Mapping[str, int], name: str, tasks: Sequence[AmberTask]) -> dict[str, float]:
    # The overall figures have counters of their own; the attribute figures add up three, with three times the 0.001.
    parts = 1 if name == "Descriminative Task" else len(tasks)

    def share(count: str) -> float:
        score, total = (sum(c[f"{_PREFIX[t]}_{count}_{kind}"] for t in tasks) for kind in ("score", "num"))
        return _percent(score, total, parts)

    precision, recall = share("qa_ans_no"), share("qa_no")
    p, r = precision / 100, recall / 100
    f1 = round(2 * p * r / (p + r + (0.001 if name == "Exsitence" else 0.0001)) * 100, 1)
    return {"Accuracy": share("qa_correct"), "Precision": precision, "Recall": recall, "F1": f1}
