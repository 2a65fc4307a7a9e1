"""MMVP as a task: pairs of images that look alike to CLIP, one question with two options each.

``vlmfix score mmvp`` takes the official answer file: rows of question_id (from 1), prompt, answer and response. There
``answer`` is the right answer: it is never read as the model's. Ids make the pairs, never the order.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from vlmfix.errors import DataError

from ...data.answers import AnswerFile, FileAnswers
from ...data.formats import labelled
from ...data.matching import Asked, Row
from ...data.records import read_rows, text_of
from ...data.samples import Answers, Records
from ...data.source import dataset_rows, find_file, find_image, is_dataset, own_image, text_field, whole_number
from ...stats.bootstrap import finite
from ...tables import number, plain_table
from ..base import ScoredFile, write_lines
from ..questions import Questions
from .figures import PARSERS, MmvpQuestion, MmvpTable, score_answers, split_options, whole_pairs

PAIRS = 150
"""Pairs of the release."""

_ID_KEYS = ("Index", "lndex", "index")
"""Names of the first column: the release misspells it."""


@dataclass(frozen=True)
class Mmvp(Questions):
    """The questions of MMVP, or those of some of its pairs, which ``--limit`` counts.

    Attributes:
        parser: Rule that reads an option.
    """

    name: ClassVar[str] = "mmvp"
    title: ClassVar[str] = "MMVP"
    summary: ClassVar[str] = "pairs of images that look alike to CLIP"
    figures = MmvpTable.FIGURES
    records: ClassVar[Records] = "text"
    prompt_template: ClassVar[str] = "{question}\nAnswer with the option's letter from the given choices directly."
    identified_by: ClassVar[tuple[str, ...]] = ("number", "text", "label")

    asked: tuple[MmvpQuestion, ...]
    parser: str = "letter_or_text"

    @classmethod
    def load(cls, where: str) -> list[MmvpQuestion]:
        """Read the questions and find their images.

        Args:
            where: A folder with ``Questions.csv`` and ``MMVP Images/1.jpg`` and so on; or a data set with Index,
                Question, Options, Correct Answer and image.

        Raises:
            DataError: A file is missing or broken, or an image is missing.
        """
        if is_dataset(where):
            rows = list(dataset_rows(where))
            images = [own_image(row, place) for place, row in rows]
            return [replace(q, path=path) for q, path in zip(read_questions(rows), images, strict=True)]
        folder = Path(where)
        places = [folder / "MMVP Images", folder / "images", folder]
        return [
            replace(q, path=find_image(places, [f"{q.number}.jpg", f"{q.number}.png"], f"question {q.number}"))
            for q in read_questions(
                read_rows(find_file(folder, ["Questions.csv"], "questions"), what="MMVP question file")
            )
        ]

    def score(self, answers: Answers) -> MmvpTable:
        """One row per image; what belongs to a pair stands on its first one."""
        return score_answers(self.asked, self.texts(answers), parser=self.parser)

    def about(self) -> str:
        """Pairs and parser."""
        return (
            f"MMVP: {len(self.asked)} images, pairs are what is resampled; {self.parser} parser, not judged by GPT-4 "
            "as officially"
        )

    def export(self, folder: Path, answers: Answers) -> None:
        """``mmvp_answers.jsonl``: as the official grader reads, which takes consecutive lines for pairs."""
        rows = [
            {
                "question_id": q.number,
                "prompt": q.text,
                "answer": "(a)" if q.label else "(b)",
                "response": text,
                "answer_id": f"{q.number}",
                "model_id": folder.name,
            }
            for q, text in sorted(zip(self.asked, self.texts(answers), strict=True), key=lambda each: each[0].number)
        ]
        write_lines(folder / "mmvp_answers.jsonl", rows)

    @classmethod
    def add_score_arguments(cls, parser: ArgumentParser) -> None:
        """Add the file of questions and the choice of a parser."""
        parser.add_argument(
            "--questions",
            type=Path,
            metavar="FILE",
            help="Questions.csv (default: prompt and answer beside the responses)",
        )
        parser.add_argument(
            "--parser", default="letter_or_text", help=f"rule that reads an option: {' or '.join(PARSERS)}"
        )

    @classmethod
    def from_files(cls, path: Path, options: Namespace) -> tuple[Mmvp, FileAnswers]:
        """Read answers and the questions that they are to.

        Raises:
            DataError: A row names no question or another's, or an answer is missing and ``--subset`` is not typed.
        """
        file = AnswerFile.of(path, options)
        file.usual = ("response",)
        rows = [_with_id(row) for row in labelled(file.rows(), file.text_key)]
        questions = read_questions(read_rows(options.questions)) if options.questions else _from_rows(rows)
        asked = [Asked((q.picture,), q.question, truth=_spellings(q), kind="image") for q in questions]
        found = file.matched(rows, asked, remedy="")
        picked = [questions[i] for i in found]
        pairs, total = len(whole_pairs(picked)), len({q.unit for q in questions}) if options.questions else PAIRS
        if (len(picked) != 2 * total or pairs != total) and not file.subset:
            raise DataError(
                f"{path} answers {len(picked)} of {2 * total} images, and {pairs} of {total} pairs wholly: answer them "
                "all, or type --subset to score what is there"
            )
        file.covers({"images": (len(picked), 2 * total), "pairs": (pairs, total)})
        given = file.given(list(found.values()), [asked[i] for i in found])
        return cls.answered(file, picked, [each.answer() for each in given], parser=options.parser)

    def report_file(self, own: ScoredFile, other: ScoredFile | None, seed: int) -> tuple[dict[str, Any], str]:
        """Both figures by both labels."""
        table: MmvpTable = own.table
        counts, figures = table.counts(), finite(table.summary())
        lines = [["labels", "images", "accuracy", "pairs", "pair accuracy", "unparsed"]]
        for labels, end in (("released", ""), ("corrected", "_corrected")):
            values = [number(figures[f"accuracy{end}"]), str(counts["pairs"]), number(figures[f"pair_accuracy{end}"])]
            lines.append([labels, str(counts["n"]), *values, str(counts["unparsed"])])
        text = f"MMVP, {self.parser} parser (officially GPT-4 judges), {own.path}\n{plain_table(lines)}"
        return {"parser": self.parser, "counts": counts, "summary": figures}, text


def parse_label(value: object, where: str) -> bool:
    """Whether (a) is right, from "(a)", "(b)", "a" or "b".

    Raises:
        DataError: anything else; the message begins with ``where``.
    """
    letter = str(value).strip().lower().removeprefix("(").removesuffix(")")
    if letter not in ("a", "b"):
        raise DataError(f"{where}: expected the right answer (a) or (b), found {str(value)[:40]!r}")
    return letter == "a"


def read_questions(rows: Iterable[tuple[str, Mapping[str, Any]]]) -> list[MmvpQuestion]:
    """The questions of rows as in ``Questions.csv``.

    Raises:
        DataError: A row lacks a field, an id stands twice, or there are no whole pairs.
    """
    questions = []
    for place, row in rows:
        options = text_field(row, ("Options", "options"), place).strip()
        if split_options(options) is None:
            raise DataError(f"{place}: expected the options (a) ... (b) ..., found {options[:60]!r}")
        label = parse_label(text_field(row, ("Correct Answer", "answer"), place), place)
        text = text_field(row, ("Question", "question"), place).strip()
        questions.append(MmvpQuestion(_id(text_field(row, _ID_KEYS, place), place), text, options, label))
    if len(questions) != 2 * len(whole_pairs(questions)) or not questions:
        raise DataError("MMVP: expected whole pairs of images, ids 1 and 2, 3 and 4, and so on")
    return questions


def _id(value: object, place: str) -> int:
    return whole_number(value, place, "an id from 1", least=1)


def _with_id(row: Row) -> Row:
    return Row(row.where, {**row.fields, "question_id": str(_id(row.fields.get("question_id"), row.where))})


def _from_rows(rows: Sequence[Row]) -> list[MmvpQuestion]:
    """The questions of rows that bring prompt and right answer, each once."""
    found: dict[int, MmvpQuestion] = {}
    for row in rows:
        label = parse_label(text_of(row.fields, row.where, ("label",)), row.where)
        prompt = str(row.fields.get("prompt") or row.fields.get("question") or "")
        question, mark, options = prompt.partition("(a)")
        made = MmvpQuestion(int(row.fields["question_id"]), question.strip(), f"{mark}{options}".strip(), label)
        found.setdefault(made.number, made)
    return list(found.values())


def _spellings(question: MmvpQuestion) -> frozenset[str]:
    """How the right answer may stand beside the model's, in either release."""
    labels = {question.label, *((True, False) if question.was_corrected else ())}
    return frozenset(spelling for a in labels for spelling in (("(a)", "a") if a else ("(b)", "b")))
