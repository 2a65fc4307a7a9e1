"""HallusionBench as a task: yes/no questions about figures, and the same without any."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
from numpy.typing import NDArray

from vlmfix.errors import DataError

from ...data.samples import Answers, Sample
from ...data.source import choose, dataset_rows, find_file, find_image, image_number, is_dataset, row_image
from ...data.write import digest
from ..base import Scored, ScoredTask, all_of, distinct, first_of, texts, write_list, yes_no
from ..yes_no import parse_answer
from .data import HallusionQuestion, load_hallusionbench, read_questions
from .figures import UNCLEAR, HallusionTable, score_answers

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
class HallusionTask(ScoredTask):
    """The questions of HallusionBench, or of some of its sets of figures.

    A set holds every variant of its questions, so that it is what is chosen and resampled.

    Attributes:
        asked: Every question, in file order.
        each: The sample of each question.
        max_new_tokens: Limit of an answer's length.
    """

    name: ClassVar[str] = "hallusionbench"

    asked: tuple[HallusionQuestion, ...]
    each: tuple[Sample, ...]
    max_new_tokens: int

    @classmethod
    def make(
        cls, where: str, *, limit: int | None, seed: int, prompt: str | None, max_new_tokens: int
    ) -> HallusionTask:
        """Read the questions and choose at most ``limit`` sets of figures."""
        rows = load_questions(where)
        kept = set(choose((_set(q) for q, _ in rows), limit, seed))
        rows = [(q, path) for q, path in rows if _set(q) in kept]
        prompt = prompt or PROMPT
        each = tuple(
            Sample(
                cls.name,
                0 if path is None else image_number(cls.name, "/".join(q.key[:4])),
                path,
                prompt.replace("{question}", q.text),
                max_new_tokens,
            )
            for q, path in rows
        )
        return cls(distinct(each), prompt, tuple(q for q, _ in rows), each, max_new_tokens)

    def settings(self) -> dict[str, Any]:
        """Prompt, length limit and a digest of the questions."""
        return {
            "prompt": self.prompt,
            "max_new_tokens": self.max_new_tokens,
            "questions": digest([[*q.key, q.text, q.label] for q in self.asked]),
        }

    def table(self, answers: Answers) -> Scored:
        """One row per question; what belongs to a group or a figure stands on its first one."""
        given = texts(self.each, answers)
        native = score_answers(self.asked, given)
        read = [parse_answer(text, "vlmeval") for text in given]
        correct = native.correct
        groups = [q.group for q in self.asked]
        columns: dict[str, NDArray[Any]] = {
            **yes_no([q.label for q in self.asked], read, [answers[sample.key].score for sample in self.each]),
            "correct": correct,
            "unparsed": np.asarray(native.code == UNCLEAR),
            **_grouped(("groups", "group_right"), groups, correct, np.ones(len(groups), dtype=np.bool_)),
            **_grouped(
                ("figures", "figure_right"),
                [q.figure for q in self.asked],
                correct,
                np.asarray([q.figure is not None for q in self.asked], dtype=np.bool_),
            ),
        }
        for name, hard in (("easy", False), ("hard", True)):
            rows = np.asarray([(q.visual_input == 2) == hard for q in self.asked], dtype=np.bool_)
            columns |= _grouped((name, f"{name}_right"), groups, correct, rows)
        return Scored(
            image_ids=np.asarray([image_number(self.name, _set(q)) for q in self.asked], dtype=np.int64),
            splits=tuple(q.category for q in self.asked),
            items=tuple("/".join(q.key) for q in self.asked),
            columns=columns,
            benchmark=self.name,
            native=native,
        )

    def about(self, table: Scored | None) -> str:
        """Questions, figures and who judged."""
        without = sum(sample.path is None for sample in self.each)
        sets = len({_set(q) for q in self.asked})
        return (
            f"HallusionBench: {len(self.asked)} questions ({without} without a figure), {sets} sets of figures, which "
            "are what is resampled; read by the word yes or no, not judged by GPT-4 as officially"
        )

    def counts(self, table: Scored) -> dict[str, Any]:
        """The official counts, and the unparsed answers."""
        native: HallusionTable = table.native
        return native.counts()

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


def _set(question: HallusionQuestion) -> str:
    return "/".join(question.key[:3])


def _grouped(
    names: tuple[str, str], keys: Sequence[Hashable], correct: NDArray[np.bool_], rows: NDArray[np.bool_]
) -> dict[str, NDArray[np.bool_]]:
    """Two columns: the first row of each key among some rows, and whether all its rows among these are correct."""
    index = np.flatnonzero(rows)
    inside = [keys[i] for i in index.tolist()]
    first, right = np.zeros(len(keys), dtype=np.bool_), np.zeros(len(keys), dtype=np.bool_)
    first[index] = first_of(inside)
    right[index] = first_of(inside) & all_of(inside, correct[index])
    return {names[0]: first, names[1]: right}
