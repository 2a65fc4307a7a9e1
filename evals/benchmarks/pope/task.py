"""POPE: yes/no questions about objects (Li et al. 2023, arXiv:2305.10355)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from ...data.samples import Answer, Answers, Sample
from ...data.write import digest
from ...options import EvalOptions
from ...stats.intervals import finite
from ..base import Benchmark, safe_name, write_lines
from ..choice import RunData, answer_limit
from ..object_choice import PROMPT, choose_questions
from ..object_questions import SPLITS, PopeQuestion
from ..yes_no import Parser, YesNoTable, score_labels


@dataclass(frozen=True)
class Pope(Benchmark):
    """Questions to answer.

    Attributes:
        asked: Every question of every split, in file order.
        samples: Each different (image, question) once: the splits share their positive questions.
        prompt: Template with ``{question}``.
        max_new_tokens: Limit of the answer's length.
        parser: Rule that reads yes or no.
    """

    name: ClassVar[str] = "pope"
    title: ClassVar[str] = "POPE"
    summary: ClassVar[str] = "yes/no questions whether an object is in the image"
    figures = YesNoTable.FIGURES
    matched_on: ClassVar[Mapping[str, str]] = {"yes bias": "yes_ratio"}
    row_by_row: ClassVar[bool] = True

    asked: tuple[PopeQuestion, ...]
    samples: tuple[Sample, ...]
    prompt: str
    max_new_tokens: int
    parser: Parser = "official"

    @classmethod
    def make(cls, options: EvalOptions, data: RunData) -> Pope:
        """Ask each different question once."""
        asked, paths = choose_questions(options, data, SPLITS, testbed_images=200)
        prompt, limit = options.pope_prompt or PROMPT, answer_limit(options)
        samples = tuple(
            Sample(cls.name, image_id, paths[image_id], prompt.replace("{question}", text), limit)
            for image_id, text in dict.fromkeys((q.image_id, q.text) for q in asked)
        )
        return cls(tuple(asked), samples, prompt, limit)

    @property
    def splits(self) -> list[str]:
        """The splits, in the order of the questions."""
        return list(dict.fromkeys(question.split for question in self.asked))

    def prompt_text(self, question: PopeQuestion) -> str:
        """What the model is asked of a question."""
        return self.prompt.replace("{question}", question.text)

    def settings(self) -> dict[str, Any]:
        """Prompt, length limit, image ids and a digest of the questions."""
        return {
            "prompt": self.prompt,
            "max_new_tokens": self.max_new_tokens,
            "image_ids": sorted({q.image_id for q in self.asked}),
            "questions": digest([[q.split, q.image_id, q.text, q.label] for q in self.asked]),
        }

    def _answer(self, question: PopeQuestion, answers: Answers) -> Answer:
        return answers[self.name, question.image_id, self.prompt_text(question)]

    def score(self, answers: Answers) -> YesNoTable:
        """Read yes or no from every answer, in the order of the questions."""
        given = [self._answer(question, answers) for question in self.asked]
        return score_labels(
            [q.label for q in self.asked],
            [answer.text for answer in given],
            image_ids=[q.image_id for q in self.asked],
            splits=[q.split for q in self.asked],
            items=[q.text for q in self.asked],
            parser=self.parser,
            scores=[answer.score for answer in given],
        )

    def about(self) -> str:
        """Parser, questions and images."""
        splits = [question.split for question in self.asked]
        sizes = ", ".join(f"{split} {splits.count(split)}" for split in self.splits)
        images = len({q.image_id for q in self.asked})
        return f"POPE {self.parser} parser, {len(self.asked)} questions ({sizes}) on {images} images"

    def counts(self, table: YesNoTable) -> dict[str, int]:
        """The confusion matrix of all questions, and unparsed answers."""
        return table.counts()

    def details(
        self, label: str, tables: Mapping[str, Any], answers: Mapping[str, Answers], seed: int
    ) -> dict[str, Any]:
        """Counts and summary of each split and of all."""
        table: YesNoTable = tables[label]
        found: dict[str, Any] = {"parser": table.parser, "splits": self.splits, "all": _figures(table)}
        for split in self.splits:
            found[split] = _figures(table.take([row for row, each in enumerate(table.splits) if each == split]))
        f1 = [found[split]["summary"]["f1"] for split in self.splits]
        # The figure LLaVA prints; the table's F1 pools all questions.
        return {**found, "mean_f1_of_splits": sum(f1) / len(f1)}

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


def _figures(table: YesNoTable) -> dict[str, Any]:
    return {"counts": table.counts(), "summary": finite(table.summary())}
