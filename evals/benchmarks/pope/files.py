"""POPE of answers in a file, whoever generated them.

Answers find their questions by image and question, by ``question_id`` (with ``split`` or ``category`` where several
question files repeat ids), or in the order of the questions if every question beside an answer says so, or if asked to.
Without question files every line must carry its ``label``, and ``image`` if several questions are about one image.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from vlmfix.errors import DataError

from ...data.answers import AnswerFile, FileAnswers, label_of, once_each, yes_no
from ...data.matching import Asked, Row
from ...data.records import number_of
from ...data.samples import Sample
from ...stats.intervals import CONFIDENCE, finite, interval_dict
from ...stats.tests import mcnemar
from ...tables import difference_cell, interval_cell, number, p_cell, plain_table
from ..base import ScoredFile
from ..object_questions import PopeQuestion, load_questions
from ..parts import add_by_order
from ..yes_no import PARSERS, Parser, YesNoTable, distinct_rows, readings
from .task import Pope

_COLUMNS = ("n", "accuracy", "precision", "recall", "F1", "yes", "MCC")

_FIGURES = ("accuracy", "precision", "recall", "f1", "yes_ratio", "mcc")

_REMEDY = "answer it, leave its question file out, or type --subset to score what is answered"


class PopeFile(Pope):
    """POPE as a file answers it: each split has answers of its own, even to questions that splits share."""

    file_flag: ClassVar[str] = "--answers"

    @classmethod
    def add_score_arguments(cls, parser: ArgumentParser) -> None:
        """Add what scoring needs to know beside the answers."""
        parser.add_argument(
            "--questions",
            type=Path,
            nargs="+",
            default=[],
            metavar="FILE",
            help="POPE question files (default: labels beside the answers)",
        )
        parser.add_argument("--parser", choices=PARSERS, default="official", help="reads yes or no (default: official)")
        parser.add_argument("--scores", metavar="KEY", help="key of a yes/no logit (higher means yes), for the AUC")
        add_by_order(parser)

    @classmethod
    def from_files(cls, path: Path, options: Namespace) -> tuple[Pope, FileAnswers]:
        """See :func:`read_pope`."""
        return read_pope(path, options)

    def prompt_text(self, question: PopeQuestion) -> str:
        """What tells a question's answer from all others."""
        return f"{question.split} {question.question_id}: {question.text}"

    def by_split(self, table: YesNoTable) -> dict[str, YesNoTable]:
        """One table per split."""
        rows = {split: [i for i, each in enumerate(table.splits) if each == split] for split in self.splits}
        return {split: table.take(own) for split, own in rows.items()}

    def _part(self, table: YesNoTable) -> dict[str, Any]:
        tables = self.by_split(table)
        mean = sum(each.summary()["f1"] for each in tables.values()) / len(tables)
        splits = {split: {"counts": each.counts(), "summary": finite(each.summary())} for split, each in tables.items()}
        return {"splits": splits, "mean_f1_of_splits": mean}

    def report_file(self, own: ScoredFile, other: ScoredFile | None, seed: int) -> tuple[dict[str, Any], str]:
        """One row per split, and the differences to a baseline."""
        with_auc = "score" in own.table.columns
        result: dict[str, Any] = {"parser": self.parser, **self._part(own.table)}
        text = f"POPE, parser {self.parser}, {own.path}\n"
        if other is None:
            text += plain_table(self._rows(own, with_auc))
        else:
            result["baseline"] = self._compared(own, other, seed)
            text += plain_table(self._rows(own, with_auc, other, result["baseline"]))
            text += "\n" + _mcnemar_line(result["baseline"]["mcnemar"])
        if (left := int(own.table.unparsed.sum())) and "counted" in own.table.columns:
            accuracy = number(float(own.table.correct.mean()))
            text += f"\n{left} unparsed answers are in no figure; as wrong ones, the accuracy of all is {accuracy}"
        if len(self.splits) > 1:
            text += f"\nmean F1 of the splits: {number(result['mean_f1_of_splits'])}"
        return result, text

    def _compared(self, own: ScoredFile, other: ScoredFile, seed: int) -> dict[str, Any]:
        table, baseline = own.table, other.table
        if table.question_ids != baseline.question_ids or (table.label != baseline.label).any():
            raise DataError(
                f"{other.path} and {own.path} do not answer the same questions in the same order: give --questions and "
                "question_id, or put them in one order"
            )
        once = distinct_rows(table.keys)
        test = mcnemar(table.take(once), baseline.take(once))
        splits, others = self.by_split(table), self.by_split(baseline)
        return {
            "file": str(other.path),
            **other.facts,
            **self._part(baseline),
            "differences": {split: _differences(splits[split], others[split], seed) for split in splits},
            "confidence": CONFIDENCE,
            "mcnemar": {"questions": len(once)}
            | {"only_method": test.only_a, "only_baseline": test.only_b, "p_value": test.p_value},
        }

    def _rows(
        self,
        own: ScoredFile,
        with_auc: bool,
        other: ScoredFile | None = None,
        compared: Mapping[str, Any] | None = None,
    ) -> list[list[str]]:
        names = (*_FIGURES, *(["auc"] if with_auc else []))
        rows = [["split", *_COLUMNS, *(["AUC"] if with_auc else []), "unparsed"]]
        for split, table in self.by_split(own.table).items():
            rows.append([split, *_cells(table, names)])
            if other is not None and compared is not None:
                found = compared["differences"][split]
                rows.append(["  baseline", *_cells(self.by_split(other.table)[split], names)])
                rows.append(["  difference", "", *(difference_cell(found.get(name)) for name in names), ""])
                rows.append(["  95 %", "", *(interval_cell(found.get(name)) for name in names), ""])
        return rows


