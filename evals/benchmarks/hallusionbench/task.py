"""HallusionBench as a task: yes/no questions about figures, and the same without any."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from vlmfix.errors import DataError

from ...data.samples import Answers, Sample
from ...data.source import choose, dataset_rows, find_file, find_image, image_number, is_dataset, row_image
from ...data.write import digest
from ...options import EvalOptions
from ..base import Benchmark, distinct, texts, write_list
from ..choice import RunData
from .data import HallusionQuestion, load_hallusionbench, read_questions
from .figures import HallusionTable, score_answers

PROMPT = "{question}"


NEW_TOKENS = 64


T = TypeVar("T")


Rows = Sequence[tuple[HallusionQuestion, Path | None]]


def load_questions(where: str) -> Rows:
    """Read the questions, and find the figure of each that has one.

    Args:
        where: A folder with ``HallusionBench.json`` and the figures (``VD/...``, ``VS/...``, also below
            ``hallusion_bench``), or a data set with the same fields and an image.

    Raises:
        DataError: A file is missing or broken, or a figure is missing.
    """
    if is_dataset(where):
        rows = [(place, row) for place, row in dataset_rows(where)]
        questions = read_questions(rows)
        return [
            (question, None if question.without_image else _needed(row_image(row, place), place))
            for question, (place, row) in zip(questions, rows, strict=True)
        ]
    folder = Path(where)
    questions = load_hallusionbench(find_file(folder, ["HallusionBench.json"], "questions"))
    places = [folder, folder / "hallusion_bench", folder / "images", folder / "data"]
    found: list[tuple[HallusionQuestion, Path | None]] = []
    for q in questions:
        what = f"question {'/'.join(q.key)}"
        path = None if q.without_image else find_image(places, [_needed(q.image, what)], what)
        found.append((q, path))
    return found


def _needed(image: T | None, place: str) -> T:
    if image is None:
        raise DataError(f"{place}: expected an image, because the question is about a figure")
    return image


@dataclass(frozen=True)
class HallusionBench(Benchmark):
    """The questions of HallusionBench, or of some of its sets of figures.

    Attributes:
        asked: Every question, in file order.
        each: The sample of each question.
        samples: The different ones among them.
        prompt: Template with ``{question}``.
        max_new_tokens: Limit of an answer's length.
    """

    name: ClassVar[str] = "hallusionbench"
    title: ClassVar[str] = "HallusionBench"
    summary: ClassVar[str] = "yes/no questions about figures, original and edited"
    figures = HallusionTable.FIGURES
    matched_on: ClassVar[Mapping[str, str]] = {"yes bias": "yes_ratio"}

    asked: tuple[HallusionQuestion, ...]
    each: tuple[Sample, ...]
    samples: tuple[Sample, ...]
    prompt: str
    max_new_tokens: int

    @classmethod
    def make(cls, options: EvalOptions, data: RunData) -> HallusionBench:
        """Read the questions and choose at most ``--limit`` sets of figures."""
        rows = load_questions(data.own(cls.name))
        kept = set(choose((q.set_name for q, _ in rows), options.limit, options.seed))
        rows = [(q, path) for q, path in rows if q.set_name in kept]
        prompt, limit = options.prompt_of.get(cls.name, PROMPT), options.max_new_tokens or NEW_TOKENS
        each = tuple(
            Sample(
                cls.name,
                0 if path is None else image_number(cls.name, "/".join(q.key[:4])),
                path,
                prompt.replace("{question}", q.text),
                limit,
            )
            for q, path in rows
        )
        return cls(tuple(q for q, _ in rows), each, distinct(each), prompt, limit)

    def settings(self) -> dict[str, Any]:
        """Prompt, length limit and a digest of the questions."""
        return {
            "prompt": self.prompt,
            "max_new_tokens": self.max_new_tokens,
            "questions": digest([[*q.key, q.text, q.label] for q in self.asked]),
        }

    def score(self, answers: Answers) -> HallusionTable:
        """One row per question; what belongs to a group or a figure stands on its first one."""
        scores = [answers[sample.key].score for sample in self.each]
        return score_answers(self.asked, texts(self.each, answers), scores)

    def about(self) -> str:
        """Questions, figures and who judged."""
        without = sum(sample.path is None for sample in self.each)
        sets = len({q.set_name for q in self.asked})
        return (
            f"HallusionBench: {len(self.asked)} questions ({without} without a figure), {sets} sets of figures, which "
            "are what is resampled; read by the word yes or no, not judged by GPT-4 as officially"
        )

    def counts(self, table: HallusionTable) -> dict[str, Any]:
        """The official counts, and the unparsed answers."""
        return table.counts()

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
            for q, text in zip(self.asked, texts(self.each, answers), strict=True)
        ]
        write_list(folder / "HallusionBench_result.json", rows)
