"""HallusionBench of answers in a file, judged or not.

Rows find their questions by their key fields, or by order if asked to. Each has a judge code (``judge``,
``gpt4v_output_gpt_check`` or ``correctness``: 0 incorrect, 1 correct, 2 unclear) and perhaps ``same`` (0 or 1); if no
row is judged, the word yes or no of the model's text is read.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmfix.errors import DataError

from ...data.answers import AnswerFile, FileAnswers, yes_no
from ...data.matching import Asked, Row
from ...data.samples import Answer, Answers, Sample
from ...stats.intervals import finite
from ...tables import number, plain_table
from ..base import ScoredFile
from ..parts import add_by_order, answered, code_of, subset_lines
from ..yes_no import readings
from .data import KEY_FIELDS, HallusionQuestion, load_hallusionbench
from .figures import HallusionTable, score_judgements
from .task import HallusionBench

_JUDGE_KEYS = ("judge", "gpt4v_output_gpt_check", "correctness")


@dataclass(frozen=True)
class HallusionFile(HallusionBench):
    """HallusionBench as a file answers it.

    Attributes:
        total: How many questions there are.
        codes: What a judge gave each answer; None if the answers are read.
        same: Whether each answer agrees with that to the original variant, if that was judged.
        judge: Who gave the codes.
    """

    total: int
    codes: tuple[int, ...] | None = None
    same: tuple[bool, ...] | None = None
    judge: str = ""

    @classmethod
    def add_score_arguments(cls, parser: ArgumentParser) -> None:
        """Add what scoring needs to know beside the answers."""
        parser.add_argument("--questions", type=Path, required=True, metavar="FILE", help="HallusionBench.json")
        add_by_order(parser)

    @classmethod
    def from_files(cls, path: Path, options: Namespace) -> tuple[HallusionBench, FileAnswers]:
        """See :func:`read_hallusionbench`."""
        return read_hallusionbench(path, options)

    def score(self, answers: Answers) -> HallusionTable:
        """One row per question, by the judge's codes if there are any."""
        if self.codes is None:
            return super().score(answers)
        return score_judgements(self.asked, self.codes, same=self.same, judge=self.judge)

    def report_file(self, own: ScoredFile, other: ScoredFile | None, seed: int) -> tuple[dict[str, Any], str]:
        """The official figures."""
        table, parts = own.table, {"questions": (len(self.asked), self.total)}
        counts, figures = table.counts(), table.percentages()
        result = {"judge": table.judge, "counts": counts, "figures": finite(figures), "answered": answered(parts)}
        columns = ["questions", *figures, "unclear", "yes/no diff", "fp"]
        values = [*(number(value, percent=False) for value in figures.values()), str(counts["unclear"])]
        values += [f"{value:.3f}" for value in table.yes_no().values()]
        lines = [f"HallusionBench, judged by {table.judge}, {own.path}", *subset_lines(parts)]
        lines.append(plain_table([columns, [str(len(table)), *values]]))
        if not table.judged:
            lines.append(f"unparsed: {counts['unparsed']} of {len(table)} (not one of yes and no: unclear)")
        return {**result, "yes_no": finite(table.yes_no())}, "\n".join(lines)


def read_hallusionbench(path: Path, options: Namespace) -> tuple[HallusionBench, FileAnswers]:
    """Read answers or judgements.

    Args:
        path: The file, as the module says.
        options: As typed.

    Raises:
        DataError: Questions and answers do not match, or only some rows are judged.
    """
    questions = load_hallusionbench(options.questions)
    file = AnswerFile.of(path, options)
    asked = [Asked(q.key, q.text, q.image or "", yes_no(q.label)) for q in questions]
    found = file.matched(
        file.rows(),
        asked,
        fields=KEY_FIELDS,
        subset=options.subset,
        by_order=options.by_order,
        remedy="--subset scores those that are there",
    )
    picked, rows = tuple(questions[i] for i in found), list(found.values())
    judge = next((key for key in _JUDGE_KEYS if key in rows[0].fields), None)
    each = tuple(Sample(HallusionBench.name, 0, None, "/".join(q.key)) for q in picked)
    if judge is None:
        judged = next((row.where for row in rows if any(key in row.fields for key in _JUDGE_KEYS)), None)
        if judged is not None:
            raise DataError(f"{judged} has a judge code and {rows[0].where} has none: judge all lines, or none")
        given = file.given(rows, [asked[i].text for i in found], [asked[i].truth for i in found], readings)
        task = HallusionFile(picked, each, each, "{question}", 0, len(questions))
        return task, FileAnswers(file, each, [each.answer() for each in given])
    return _judged(file, rows, picked, each, judge, len(questions))


def _judged(
    file: AnswerFile,
    rows: Sequence[Row],
    picked: tuple[HallusionQuestion, ...],
    each: tuple[Sample, ...],
    judge: str,
    total: int,
) -> tuple[HallusionBench, FileAnswers]:
    codes = tuple(code_of(row.fields, judge, row.where, 2) for row in rows)
    same = None
    if "same" in rows[0].fields:
        same = tuple(code_of(row.fields, "same", row.where, 1) == 1 for row in rows)
    task = HallusionFile(picked, each, each, "{question}", 0, total, codes, same, f"codes in {judge!r}")
    return task, FileAnswers(file, each, [Answer("", (), False, (), None, 0.0)] * len(rows))
