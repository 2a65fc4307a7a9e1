"""HallusionBench as a task: yes/no questions about figures, and the same without any.

In a file for ``vlmfix score hallusionbench`` rows find their questions by their key fields, or by order if asked to.
Each has a judge code (``judge``, ``gpt4v_output_gpt_check`` or ``correctness``: 0 incorrect, 1 correct, 2 unclear) and
perhaps ``same`` (0 or 1); if no row is judged, the word yes or no of the model's text is read.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from vlmfix.errors import DataError

from ...data.answers import AnswerFile, FileAnswers, yes_no
from ...data.matching import Asked
from ...data.samples import Answer, Answers
from ...data.source import dataset_rows, find_file, find_image, is_dataset, row_image
from ...stats.bootstrap import finite
from ...tables import number, plain_table
from ..base import ScoredFile, write_list
from ..questions import Questions, add_question_file
from ..yes_no import readings
from .data import KEY_FIELDS, HallusionQuestion, load_hallusionbench, read_questions
from .figures import HallusionTable, score_answers, score_judgements

T = TypeVar("T")

_JUDGE_KEYS = ("judge", "gpt4v_output_gpt_check", "correctness")


@dataclass(frozen=True)
class HallusionBench(Questions):
    """The questions of HallusionBench, or of some of its sets of figures.

    Attributes:
        codes: What a judge gave each answer; None if the answers are read.
        same: Whether each answer agrees with that to the original variant, if that was judged.
        judge: Who gave the codes.
    """

    name: ClassVar[str] = "hallusionbench"
    title: ClassVar[str] = "HallusionBench"
    summary: ClassVar[str] = "yes/no questions about figures, original and edited"
    figures = HallusionTable.FIGURES
    matched_on: ClassVar[Mapping[str, str]] = {"yes bias": "yes_ratio"}
    identified_by: ClassVar[tuple[str, ...]] = (*KEY_FIELDS, "text", "label")
    new_tokens: ClassVar[int] = 64

    asked: tuple[HallusionQuestion, ...]
    codes: tuple[int, ...] | None = None
    same: tuple[bool, ...] | None = None
    judge: str = ""

    @classmethod
    def load(cls, where: str) -> list[HallusionQuestion]:
        """Read the questions, and find the figure of each that has one.

        Args:
            where: A folder with ``HallusionBench.json`` and the figures (``VD/...``, ``VS/...``, also below
                ``hallusion_bench``), or a data set with the same fields and an image.

        Raises:
            DataError: A file is missing or broken, or a figure is missing.
        """
        if is_dataset(where):
            rows = list(dataset_rows(where))
            return [
                question if question.without_image else replace(question, path=_needed(row_image(row, place), place))
                for question, (place, row) in zip(read_questions(rows), rows, strict=True)
            ]
        folder = Path(where)
        places = [folder, folder / "hallusion_bench", folder / "images", folder / "data"]
        found = []
        for q in load_hallusionbench(find_file(folder, ["HallusionBench.json"], "questions")):
            what = f"question {'/'.join(q.key)}"
            path = None if q.without_image else find_image(places, [_needed(q.image, what)], what)
            found.append(replace(q, path=path))
        return found

    def score(self, answers: Answers) -> HallusionTable:
        """One row per question, by the judge's codes if there are any."""
        if self.codes is None:
            return score_answers(self.asked, self.texts(answers), self.scores(answers))
        return score_judgements(self.asked, self.codes, same=self.same, judge=self.judge)

    def about(self) -> str:
        """Questions, figures and who judged."""
        without = sum(sample.path is None for sample in self.each)
        sets = len({q.unit for q in self.asked})
        return (
            f"HallusionBench: {len(self.asked)} questions ({without} without a figure), {sets} sets of figures, which "
            "are what is resampled; read by the word yes or no, not judged by GPT-4 as officially"
        )

    def export(self, folder: Path, answers: Answers) -> None:
        """``HallusionBench_result.json``: the question file with ``model_prediction``, as the official script reads."""
        rows = [
            {
                "category": q.category,
                "subcategory": q.subcategory,
                "visual_input": str(q.visual_input),
                "set_id": q.set_id,
                "figure_id": q.figure_id,
                "question_id": q.question_id,
                "question": q.text,
                "gt_answer_details": q.reference,
                "gt_answer": str(int(q.label)),
                "filename": q.image,
                "model_prediction": text,
            }
            for q, text in zip(self.asked, self.texts(answers), strict=True)
        ]
        write_list(folder / "HallusionBench_result.json", rows)

    @classmethod
    def add_score_arguments(cls, parser: ArgumentParser) -> None:
        """Add the file of questions."""
        add_question_file(parser, "HallusionBench.json")

    @classmethod
    def from_files(cls, path: Path, options: Namespace) -> tuple[HallusionBench, FileAnswers]:
        """Read answers or judgements.

        Raises:
            DataError: Questions and answers do not match, or only some rows are judged.
        """
        questions = load_hallusionbench(options.questions)
        asked = [Asked(q.key, q.text, q.image or "", yes_no(q.label)) for q in questions]
        file = AnswerFile.of(path, options)
        found = file.matched(file.rows(), asked, fields=KEY_FIELDS)
        picked, rows = [questions[i] for i in found], list(found.values())
        judge = next((key for key in _JUDGE_KEYS if key in rows[0].fields), None)
        if judge is None:
            judged = next((row.where for row in rows if any(key in row.fields for key in _JUDGE_KEYS)), None)
            if judged is not None:
                raise DataError(f"{judged} has a judge code and {rows[0].where} has none: judge all lines, or none")
            given = file.given(rows, [asked[i] for i in found], readings)
            return cls.answered(file, picked, [each.answer() for each in given])
        codes = tuple(row.code(judge, 2) for row in rows)
        same = tuple(row.code("same", 1) == 1 for row in rows) if "same" in rows[0].fields else None
        return cls.answered(file, picked, [Answer("")] * len(rows), codes=codes, same=same, judge=f"codes in {judge!r}")

    def report_file(self, own: ScoredFile, other: ScoredFile | None, seed: int) -> tuple[dict[str, Any], str]:
        """The official figures."""
        table: HallusionTable = own.table
        counts, figures, yes_no_figures = table.counts(), table.percentages(), table.yes_no()
        columns = ["questions", *figures, "unclear", "yes/no diff", "fp"]
        values = [*(number(value, percent=False) for value in figures.values()), str(counts["unclear"])]
        values += [f"{value:.3f}" for value in yes_no_figures.values()]
        lines = [f"HallusionBench, judged by {table.judge}, {own.path}"]
        lines.append(plain_table([columns, [str(len(table)), *values]]))
        if not table.judged:
            lines.append(f"unparsed: {counts['unparsed']} of {len(table)} (not one of yes and no: unclear)")
        result = {"judge": table.judge, "counts": counts, "figures": finite(figures), "yes_no": finite(yes_no_figures)}
        return result, "\n".join(lines)


def _needed(image: T | None, place: str) -> T:
    if image is None:
        raise DataError(f"{place}: expected an image, because the question is about a figure")
    return image
