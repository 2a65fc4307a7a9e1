"""POPE of answers that lie in a file, whoever generated them; no model is loaded.

The file holds one answer per question (see :mod:`vlmfix.evals.data.records` for its forms), under ``answer``, ``text``,
``response``, .... Answers find their questions by ``question_id`` (with ``split`` or ``category`` where several files
repeat ids), or by order if no line has one, or if asked to. A ``label`` beside an answer must be the question's.
Without question files every line must carry its ``label``, and ``image`` if several questions are about one image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmfix.errors import DataError

from ..benchmarks.object_questions import PopeQuestion, load_questions
from ..benchmarks.yes_no import PARSERS, Parser, YesNoTable, score_labels
from ..data.records import IMAGE_KEYS, Records, answer_of, number_of, read_rows
from ..stats.intervals import CONFIDENCE, finite, interval_dict
from ..stats.tests import mcnemar
from ..tables import difference_cell, interval_cell, number, p_cell, plain_table
from .chair import write_result

_COLUMNS = ("n", "accuracy", "precision", "recall", "F1", "yes", "MCC")


_FIGURES = ("accuracy", "precision", "recall", "f1", "yes_ratio", "mcc")


_LABELS = {"yes": True, "1": True, "true": True, "no": False, "0": False, "false": False}


_REMEDY = (
    "give the answers as JSON lines with question_id and answer (and split, if there are several question files), or "
    "in the order of the questions"
)


@dataclass(frozen=True)
class Answers:
    """The answers of a file, with what is known of their questions.

    Attributes:
        path: The file.
        table: One row per question.
        splits: Split -> its rows in the table.
        distinct: Rows with every question once: splits share their positives.
    """

    path: Path
    table: YesNoTable
    splits: Mapping[str, Sequence[int]]
    distinct: Sequence[int]

    def tables(self) -> dict[str, YesNoTable]:
        """One table per split."""
        return {split: self.table.take(rows) for split, rows in self.splits.items()}


def score_pope_file(
    path: Path,
    questions: Sequence[Path],
    *,
    parser: str = "official",
    text_key: str | None = None,
    scores: str | None = None,
    by_order: bool = False,
    baseline: Path | None = None,
    out: Path | None = None,
    seed: int = 0,
) -> str:
    """Score POPE answers.

    Args:
        path: The answers, as the module says.
        questions: POPE question files.
        parser: Rule that reads yes or no, see ``metrics.pope.parse_answer``.
        text_key: Where the answer of a line is, if not under a usual name.
        scores: Key of a number that is higher for yes (logit of yes minus logit of no), for the AUC.
        by_order: Match by order although lines have a ``question_id``.
        baseline: Answers to the same questions to compare with: paired differences and McNemar's test.
        out: Where to write figures and integer counts as JSON, if anywhere.
        seed: Seed of the bootstrap.

    Returns:
        A plain-text table, one row per split.

    Raises:
        DataError: Questions and answers do not match, or a file is missing or broken.
    """
    if parser not in PARSERS:
        raise DataError(f"unknown POPE parser {parser!r}: choose one of {', '.join(PARSERS)}")
    asked = [question for file in questions for question in load_questions(file)]
    rule: Parser = parser  # type: ignore[assignment]
    reader = _Reader(asked, rule, text_key, scores, by_order)
    own = reader.read(path)
    other = None if baseline is None else reader.read(baseline)
    result: dict[str, Any] = {
        "benchmark": "pope",
        "parser": parser,
        "splits": {split: _result(table) for split, table in own.tables().items()},
        "mean_f1_of_splits": _mean_f1(own),
    }
    text = f"POPE, parser {parser}, {path}\n"
    if other is None:
        text += plain_table(_rows(own, scores is not None))
    else:
        result["baseline"] = _compared(own, other, seed)
        text += plain_table(_rows(own, scores is not None, other, result["baseline"]))
        text += "\n" + _mcnemar_line(result["baseline"]["mcnemar"])
    if len(own.splits) > 1:
        text += f"\nmean F1 of the splits: {number(result['mean_f1_of_splits'])}"
    write_result(out, path, result)
    return text


@dataclass(frozen=True)
class _Reader:
    questions: Sequence[PopeQuestion]
    parser: Parser
    text_key: str | None
    scores: str | None
    by_order: bool

    def read(self, path: Path) -> Answers:
        rows: Records = read_rows(path, what="answer file")
        if not self.questions:
            return self._from_labels(path, rows)
        rows = self._matched(path, rows)
        for question, (where, row) in zip(self.questions, rows, strict=True):
            if row.get("label") is not None and _label(row, where) != question.label:
                raise DataError(
                    f"{where}: the label is {row['label']!r}, and that of {question.split} question "
                    f"{question.question_id} is {'yes' if question.label else 'no'}: the answers belong to other "
                    "questions, or are in another order"
                )
        splits: dict[str, list[int]] = {}
        first: dict[tuple[int, str], int] = {}
        for index, question in enumerate(self.questions):
            splits.setdefault(question.split, []).append(index)
            first.setdefault((question.image_id, question.text), index)
        table = score_labels(
            [question.label for question in self.questions],
            [answer_of(row, where, self.text_key) for where, row in rows],
            image_ids=[question.image_id for question in self.questions],
            splits=[question.split for question in self.questions],
            items=[question.question_id for question in self.questions],
            parser=self.parser,
            scores=self._numbers(rows),
        )
        return Answers(path, table, splits, list(first.values()))

    def _numbers(self, rows: Records) -> list[float]:
        return [] if self.scores is None else [number_of(row, where, self.scores) for where, row in rows]

    def _matched(self, path: Path, rows: Records) -> Records:
        """The rows in the order of the questions."""
        with_id = [row.get("question_id") is not None for _, row in rows]
        if self.by_order or not any(with_id):
            if len(rows) != len(self.questions):
                raise DataError(
                    f"{path} has {len(rows)} answers{'' if self.by_order else ' without question_id'}, the question "
                    f"files {len(self.questions)} questions: {_REMEDY}"
                )
            return rows
        if not all(with_id):
            raise DataError(f"{rows[with_id.index(False)][0]}: expected 'question_id' as on other lines: {_REMEDY}")
        known = {(question.split, question.question_id) for question in self.questions}
        splits = list(dict.fromkeys(question.split for question in self.questions))
        found: dict[tuple[str, str], tuple[str, Mapping[str, Any]]] = {}
        for where, row in rows:
            key = (_split(row, where, splits), str(row["question_id"]))
            if key not in known:
                raise DataError(
                    f"{where}: the question files have no {key[0]} question {key[1]}; if the answers are in the order "
                    "of the questions, type --by-order"
                )
            if key in found:
                raise DataError(
                    f"{where}: {key[0]} question {key[1]} is answered already, on {found[key][0]}: leave one of the "
                    "lines, or type --by-order if the ids are not those of the question files"
                )
            found[key] = (where, row)
        lacking = [question for question in self.questions if (question.split, question.question_id) not in found]
        if lacking:
            raise DataError(
                f"{path} answers {len(found)} of {len(self.questions)} questions; the first without an answer is "
                f"{lacking[0].split} question {lacking[0].question_id}: answer it, or leave its question file out"
            )
        return [found[question.split, question.question_id] for question in self.questions]

    def _from_labels(self, path: Path, rows: Records) -> Answers:
        labels = [_label(row, where) for where, row in rows]
        images: dict[str, int] = {}
        names = [next((str(row[key]) for key in IMAGE_KEYS if key in row), None) for _, row in rows]
        places = range(len(rows))
        known = all(name is not None for name in names)
        clusters = [images.setdefault(str(name), len(images)) for name in names] if known else list(places)
        asked = [row.get("question", row.get("query")) for _, row in rows]
        first: dict[tuple[int, str], int] = {}
        for place, question in enumerate(asked):
            first.setdefault((clusters[place], str(question)) if question is not None else (-1, str(place)), place)
        table = score_labels(
            labels,
            [answer_of(row, where, self.text_key) for where, row in rows],
            image_ids=clusters,
            items=[
                f"{name}:{question}:{place}" for place, (name, question) in enumerate(zip(names, asked, strict=True))
            ],
            parser=self.parser,
            scores=self._numbers(rows),
        )
        return Answers(path, table, {"all": list(places)}, list(first.values()))


def _split(row: Mapping[str, Any], where: str, splits: Sequence[str]) -> str:
    split = str(row.get("split", row.get("category", splits[0] if len(splits) == 1 else "")))
    if split not in splits:
        raise DataError(
            f"{where}: the question files have the splits {', '.join(splits)}, and the line says {split!r}; score one "
            "split at a time, or add 'split' to every line"
        )
    return split


def _label(row: Mapping[str, Any], where: str) -> bool:
    label = _LABELS.get(str(row.get("label")).strip().lower())
    if label is None:
        raise DataError(
            f"{where}: expected the label yes or no, found {str(row.get('label'))[:40]!r}; without --questions every "
            "line needs one"
        )
    return label


def _result(table: YesNoTable) -> dict[str, Any]:
    return {"counts": table.counts(), "summary": finite(table.summary())}


def _mean_f1(answers: Answers) -> float:
    return sum(table.summary()["f1"] for table in answers.tables().values()) / len(answers.splits)


def _compared(own: Answers, other: Answers, seed: int) -> dict[str, Any]:
    if own.table.question_ids != other.table.question_ids or (own.table.label != other.table.label).any():
        raise DataError(
            f"{other.path} and {own.path} do not answer the same questions in the same order: give --questions and "
            "question_id, or put them in one order"
        )
    splits, baselines = own.tables(), other.tables()
    test = mcnemar(own.table.take(own.distinct), other.table.take(own.distinct))
    return {
        "file": str(other.path),
        "splits": {split: _result(table) for split, table in baselines.items()},
        "mean_f1_of_splits": _mean_f1(other),
        "differences": {split: _differences(splits[split], baselines[split], seed) for split in splits},
        "confidence": CONFIDENCE,
        "mcnemar": {"questions": len(own.distinct)}
        | {"only_method": test.only_a, "only_baseline": test.only_b, "p_value": test.p_value},
    }


def _differences(table: YesNoTable, baseline: YesNoTable, seed: int) -> dict[str, Any]:
    return {
        figure.name: interval_dict(figure.statistic.difference(table, baseline, seed=seed))
        for figure in table.FIGURES
        if figure.statistic.is_defined(table) and figure.statistic.is_defined(baseline)
    }


def _rows(
    own: Answers, with_auc: bool, other: Answers | None = None, compared: Mapping[str, Any] | None = None
) -> list[list[str]]:
    names = (*_FIGURES, *(["auc"] if with_auc else []))
    rows = [["split", *_COLUMNS, *(["AUC"] if with_auc else []), "unparsed"]]
    for split, table in own.tables().items():
        rows.append([split, *_cells(table, names)])
        if other is not None and compared is not None:
            rows.append(["  baseline", *_cells(other.tables()[split], names)])
            found = compared["differences"][split]
            rows.append(["  difference", "", *(difference_cell(found[name]) for name in names), ""])
            rows.append(["  95 %", "", *(interval_cell(found[name]) for name in names), ""])
    return rows


def _cells(table: YesNoTable, names: Sequence[str]) -> list[str]:
    summary, counts = table.summary(), table.counts()
    return [str(counts["n"]), *(number(summary[name]) for name in names), str(counts["unparsed"])]


def _mcnemar_line(test: Mapping[str, Any]) -> str:
    return (
        f"McNemar over {test['questions']} distinct questions: only {test['only_method']} right here, only "
        f"{test['only_baseline']} in the baseline, p = {p_cell(test['p_value'])} (exact, questions independent)"
    )
