"""POPE: yes/no questions about objects (Li et al. 2023, arXiv:2305.10355).

In a file for ``vlmfix score pope`` answers find their questions by image and question, by ``question_id`` (with
``split`` or ``category`` where several question files repeat ids), or in the order of the questions if every question
beside an answer says so, or if asked to. Without question files every line must carry its ``label``, and ``image`` if
several questions are about one image.

RePOPE (Neuhaus and Hein 2025, arXiv:2504.15707) corrects POPE's labels and leaves ambiguous questions out. Beside
POPE's question files its own score the same answers a second time.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from vlmfix.errors import DataError

from ...data.answers import AnswerFile, FileAnswers, yes_no
from ...data.matching import Asked
from ...data.records import number_of
from ...data.samples import Answer, Answers, Sample
from ...data.write import digest
from ...options import EvalOptions
from ...stats.bootstrap import CONFIDENCE, finite
from ...stats.table import differences
from ...tables import difference_cell, interval_cell, number, p_cell, plain_table
from ..base import Benchmark, ScoredFile, safe_name, write_lines
from ..choice import RunData, answer_limit
from ..object_choice import PROMPT, choose_questions
from ..object_questions import SPLITS, PopeQuestion, corrections, releases
from ..questions import add_by_order
from ..yes_no import PARSERS, Parser, YesNoTable, mcnemar_once, readings, score_labels
from .data import answered_questions, labelled_questions, read_files

_COLUMNS = ("n", "accuracy", "precision", "recall", "F1", "yes", "MCC")

_FIGURES = ("accuracy", "precision", "recall", "f1", "yes_ratio", "mcc")


@dataclass(frozen=True)
class Pope(Benchmark):
    """Questions to answer.

    Attributes:
        asked: Every question of every split, in file order.
        corrected: Those of them that RePOPE asks, with its labels; none without its files.
        samples: Each different (image, question) once: the splits share their positive questions.
        prompt: Template with ``{question}``.
        max_new_tokens: Limit of the answer's length.
        parser: Rule that reads yes or no.
        split_by_split: Whether each split has answers of its own, even to questions that splits share, as in files.
    """

    name: ClassVar[str] = "pope"
    title: ClassVar[str] = "POPE"
    summary: ClassVar[str] = "yes/no questions whether an object is in the image"
    figures = YesNoTable.FIGURES
    matched_on: ClassVar[Mapping[str, str]] = {"yes bias": "yes_ratio"}
    row_by_row: ClassVar[bool] = True
    file_flag: ClassVar[str] = "--answers"

    asked: tuple[PopeQuestion, ...]
    samples: tuple[Sample, ...]
    prompt: str
    max_new_tokens: int
    parser: Parser = "official"
    split_by_split: bool = False
    corrected: tuple[PopeQuestion, ...] = ()

    @classmethod
    def make(cls, options: EvalOptions, data: RunData) -> Pope:
        """Ask each different question once."""
        asked, paths = choose_questions(options, data, SPLITS, testbed_images=200)
        corrected = corrections(asked, read_files(releases(options.pope_questions)[1]))
        prompt, limit = options.pope_prompt or PROMPT, answer_limit(options)
        samples = tuple(
            Sample(cls.name, image_id, paths[image_id], prompt.replace("{question}", text), limit)
            for image_id, text in dict.fromkeys((q.image_id, q.text) for q in asked)
        )
        return cls(tuple(asked), samples, prompt, limit, corrected=tuple(corrected))

    @property
    def splits(self) -> list[str]:
        """The splits, in the order of the questions."""
        return list(dict.fromkeys(question.split for question in self.asked))

    def prompt_text(self, question: PopeQuestion) -> str:
        """What the model is asked of a question; in a file, what tells its answer from all others."""
        if self.split_by_split:
            return f"{question.split} {question.question_id}: {question.text}"
        return self.prompt.replace("{question}", question.text)

    def settings(self) -> dict[str, Any]:
        """Prompt, length limit, image ids and a digest of the questions."""
        found: dict[str, Any] = {
            "prompt": self.prompt,
            "max_new_tokens": self.max_new_tokens,
            "image_ids": sorted({q.image_id for q in self.asked}),
            "questions": digest([[q.split, q.image_id, q.text, q.label] for q in self.asked]),
        }
        if self.corrected:
            found["repope"] = digest([[q.split, q.question_id, q.label] for q in self.corrected])
        return found

    def _answer(self, question: PopeQuestion, answers: Answers) -> Answer:
        return answers[self.name, question.image_id, self.prompt_text(question)]

    def score(self, answers: Answers) -> YesNoTable:
        """Read yes or no from every answer, in the order of the questions."""
        return self._labelled(self.asked, answers)

    def repope(self, answers: Answers) -> YesNoTable | None:
        """The same answers by RePOPE's labels; None without its questions."""
        return self._labelled(self.corrected, answers) if self.corrected else None

    def _labelled(self, questions: Sequence[PopeQuestion], answers: Answers) -> YesNoTable:
        given = [self._answer(question, answers) for question in questions]
        return score_labels(
            [q.label for q in questions],
            [answer.text for answer in given],
            image_ids=[q.image_id for q in questions],
            splits=[q.split for q in questions],
            items=[q.text for q in questions],
            parser=self.parser,
            scores=[answer.score for answer in given],
        )

    def by_split(self, table: YesNoTable, answers: Answers) -> dict[str, YesNoTable]:
        """The table of each split, with RePOPE's behind it as ``repope_SPLIT``."""
        repope = self.repope(answers)
        others = {} if repope is None else repope.by_split()
        found: dict[str, YesNoTable] = {}
        for split, part in table.by_split().items():
            found |= {split: part, **({f"repope_{split}": others[split]} if split in others else {})}
        return found

    def about(self) -> str:
        """Parser, questions and images."""
        splits = [question.split for question in self.asked]
        sizes = ", ".join(f"{split} {splits.count(split)}" for split in self.splits)
        images = len({q.image_id for q in self.asked})
        repope = f"; RePOPE's labels of {len(self.corrected)} of them" if self.corrected else ""
        return f"POPE {self.parser} parser, {len(self.asked)} questions ({sizes}) on {images} images{repope}"

    def details(
        self, label: str, tables: Mapping[str, Any], answers: Mapping[str, Answers], seed: int
    ) -> dict[str, Any]:
        """Counts and summary of each split and of all."""
        table: YesNoTable = tables[label]
        found = {split: _figures(part) for split, part in self.by_split(table, answers[label]).items()}
        mean_f1 = _split_figures(table)["mean_f1_of_splits"]
        everything = {"parser": table.parser, "all": _figures(table)}
        return {**everything, **found, "splits": list(found), "mean_f1_of_splits": mean_f1}

    def export(self, folder: Path, answers: Answers) -> None:
        """``pope_SPLIT.jsonl``: one line per question in file order, with what the official script reads of both files.

        It takes the answers (question, answer) from one file and the labels from another: this one is good for both.
        """
        for split in self.splits:
            rows = [
                {
                    "question_id": q.question_id,
                    "image": q.image,
                    "question": q.text,
                    "answer": self._answer(q, answers).text,
                    "label": "yes" if q.label else "no",
                }
                for q in self.asked
                if q.split == split
            ]
            write_lines(folder / f"pope_{safe_name(split)}.jsonl", rows)

    @classmethod
    def add_score_arguments(cls, parser: ArgumentParser) -> None:
        """Add what scoring needs to know beside the answers."""
        parser.add_argument(
            "--questions",
            type=Path,
            nargs="+",
            default=[],
            metavar="FILE",
            help="POPE question files, and RePOPE's beside them (default: labels beside the answers)",
        )
        parser.add_argument("--parser", choices=PARSERS, default="official", help="reads yes or no (default: official)")
        parser.add_argument("--scores", metavar="KEY", help="key of a yes/no logit (higher means yes), for the AUC")
        add_by_order(parser)

    @classmethod
    def from_files(cls, path: Path, options: Namespace) -> tuple[Pope, FileAnswers]:
        """Read answers, and the questions that they are to.

        Raises:
            DataError: Questions and answers do not match, or a file is missing or broken.
        """
        file = AnswerFile.of(path, options)
        rows = file.rows()
        asked, rows, corrected = (
            answered_questions(file, rows, options) if options.questions else (*labelled_questions(file, rows), [])
        )
        known = [Asked((), q.text, truth=yes_no(q.label)) for q in asked]
        given = file.given(rows, known, partial(readings, parser=options.parser))
        scores = [None if options.scores is None else number_of(row.fields, row.where, options.scores) for row in rows]
        made = cls(tuple(asked), (), "{question}", 0, options.parser, split_by_split=True, corrected=tuple(corrected))
        samples = [Sample(cls.name, q.image_id, None, made.prompt_text(q)) for q in asked]
        return made, FileAnswers(file, samples, [g.answer(score) for g, score in zip(given, scores, strict=True)])

    def report_file(self, own: ScoredFile, other: ScoredFile | None, seed: int) -> tuple[dict[str, Any], str]:
        """One row per split, and the differences to a baseline."""
        with_auc = "score" in own.table.columns
        result: dict[str, Any] = {"parser": self.parser, **_split_figures(own.table)}
        if (repope := self.repope(own.answers)) is not None:
            result["repope"] = _split_figures(repope)
        text = f"POPE, parser {self.parser}, {own.path}\n"
        if other is None:
            text += plain_table(self._rows(own, with_auc))
        else:
            result["baseline"] = self._compared(own, other, seed)
            text += plain_table(self._rows(own, with_auc, other, result["baseline"]))
            text += "\n" + "\n".join([_mcnemar_line(result["baseline"]["mcnemar"]), *self._turns(result["baseline"])])
        if (left := int(own.table.unparsed.sum())) and "counted" in own.table.columns:
            accuracy = number(float(own.table.correct.mean()))
            text += f"\n{left} unparsed answers are in no figure; as wrong ones, the accuracy of all is {accuracy}"
        if len(self.splits) > 1:
            text += f"\nmean F1 of the splits: {number(result['mean_f1_of_splits'])}"
            if repope is not None:
                text += f", by RePOPE's labels {number(result['repope']['mean_f1_of_splits'])}"
        return result, text

    def _compared(self, own: ScoredFile, other: ScoredFile, seed: int) -> dict[str, Any]:
        table, baseline = own.table, other.table
        if table.question_ids != baseline.question_ids or (table.label != baseline.label).any():
            raise DataError(
                f"{other.path} and {own.path} do not answer the same questions in the same order: give --questions and "
                "question_id, or put them in one order"
            )
        others = other.task.by_split(baseline, other.answers)
        repope = other.task.repope(other.answers)
        return {
            "file": str(other.path),
            **other.facts,
            **_split_figures(baseline),
            **({} if repope is None else {"repope": _split_figures(repope)}),
            "differences": {
                split: differences(part.FIGURES, part, others[split], seed)
                for split, part in self.by_split(table, own.answers).items()
            },
            "confidence": CONFIDENCE,
            "mcnemar": mcnemar_once(table, baseline),
        }

    def _turns(self, compared: Mapping[str, Any]) -> Iterator[str]:
        """The splits in which RePOPE's labels turn the ranking by F1 round, a line each."""
        f1 = {split: found["f1"]["estimate"] for split, found in compared["differences"].items()}
        for split in self.splits:
            before, after = f1[split], f1.get(f"repope_{split}", 0.0)
            if before * after < 0:
                changes = f"{100 * before:+.1f} by POPE's labels and {100 * after:+.1f} by RePOPE's"
                yield f"{split}: the ranking turns, F1 is {changes}"

    def _rows(
        self,
        own: ScoredFile,
        with_auc: bool,
        other: ScoredFile | None = None,
        compared: Mapping[str, Any] | None = None,
    ) -> list[list[str]]:
        names = (*_FIGURES, *(["auc"] if with_auc else []))
        rows = [["split", *_COLUMNS, *(["AUC"] if with_auc else []), "unparsed"]]
        tables = self.by_split(own.table, own.answers)
        for split, table in tables.items():
            rows.append([split, *_cells(table, names)])
            if (before := tables.get(split.removeprefix("repope_"))) is not table and before is not None:
                new, old = table.summary(), before.summary()
                changes = (f"{100 * (new[name] - old[name]):+.1f}" if name in new else "" for name in names)
                rows.append(["  - POPE", "", *changes, ""])
            if other is not None and compared is not None:
                found = compared["differences"][split]
                theirs = other.task.by_split(other.table, other.answers)[split]
                rows.append(["  baseline", *_cells(theirs, names)])
                rows.append(["  difference", "", *(difference_cell(found.get(name)) for name in names), ""])
                rows.append(["  95 %", "", *(interval_cell(found.get(name)) for name in names), ""])
        return rows


def _figures(table: YesNoTable) -> dict[str, Any]:
    return {"counts": table.counts(), "summary": finite(table.summary())}


def _split_figures(table: YesNoTable) -> dict[str, Any]:
    """Counts and summary of each split, and their mean F1, which LLaVA prints; a table's F1 pools all questions."""
    splits = {split: _figures(part) for split, part in table.by_split().items()}
    f1 = [part["summary"]["f1"] for part in splits.values()]
    return {"splits": splits, "mean_f1_of_splits": sum(f1) / len(f1)}


def _cells(table: YesNoTable, names: Sequence[str]) -> list[str]:
    summary, counts = table.summary(), table.counts()
    return [str(counts["n"]), *(number(summary.get(name)) for name in names), str(counts["unparsed"])]


def _mcnemar_line(test: Mapping[str, Any]) -> str:
    return (
        f"McNemar over {test['questions']} distinct questions: only {test['only_method']} right here, only "
        f"{test['only_baseline']} in the baseline, p = {p_cell(test['p_value'])} (exact, questions independent)"
    )
