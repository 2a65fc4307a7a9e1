"""MME's hallucination subset as a task: existence, count, position and color, two questions per image."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from vlmfix.errors import DataError
from vlmfix.files import read_text

from ...data.samples import Answers, Sample
from ...data.source import choose, dataset_rows, image_number, is_dataset, row_image, text_field
from ...data.write import digest, write_text
from ...options import EvalOptions
from ..base import Benchmark, distinct, texts
from ..choice import RunData, answer_limit
from .data import TASKS, MmeAnswer, parse_label
from .figures import MmeParser, MmeTable, score_answers

PROMPT = "{question}"


_IMAGE_SUFFIXES = (".jpg", ".png", ".jpeg")


@dataclass(frozen=True)
class MmeQuestion:
    """One question of MME.

    Attributes:
        task: ``"existence"``, ``"count"``, ``"position"`` or ``"color"``.
        image: Name of the image.
        path: Its file; None where only answers are scored.
        text: The question; MME's ask themselves for yes or no.
        label: Whether yes is right.
    """

    task: str
    image: str
    path: Path | None
    text: str
    label: bool


def load_questions(where: str) -> list[MmeQuestion]:
    """Read the questions of the hallucination subset.

    Args:
        where: The benchmark's folder, with a folder per task of images and text files beside them (a line per question:
            question, tab, answer), also under ``images`` and ``questions_answers_YN``; or a data set with question_id,
            category, question, answer and image.

    Raises:
        DataError: There is no such task, a file is broken, or an image is missing.
    """
    found = list(_from_dataset(where) if is_dataset(where) else _from_folder(Path(where)))
    if not found:
        raise DataError(f"{where} has none of MME's tasks {', '.join(TASKS)}: give the benchmark's folder")
    return found


def _from_folder(folder: Path) -> Sequence[MmeQuestion]:
    found = []
    for task in TASKS:
        texts = folder / task / "questions_answers_YN"
        images = folder / task / "images"
        texts, images = (texts, images) if texts.is_dir() else (folder / task, folder / task)
        for file in sorted(texts.glob("*.txt")) if texts.is_dir() else ():
            path = next((p for s in _IMAGE_SUFFIXES if (p := images / f"{file.stem}{s}").is_file()), None)
            if path is None:
                raise DataError(f"{file} has no image {file.stem}{'|'.join(_IMAGE_SUFFIXES)} in {images}")
            found += _pair(file, task, path)
    return found


def _pair(file: Path, task: str, path: Path) -> list[MmeQuestion]:
    lines = read_text(file, what="MME question file", remedy="unpack the task again").splitlines()
    found = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            text, tab, label = line.rpartition("\t")
            where = f"{file} line {number}"
            if not tab:
                raise DataError(f"{where}: expected a question, a tab, and Yes or No, found {line[:60]!r}")
            found.append(MmeQuestion(task, path.name, path, text.strip(), parse_label(label, where)))
    return found


def _from_dataset(where: str) -> list[MmeQuestion]:
    found = []
    for place, row in dataset_rows(where):
        task = text_field(row, ("category", "task"), place)
        if task in TASKS:
            path = row_image(row, place)
            if path is None:
                raise DataError(f"{place}: expected an image")
            image = text_field(row, ("question_id", "image_id"), place).rpartition("/")[2]
            label = parse_label(text_field(row, ("answer", "label"), place), place)
            found.append(MmeQuestion(task, image, path, text_field(row, ("question",), place).strip(), label))
    return found


@dataclass(frozen=True)
class Mme(Benchmark):
    """The questions of MME's hallucination subset, or of some of its images.

    Attributes:
        asked: Every question.
        each: The sample of each question.
        samples: The different ones among them.
        prompt: Template with ``{question}``.
        max_new_tokens: Limit of an answer's length.
        parser: Rule that reads yes or no.
    """

    name: ClassVar[str] = "mme"
    title: ClassVar[str] = "MME"
    summary: ClassVar[str] = "MME's hallucination subset: existence, count, position and color"
    figures = MmeTable.FIGURES
    matched_on: ClassVar[Mapping[str, str]] = {"yes bias": "yes_ratio"}

    asked: tuple[MmeQuestion, ...]
    each: tuple[Sample, ...]
    samples: tuple[Sample, ...]
    prompt: str
    max_new_tokens: int
    parser: MmeParser = "official"

    @classmethod
    def make(cls, options: EvalOptions, data: RunData) -> Mme:
        """Read the questions and choose images, at most ``--limit`` per task."""
        questions = load_questions(data.own(cls.name))
        kept = {
            (task, image)
            for task in TASKS
            for image in choose((q.image for q in questions if q.task == task), options.limit, options.seed)
        }
        asked = tuple(q for q in questions if (q.task, q.image) in kept)
        prompt, limit = options.prompt_of.get(cls.name, PROMPT), answer_limit(options)
        each = tuple(
            Sample(
                cls.name,
                image_number(cls.name, f"{q.task}/{q.image}"),
                q.path,
                prompt.replace("{question}", q.text),
                limit,
            )
            for q in asked
        )
        return cls(asked, each, distinct(each), prompt, limit)

    def settings(self) -> dict[str, Any]:
        """Prompt, length limit and a digest of the questions."""
        return {
            "prompt": self.prompt,
            "max_new_tokens": self.max_new_tokens,
            "questions": digest([[q.task, q.image, q.text, q.label] for q in self.asked]),
        }

    def score(self, answers: Answers) -> MmeTable:
        """One row per question; what belongs to an image stands on its first one."""
        given = [
            MmeAnswer(q.task, q.image, q.text, q.label, text)
            for q, text in zip(self.asked, texts(self.each, answers), strict=True)
        ]
        scores = [answers[sample.key].score for sample in self.each]
        return score_answers(given, parser=self.parser, images=None, scores=scores)

    def about(self) -> str:
        """Questions, images per task and parser."""
        images = len({(q.task, q.image) for q in self.asked})
        tasks = ", ".join(dict.fromkeys(q.task for q in self.asked))
        return (
            f"MME hallucination subset ({tasks}): {len(self.asked)} questions on {images} images, {self.parser} parser"
        )

    def counts(self, table: MmeTable) -> dict[str, Any]:
        """Counts per task, and unparsed answers of all."""
        return {task: t.counts() for task, t in table.tasks().items()} | {"unparsed": int(table.unparsed.sum())}

    def breakdown(self, table: MmeTable) -> dict[str, dict[str, float]]:
        """Accuracy, accuracy+ and score (0 to 200) per task."""
        found = {}
        for task, part in table.tasks().items():
            summary = part.summary()
            shares = {"accuracy": "accuracy", "yes": "yes_ratio", "accuracy+": "accuracy_plus"}
            found[str(task)] = {title: 100 * summary[name] for title, name in shares.items()}
            found[str(task)]["score/200"] = summary["score"]
        return found

    def export(self, folder: Path, answers: Answers) -> None:
        """``mme/TASK.txt``: image, question, label and answer, tab-separated, as the official tool reads."""
        given = texts(self.each, answers)
        for task in dict.fromkeys(q.task for q in self.asked):
            lines = [
                "\t".join((q.image, q.text, "Yes" if q.label else "No", re.sub(r"\s+", " ", text).strip()))
                for q, text in zip(self.asked, given, strict=True)
                if q.task == task
            ]
            write_text(folder / "mme" / f"{task}.txt", "\n".join(lines) + "\n")
