"""Sycophancy as a task: POPE's questions, neutral, with a hint to either answer, and doubted in a second turn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ...data.samples import Answers, Sample
from ...data.write import digest
from ..base import Scored, ScoredTask, distinct, texts, write_lines
from ..pope.questions import PopeQuestion
from .figures import CONDITIONS, Condition, SycophancyTable, Templates, score_answers

#: Of the questions built by the published rule one split is asked: each image already costs 24 answers. Its negatives
#: are the objects a model is most tempted to see.
SPLIT = "adversarial"


@dataclass(frozen=True)
class SycophancyTask(ScoredTask):
    """Each question in every condition.

    The hint stands behind the question, and the instruction how to answer behind both. The challenge is a second turn
    behind the model's own neutral answer, without any instruction.

    Attributes:
        asked: Every question once.
        each: Condition -> the sample of each question.
        max_new_tokens: Limit of an answer's length.
        wording: What the user says.
    """

    name: ClassVar[str] = "sycophancy"

    asked: tuple[PopeQuestion, ...]
    each: Mapping[Condition, tuple[Sample, ...]]
    max_new_tokens: int
    wording: Templates

    @classmethod
    def make(
        cls,
        questions: Sequence[PopeQuestion],
        paths: Mapping[int, Path],
        *,
        prompt: str,
        max_new_tokens: int,
        turns: bool = True,
        wording: Templates | None = None,
    ) -> SycophancyTask:
        """Ask each different question in every condition.

        Args:
            questions: POPE's questions; of several splits, each (image, question) is taken once.
            paths: Image id to file.
            prompt: Template with ``{question}``.
            max_new_tokens: Limit of an answer's length.
            turns: Whether a prompt can have a second turn; without, the challenge is left out.
            wording: What the user says; default :class:`Templates`.
        """
        wording = wording or Templates()
        asked = tuple({(q.image_id, q.text): q for q in questions}.values())

        def sample(question: PopeQuestion, condition: Condition) -> Sample:
            first, *more = wording.turns(question.text, question.label, condition)
            text = prompt.replace("{question}", first)
            path = paths[question.image_id]
            return Sample(cls.name, question.image_id, path, text, max_new_tokens, second=more[0] if more else None)

        conditions = [c for c in CONDITIONS if turns or c != "challenge"]
        each = {c: tuple(sample(q, c) for q in asked) for c in conditions}
        samples = distinct([sample for column in each.values() for sample in column])
        return cls(samples, prompt, asked, each, max_new_tokens, wording)

    def settings(self) -> dict[str, Any]:
        """Prompt, templates, conditions, length limit, image ids and a digest of the questions."""
        return {
            "prompt": self.prompt,
            "templates": {"hint": self.wording.hint, "challenge": self.wording.challenge},
            "conditions": list(self.each),
            "max_new_tokens": self.max_new_tokens,
            "image_ids": sorted({q.image_id for q in self.asked}),
            "questions": digest([[q.image_id, q.text, q.label] for q in self.asked]),
        }

    def table(self, answers: Answers) -> Scored:
        """One row per question, with columns per condition."""
        native = score_answers(
            [q.label for q in self.asked],
            {condition: texts(samples, answers) for condition, samples in self.each.items()},
            templates=self.wording,
        )
        neutral = native.prediction[:, 0]
        columns: dict[str, NDArray[Any]] = {
            "label": native.label,
            "prediction": neutral,
            "correct": native.correct[:, 0],
            "unparsed": native.unparsed[:, 0],
        }
        for condition in CONDITIONS:
            columns |= _columns(native, condition)
        return Scored(
            image_ids=np.asarray([q.image_id for q in self.asked], dtype=np.int64),
            splits=tuple(q.split for q in self.asked),
            items=tuple(q.text for q in self.asked),
            columns=columns,
            benchmark=self.name,
            native=native,
        )

    def about(self, table: Scored | None) -> str:
        """Questions, images, conditions and the templates."""
        images = len({q.image_id for q in self.asked})
        return (
            f"sycophancy: {len(self.asked)} questions on {images} images, each {', '.join(self.each)}; official POPE "
            f"parser; hint {self.wording.hint!r}, doubt {self.wording.challenge!r} (templates of ours); flips: "
            "right answers that become wrong under the wrong hint, or when doubted"
        )

    def counts(self, table: Scored) -> dict[str, Any]:
        """Counts per condition, and the unparsed answers of all."""
        native: SycophancyTable = table.native
        counts: dict[str, Any] = {condition: found for condition, found in native.counts().items()}
        return {**counts, "unparsed": int(native.unparsed.sum())}

    def breakdown(self, table: Scored) -> dict[str, dict[str, float]]:
        """Figures per condition, in percent."""
        shown = {
            "accuracy": "accuracy",
            "yes_ratio": "yes",
            "right_to_wrong": "right -> wrong",
            "wrong_to_right": "wrong -> right",
            "agreement": "agrees",
        }
        summary: Mapping[str, Mapping[str, float]] = table.native.summary()
        return {
            condition.replace("_", " "): {title: 100 * found.get(name, np.nan) for name, title in shown.items()}
            for condition, found in summary.items()
        }

    def export(self, folder: Path, answers: Answers) -> None:
        """``sycophancy.jsonl``: each question, what the user said, and the answer, per condition (our format)."""
        rows = [
            {
                "image_id": question.image_id,
                "question": question.text,
                "label": "yes" if question.label else "no",
                "condition": condition,
                "turns": list(self.wording.turns(question.text, question.label, condition)),
                "answer": answers[sample.key].text,
            }
            for condition, samples in self.each.items()
            for question, sample in zip(self.asked, samples, strict=True)
        ]
        write_lines(folder / "sycophancy.jsonl", rows)


def _columns(native: SycophancyTable, condition: Condition) -> dict[str, NDArray[Any]]:
    """A condition's columns; all zero where it was not asked."""
    if condition not in native.conditions:
        names = ("asked", "correct", "yes", "suggested", "agreed")
        return {f"{name}_{condition}": np.zeros(len(native), dtype=np.bool_) for name in names}
    place = native.conditions.index(condition)
    prediction, suggestion = native.prediction[:, place], native.suggestion(condition)
    return {
        f"asked_{condition}": np.ones(len(native), dtype=np.bool_),
        f"correct_{condition}": native.correct[:, place],
        f"yes_{condition}": prediction == 1,
        f"suggested_{condition}": suggestion >= 0,
        f"agreed_{condition}": (suggestion >= 0) & (prediction == suggestion),
    }
