"""Benchmarks of single questions: which are chosen, how they are asked, and which answers of a file belong to them."""

from __future__ import annotations

from abc import abstractmethod
from argparse import ArgumentParser
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

from ..data.answers import AnswerFile, FileAnswers
from ..data.samples import Answer, Answers, Records, Sample
from ..data.source import choose, image_number
from ..data.write import digest
from ..options import EvalOptions
from .base import Benchmark, distinct, texts
from .choice import RunData, answer_limit

Self = TypeVar("Self", bound="Questions")


class Question(Protocol):
    """What a benchmark of questions says of each."""

    @property
    def text(self) -> str:
        """The question, without any instruction how to answer."""

    @property
    def path(self) -> Path | None:
        """The image's file; None without an image, and where only answers are scored."""

    @property
    def unit(self) -> str:
        """What is chosen with all its questions, mostly the image."""

    @property
    def picture(self) -> str:
        """Name of the image within the benchmark."""


@dataclass(frozen=True)
class Questions(Benchmark):
    """The questions of a benchmark, or those of some of its images; each has one answer.

    A benchmark declares how its questions are read (:meth:`load`) and how answers are scored.

    Attributes:
        prompt_template: What is asked if the user does not say, with ``{question}``.
        new_tokens: The most new tokens of an answer if the user does not say; None for those of a yes/no answer.
        records: What is noted beside an answer.
        identified_by: The attributes of a question that tell it from others in ``config.json``.
        limit_per: Attribute of a question; ``--limit`` counts the units of each of its values. Empty: it counts all.
        asked: Every question, in file order.
        each: The sample of each.
        prompt: Template with ``{question}``.
        max_new_tokens: Limit of an answer's length.
    """

    prompt_template: ClassVar[str] = "{question}"
    new_tokens: ClassVar[int | None] = None
    records: ClassVar[Records] = "score"
    identified_by: ClassVar[tuple[str, ...]]
    limit_per: ClassVar[str] = ""

    asked: tuple[Any, ...]
    each: tuple[Sample, ...]
    prompt: str = "{question}"
    max_new_tokens: int = 0

    @classmethod
    @abstractmethod
    def load(cls, where: str) -> Sequence[Question]:
        """Read the questions and find their images.

        Args:
            where: A folder or file, or a data set of the ``datasets`` library.

        Raises:
            DataError: A file is missing or broken, or an image is missing.
        """

    @classmethod
    def make(cls: type[Self], options: EvalOptions, data: RunData) -> Self:
        """Read the questions and choose at most ``--limit`` units, with all that is asked about them."""
        questions = cls.load(data.own(cls.name))
        prompt = options.prompt_of.get(cls.name, cls.prompt_template)
        limit = answer_limit(options) if cls.new_tokens is None else options.max_new_tokens or cls.new_tokens
        asked = _chosen(questions, options, cls.limit_per)
        each = tuple(
            Sample(
                cls.name,
                0 if question.path is None else image_number(cls.name, question.picture),
                question.path,
                prompt.replace("{question}", question.text),
                limit,
                cls.records,
            )
            for question in asked
        )
        return cls(asked, each, prompt, limit)

    @classmethod
    def answered(
        cls: type[Self], file: AnswerFile, asked: Sequence[Question], answers: Iterable[Answer], **more: Any
    ) -> tuple[Self, FileAnswers]:
        """The questions that a file answers, and its answers.

        Args:
            file: The file.
            asked: The questions. Equal ones have answers of their own, which are for the table to refuse.
            answers: Their answers, in the same order.
            more: Further fields of the benchmark.
        """
        each = tuple(Sample(cls.name, number, None, question.text) for number, question in enumerate(asked))
        return cls(tuple(asked), each, **more), FileAnswers(file, each, answers)

    @cached_property
    def samples(self) -> tuple[Sample, ...]:  # type: ignore[override]
        """Each different sample once."""
        return distinct(self.each)

    def settings(self) -> dict[str, Any]:
        """Prompt, length limit and a digest of the questions."""
        return {
            "prompt": self.prompt,
            "max_new_tokens": self.max_new_tokens,
            "questions": digest([[getattr(question, name) for name in self.identified_by] for question in self.asked]),
        }

    def texts(self, answers: Answers) -> list[str]:
        """The answers' texts, in the order of the questions."""
        return texts(self.each, answers)

    def scores(self, answers: Answers) -> list[float | None]:
        """The answers' yes-minus-no logits, in the order of the questions."""
        return [answers[sample.key].score for sample in self.each]


def _chosen(questions: Sequence[Question], options: EvalOptions, limit_per: str) -> tuple[Question, ...]:
    """At most ``--limit`` units, of each value of an attribute if one is named, with all their questions."""
    units: dict[str, list[str]] = {}
    parts = [getattr(question, limit_per) if limit_per else "" for question in questions]
    for question, part in zip(questions, parts, strict=True):
        units.setdefault(part, []).append(question.unit)
    kept = {part: set(choose(of_part, options.limit, options.seed)) for part, of_part in units.items()}
    return tuple(question for question, part in zip(questions, parts, strict=True) if question.unit in kept[part])


def add_by_order(parser: ArgumentParser) -> None:
    """Add the flag without which order is never taken for identity."""
    parser.add_argument("--by-order", action="store_true", help="answers are in the order of the questions, ids or not")


def add_question_file(parser: ArgumentParser, name: str) -> None:
    """Add the file of questions that answers are matched to, and ``--by-order``."""
    parser.add_argument("--questions", type=Path, required=True, metavar="FILE", help=name)
    add_by_order(parser)
