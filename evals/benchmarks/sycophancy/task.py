"""Sycophancy as a task: POPE's questions, neutral, with a hint to either answer, and doubted in a second turn."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from ...data.samples import Answers, Sample
from ...data.write import digest
from ...options import EvalOptions
from ..base import Benchmark, distinct, texts, write_lines
from ..choice import RunData, answer_limit
from ..object_choice import PROMPT, choose_questions
from ..object_questions import PopeQuestion, PopeSplit
from .figures import CONDITIONS, Condition, SycophancyTable, Templates, score_answers

#: Of the questions built by the published rule one split is asked: each image already costs 24 answers. Its negatives
#: are the objects a model is most tempted to see.
SPLIT: PopeSplit = "adversarial"


@dataclass(frozen=True)
class Sycophancy(Benchmark):
    """Each question in every condition.

    The hint stands behind the question, and the instruction how to answer behind both. The challenge is a second turn
    behind the model's own neutral answer, without any instruction.

    Attributes:
        asked: Every question once.
        each: Condition -> the sample of each question.
        samples: All different ones.
        prompt: Template with ``{question}``.
        max_new_tokens: Limit of an answer's length.
        wording: What the user says.
    """

    name: ClassVar[str] = "sycophancy"
    title: ClassVar[str] = "Sycophancy"
    summary: ClassVar[str] = "POPE's questions with hints, and doubted in a second turn"
    figures = SycophancyTable.FIGURES

    asked: tuple[PopeQuestion, ...]
    each: Mapping[Condition, tuple[Sample, ...]]
    samples: tuple[Sample, ...]
    prompt: str
    max_new_tokens: int
    wording: Templates

    @classmethod
    def make(cls, options: EvalOptions, data: RunData) -> Sycophancy:
        """Ask each of POPE's questions in every condition; the challenge needs a prompt that can have a second turn."""
        questions, paths = choose_questions(options, data, (SPLIT,), testbed_images=100)
        if options.model is None:
            data.notes.append(
                "the testbed never learned what a hint or a second turn means (it answers alike whichever answer is "
                "suggested): its sycophancy shows the mechanics, not a result"
            )
        if not options.chat_template:
            data.notes.append("sycophancy leaves the challenge out: a second turn needs the chat template")
        return cls.of(
            questions,
            paths,
            prompt=options.prompt_of.get(cls.name) or options.pope_prompt or PROMPT,
            max_new_tokens=answer_limit(options),
            turns=options.chat_template,
        )

    @classmethod
    def of(
        cls,
        questions: Sequence[PopeQuestion],
        paths: Mapping[int, Path],
        *,
        prompt: str,
        max_new_tokens: int,
        turns: bool = True,
        wording: Templates | None = None,
    ) -> Sycophancy:
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
        return cls(asked, each, samples, prompt, max_new_tokens, wording)

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

    def score(self, answers: Answers) -> SycophancyTable:
        """One row per question, with its answers in every condition."""
        return score_answers(
            [q.label for q in self.asked],
            {condition: texts(samples, answers) for condition, samples in self.each.items()},
            image_ids=[q.image_id for q in self.asked],
            splits=[q.split for q in self.asked],
            items=[q.text for q in self.asked],
            templates=self.wording,
        )

    def about(self) -> str:
        """Questions, images, conditions and the templates."""
        images = len({q.image_id for q in self.asked})
        return (
            f"sycophancy: {len(self.asked)} questions on {images} images, each {', '.join(self.each)}; official POPE "
            f"parser; hint {self.wording.hint!r}, doubt {self.wording.challenge!r} (templates of ours); flips: "
            "right answers that become wrong under the wrong hint, or when doubted"
        )

    def counts(self, table: SycophancyTable) -> dict[str, Any]:
        """Counts per condition, and the unparsed answers of all."""
        counts = table.counts()
        return {**counts, "unparsed": sum(part["unparsed"] for part in counts.values())}

    def breakdown(self, table: SycophancyTable) -> dict[str, dict[str, float]]:
        """Figures per condition, in percent."""
        shown = {
            "accuracy": "accuracy",
            "yes_ratio": "yes",
            "right_to_wrong": "right -> wrong",
            "wrong_to_right": "wrong -> right",
            "agreement": "agrees",
        }
        return {
            condition.replace("_", " "): {title: 100 * found.get(name, math.nan) for name, title in shown.items()}
            for condition, found in table.by_condition().items()
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
