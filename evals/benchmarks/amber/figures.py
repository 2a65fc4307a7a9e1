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
(``similarity``, such as ``amber_words.spacy_similarity()``). Without it only exact words count, as with similarity 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlmfix.errors import DataError

from ...stats.intervals import FloatArray, columns, divide
from .data import TASKS, AmberData, AmberTask
from .objects import Nouns, Similarity, caption_counts, compared, lemma_vocabulary, tagged_nouns

IntArray = NDArray[np.int64]


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


_EMPTY = 0.001


@dataclass(frozen=True, eq=False)
class AmberTable:
    """Integer counts: one row per description and one per question; every figure is made of their sums.

    Attributes:
        caption_ids: int64 [n], items of the descriptions.
        nouns: int64 [n], nouns in the vocabulary.
        hallucinated: int64 [n], those that are neither in the image nor safe.
        covered: int64 [n], objects of the image that are named.
        truth_objects: int64 [n], objects of the image.
        cognitive: int64 [n], objects of the hallucination list that are named.
        cognitive_objects: int64 [n], its length.
        empty: Descriptions without any text.
        question_ids: int64 [m], items of the questions.
        task: Dimension of each question, [m].
        label: bool [m], whether yes is right.
        prediction: int8 [m], 1 "Yes", 0 "No", -1 anything else.
        dimensions: Those that the annotations have questions of.
        similarity: What the word similarity was, for the table: "none" or a name.
    """

    caption_ids: IntArray
    nouns: IntArray
    hallucinated: IntArray
    covered: IntArray
    truth_objects: IntArray
    cognitive: IntArray
    cognitive_objects: IntArray
    empty: int
    question_ids: IntArray
    task: NDArray[np.str_]
    label: NDArray[np.bool_]
    prediction: NDArray[np.int8]
    dimensions: tuple[AmberTask, ...]
    similarity: str

    def counts(self) -> dict[str, int]:
        """The sums under the official names (metrics.txt), as integers, with ``unparsed`` and ``empty``."""
        counts: dict[str, int] = {}
        if len(self.caption_ids):
            counts |= {
                "chair_num": int(self.nouns.sum()),
                "chair_score": int(self.hallucinated.sum()),
                "safe_cover_num": int(self.truth_objects.sum()),
                "safe_cover_score": int(self.covered.sum()),
                "hallu_cover_num": int(self.cognitive_objects.sum()),
                "hallu_cover_score": int(self.cognitive.sum()),
                "non_hallu_num": len(self.caption_ids),
                "non_hallu_score": int((self.hallucinated == 0).sum()),
                "empty": self.empty,
            }
        if len(self.question_ids):
            tasks = [task for task in _PREFIX if (self.task == task).any()]
            parts = {task: self._question_counts(self.task == task) for task in tasks}
            counts |= {name: sum(part[name] for part in parts.values()) for name in parts[tasks[0]]}
            counts |= {f"{_PREFIX[task]}_{name}": n for task in tasks for name, n in parts[task].items()}
            counts["unparsed"] = int((self.prediction < 0).sum())
        return counts

    def _question_counts(self, rows: NDArray[np.bool_]) -> dict[str, int]:
        label, prediction = self.label[rows], self.prediction[rows]
        right_no = int(((prediction == 0) & ~label).sum())
        return {
            "qa_correct_num": len(label),
            "qa_correct_score": int((prediction == label).sum()),
            "qa_no_num": int((~label).sum()),
            "qa_no_score": right_no,
            "qa_ans_no_num": int((prediction == 0).sum()),
            "qa_ans_no_score": right_no,
        }

    def figures(self) -> dict[str, dict[str, float]]:
        """What the official script prints, under its names: percentages with one decimal.

        A group is present if all its dimensions were answered; those the annotations have no question of are no part
        of it.
        """
        c = self.counts()
        figures: dict[str, dict[str, float]] = {}
        if len(self.caption_ids):
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

    def summary(self) -> dict[str, float]:
        """The AMBER score (100 - CHAIR + F1) / 2 of the paper, if both parts were answered."""
        figures = self.figures()
        if "Generative Task" not in figures or "Descriminative Task" not in figures:
            return {}
        return {"AMBER": (100 - figures["Generative Task"]["CHAIR"] + figures["Descriminative Task"]["F1"]) / 2}


def score_responses(
    data: AmberData,
    responses: Mapping[int, str],
    *,
    nouns: Nouns | None = None,
    similarity: Similarity | None = None,
    similarity_name: str | None = None,
    threshold: float = 0.8,
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
        threshold: Two words are one if their similarity is above it (official: 0.8).

    Raises:
        DataError: no responses, an unknown id, a task with missing answers, or a vocabulary the default lemmas do not
            cover.
    """
    items = [data.items[i] for i in _checked_ids(data, responses)]
    captions = [item for item in items if item.task == "generative"]
    questions = [item for item in items if item.task != "generative"]
    if captions and nouns is None:
        beyond = sorted(data.vocabulary - lemma_vocabulary())
        if beyond:
            raise DataError(
                f"relation.json has words that AMBER's release does not have (first: {beyond[0]!r}), and their lemmas "
                "are unknown: pass nouns=, a function from a response to its lemmatised nouns"
            )
        nouns = tagged_nouns()
    same = None if similarity is None else compared(similarity, threshold)
    rows = [caption_counts(nouns(responses[item.id]), item, data, same) for item in captions] if nouns else []
    columns = np.asarray(rows, dtype=np.int64).reshape(len(captions), 6)
    answers = [{"Yes": 1, "No": 0}.get(responses[item.id], -1) for item in questions]
    return AmberTable(
        caption_ids=np.asarray([item.id for item in captions], dtype=np.int64),
        nouns=columns[:, 0],
        hallucinated=columns[:, 1],
        covered=columns[:, 2],
        truth_objects=columns[:, 3],
        cognitive=columns[:, 4],
        cognitive_objects=columns[:, 5],
        empty=sum(not responses[item.id].strip() for item in captions),
        question_ids=np.asarray([item.id for item in questions], dtype=np.int64),
        task=np.asarray([item.task for item in questions], dtype=np.str_),
        label=np.asarray([item.label for item in questions], dtype=np.bool_),
        prediction=np.asarray(answers, dtype=np.int8),
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


def _amber_columns(table: Any) -> FloatArray:
    names = ("hallucinated", "nouns", "right_no", "answered_no", "truth_no")
    return columns(*(getattr(table, name) for name in names))


def _amber(sums: FloatArray) -> FloatArray:
    hallucinated, nouns, right_no, answered_no, truth_no = np.moveaxis(sums, -1, 0)
    return (1 - divide(hallucinated, nouns, np.nan) + divide(2 * right_no, answered_no + truth_no, np.nan)) / 2