def read_pope(path: Path, options: Namespace) -> tuple[Pope, FileAnswers]:
    """Read answers, and the questions that they are to.

    Args:
        path: The answers, as the module says.
        options: As typed.

    Raises:
        DataError: Questions and answers do not match, or a file is missing or broken.
    """
    if options.parser not in PARSERS:
        raise DataError(f"unknown POPE parser {options.parser!r}: choose one of {', '.join(PARSERS)}")
    file = AnswerFile.of(path, options)
    rows = file.rows()
    asked, rows = _asked(file, rows, options) if options.questions else _from_labels(file, rows)
    given = file.given(
        rows, [q.text for q in asked], [yes_no(q.label) for q in asked], partial(readings, parser=options.parser)
    )
    scores = [None if options.scores is None else number_of(row.fields, row.where, options.scores) for row in rows]
    parser: Parser = options.parser
    task = PopeFile(tuple(asked), (), "{question}", 0, parser)
    samples = [Sample(Pope.name, q.image_id, None, task.prompt_text(q)) for q in asked]
    return task, FileAnswers(file, samples, [g.answer(score) for g, score in zip(given, scores, strict=True)])


def _asked(file: AnswerFile, rows: Sequence[Row], options: Namespace) -> tuple[list[PopeQuestion], list[Row]]:
    """The questions of the question files that are answered, and the row that answers each."""
    questions = _questions(options.questions)
    if any("repope" in path.name.lower() for path in options.questions):
        file.notes.append("the labels are RePOPE's: not comparable with figures of POPE")
    file.facts["questions"] = {
        path.name: sum(q.split == split for q in questions)
        for path, split in zip(options.questions, dict.fromkeys(q.split for q in questions), strict=False)
    }
    found = file.matched(
        rows,
        [Asked((q.question_id,), q.text, q.image, yes_no(q.label), q.split) for q in questions],
        remedy=_REMEDY,
        subset=options.subset,
        source="the question files",
        by_order=options.by_order,
    )
    if len(found) < len(questions):
        file.notes.append(
            f"SUBSET: {len(found)} of {len(questions)} questions; not comparable with figures of the whole"
        )
    return [questions[index] for index in found], list(found.values())


def _questions(files: Sequence[Path]) -> list[PopeQuestion]:
    """The questions of several files.

    Raises:
        DataError: Two files are of one split: two releases, or one file twice.
    """
    questions: list[PopeQuestion] = []
    of_split: dict[str, tuple[Path, int]] = {}
    for path in files:
        own = load_questions(path)
        for split in dict.fromkeys(q.split for q in own):
            count = sum(q.split == split for q in own)
            first, others = of_split.setdefault(split, (path, count))
            if first is not path:
                raise DataError(
                    f"{first} and {path} both hold {split} questions ({others} and {count}): releases differ in "
                    "questions and labels (POPE's first has 2910 random ones, the current one 3000; RePOPE corrects "
                    "labels) and are never merged: give one of them"
                )
        questions += own
    return questions


def _from_labels(file: AnswerFile, rows: Sequence[Row]) -> tuple[list[PopeQuestion], list[Row]]:
    """Questions made of rows that bring their labels."""
    if all(row.image is not None and row.texts for row in rows):
        rows, repeated = once_each(rows)
        file.repeats(repeated)
    labels = [label_of(row, "without --questions every line needs one") for row in rows]
    if any(key == "answer" for key, _ in labels):
        file.notes.append("'answer' is taken for the label, because another key holds the model's text")
    images: dict[str, int] = {}
    known = all(row.image is not None for row in rows)
    asked = []
    for place, (row, (_, label)) in enumerate(zip(rows, labels, strict=True)):
        name = str(row.image) if row.image is not None else ""
        cluster = images.setdefault(name, len(images)) if known else place
        text = next(iter(row.texts.values()), None)
        item = f"{name}: {text}" if text is not None else f"{name}:{place}"
        asked.append(PopeQuestion(str(place), cluster, name, "", item, label, "all"))
    return asked, list(rows)


def _differences(table: YesNoTable, baseline: YesNoTable, seed: int) -> dict[str, Any]:
    return {
        figure.name: interval_dict(figure.statistic.difference(table, baseline, seed=seed))
        for figure in table.FIGURES
        if figure.statistic.is_defined(table) and figure.statistic.is_defined(baseline)
    }


def _cells(table: YesNoTable, names: Sequence[str]) -> list[str]:
    summary, counts = table.summary(), table.counts()
    return [str(counts["n"]), *(number(summary.get(name)) for name in names), str(counts["unparsed"])]


def _mcnemar_line(test: Mapping[str, Any]) -> str:
    return (
        f"McNemar over {test['questions']} distinct questions: only {test['only_method']} right here, only "
        f"{test['only_baseline']} in the baseline, p = {p_cell(test['p_value'])} (exact, questions independent)"
    )
