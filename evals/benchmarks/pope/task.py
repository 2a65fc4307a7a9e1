"""POPE as a task: yes/no questions about objects."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from ...data.samples import Answer, Answers, Sample
from ...data.write import digest, write_text
from ...stats.intervals import finite
from ..base import Task, effort, safe_name
from ..yes_no import PopeTable, paired_answers, score_answers
from .questions import PopeQuestion


@dataclass(frozen=True)
class PopeTask(Task):
    """Questions to answer.

    Attributes:
        questions: Every question of every split, in file order.
        samples: Each different (image, question) once: the splits share their positive questions.
        prompt: Template with ``{question}``.
        max_new_tokens: Limit of the answer's length.
    """

    name: ClassVar[str] = "pope"

    questions: tuple[PopeQuestion, ...]
    samples: tuple[Sample, ...]
    prompt: str
    max_new_tokens: int

    def prompt_text(self, question: PopeQuestion) -> str:
        """The sample's question text of a POPE question."""
        return self.prompt.replace("{question}", question.text)

    @property
    def splits(self) -> list[str]:
        """The splits, in the order of the questions."""
        return list(dict.fromkeys(question.split for question in self.questions))

    def settings(self) -> dict[str, Any]:
        """Prompt, length limit, image ids and a digest of the questions."""
        asked = [[q.split, q.image_id, q.text, q.label] for q in self.questions]
        return {
            "prompt": self.prompt,
            "max_new_tokens": self.max_new_tokens,
            "image_ids": sorted({q.image_id for q in self.questions}),
            "questions": digest(asked),
        }

    def _answer(self, question: PopeQuestion, answers: Answers) -> Answer:
        return answers[self.name, question.image_id, self.prompt_text(question)]

    def table(self, answers: Answers) -> PopeTable:
        """Read yes or no from every answer, in the order of the questions."""
        given = [self._answer(question, answers) for question in self.questions]
        scores = [answer.score for answer in given if answer.score is not None]
        # One missing score (a method that overflows, a vocabulary without a yes token) leaves the table without any.
        return score_answers(
            self.questions, [answer.text for answer in given], scores=scores if len(scores) == len(given) else None
        )

    def part(self, label: str, tables: Mapping[str, Any], answers: Mapping[str, Answers], seed: int) -> dict[str, Any]:
        """Counts and summary of each split and of all, and the answers paired with the baseline's."""
        table, own, baseline = tables[label], answers[label], next(iter(tables))
        part: dict[str, Any] = {
            "parser": table.parser,
            "splits": self.splits,
            "asked": len(self.samples),
            **effort(self, own, answers[baseline]),
            "all": {"counts": table.counts(), "summary": finite(table.summary())},
        }
        f1 = []
        for split in self.splits:
            rows = table.take([row for row, question in enumerate(self.questions) if question.split == split])
            part[split] = {"counts": rows.counts(), "summary": finite(rows.summary())}
            f1.append(rows.summary()["f1"])
        part["mean_f1_of_splits"] = sum(f1) / len(f1)  # The figure LLaVA prints; the table's F1 pools all questions.
        if label != baseline:
            part["paired"] = paired_answers(table, tables[baseline], self._distinct(), seed)
        return part

    def _distinct(self) -> list[int]:
        """Rows of the first occurrence of every question: the splits share their positives, asked only once."""
        first: dict[tuple[int, str], int] = {}
        for row, question in enumerate(self.questions):
            first.setdefault((question.image_id, question.text), row)
        return list(first.values())

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
                for q in self.questions
                if q.split == split
            ]
            write_text(folder / f"pope_{safe_name(split)}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
