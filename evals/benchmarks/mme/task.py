"""MME's hallucination subset as a task: existence, count, position and color, two questions per image."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from vlmfix.errors import DataError
from vlmfix.files import read_text

from ...data.samples import Answers, Sample
from ...data.source import choose, dataset_rows, image_number, is_dataset, row_image, text_field
from ...data.write import digest, write_text
from ..base import Scored, ScoredTask, all_of, distinct, first_of, yes_no
from .data import TASKS, MmeAnswer, parse_label
from .figures import MmeTable, parse_answer, score_answers

PROMPT = "{question}"


NEW_TOKENS = 16


_IMAGE_SUFFIXES = (".jpg", ".png", ".jpeg")


@dataclass(frozen=True)
class MmeQuestion:
    """One question of MME.

    Attributes:
        task: ``"existence"``, ``"count"``, ``"position"`` or ``"color"``.
        image: Name of the image.
        path: Its file.
        text: The question; MME's ask themselves for yes or no.
        label: Whether yes is right.
    """

    task: str
    image: str
    path: Path
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
class MmeTask(ScoredTask):
    """The questions of MME's hallucination subset, or of some of its images.

    Attributes:
        asked: Every question.
        max_new_tokens: Limit of an answer's length.
    """

    name: ClassVar[str] = "mme"

    asked: tuple[MmeQuestion, ...]
    max_new_tokens: int

    @classmethod
    def make(cls, where: str, *, limit: int | None, seed: int, prompt: str | None, max_new_tokens: int) -> MmeTask:
        """Read the questions and choose images, at most ``limit`` per task."""
        questions = load_questions(where)
        kept = {
            (task, image)
            for task in TASKS
            for image in choose((q.image for q in questions if q.task == task), limit, seed)
        }
        asked = tuple(q for q in questions if (q.task, q.image) in kept)
        prompt = prompt or PROMPT
        samples = [_sample(q, prompt, max_new_tokens) for q in asked]
        return cls(distinct(samples), prompt, asked, max_new_tokens)

    def settings(self) -> dict[str, Any]:
        """Prompt, length limit and a digest of the questions."""
        return {
            "prompt": self.prompt,
            "max_new_tokens": self.max_new_tokens,
            "questions": digest([[q.task, q.image, q.text, q.label] for q in self.asked]),
        }

    def _texts(self, answers: Answers) -> list[str]:
        return [answers[_sample(q, self.prompt, self.max_new_tokens).key].text for q in self.asked]

    def table(self, answers: Answers) -> Scored:
        """One row per question; what belongs to an image stands on its first one."""
        given = [
            MmeAnswer(q.task, q.image, q.text, q.label, text)
            for q, text in zip(self.asked, self._texts(answers), strict=True)
        ]
        keys = [(q.task, q.image) for q in self.asked]
        scores = [answers[_sample(q, self.prompt, self.max_new_tokens).key].score for q in self.asked]
        columns = yes_no([q.label for q in self.asked], [parse_answer(a.answer) for a in given], scores)
        first = first_of(keys)
        return Scored(
            image_ids=np.asarray([_number(q) for q in self.asked], dtype=np.int64),
            splits=tuple(q.task for q in self.asked),
            items=tuple(q.text for q in self.asked),
            columns={**columns, "images": first, "both_correct": first & all_of(keys, columns["correct"])},
            benchmark=self.name,
            native=score_answers(given, images=None),
        )

    def about(self, table: Scored | None) -> str:
        """Questions, images per task and parser."""
        images = len({(q.task, q.image) for q in self.asked})
        tasks = ", ".join(dict.fromkeys(q.task for q in self.asked))
        return f"MME hallucination subset ({tasks}): {len(self.asked)} questions on {images} images, official parser"

    def counts(self, table: Scored) -> dict[str, Any]:
        """Counts per task, and unparsed answers of all."""
        tables: dict[str, MmeTable] = table.native
        return {task: t.counts() for task, t in tables.items()} | {"unparsed": int(table.unparsed.sum())}

    def breakdown(self, table: Scored) -> dict[str, dict[str, float]]:
        """Accuracy, accuracy+ and score (0 to 200) per task."""
        found = {}
        for task, native in table.native.items():
            summary = native.summary()
            shares = {name: 100 * summary[key] for name, key in (("accuracy", "accuracy"), ("yes", "yes_ratio"))}
            found[task] = {**shares, "accuracy+": 100 * summary["accuracy_plus"], "score/200": summary["score"]}
        return found

    def export(self, folder: Path, answers: Answers) -> None:
        """``mme/TASK.txt``: image, question, label and answer, tab-separated, as the official tool reads."""
        for task in dict.fromkeys(q.task for q in self.asked):
            lines = [
                "\t".join((q.image, q.text, "Yes" if q.label else "No", re.sub(r"\s+", " ", text).strip()))
                for q, text in zip(self.asked, self._texts(answers), strict=True)
                if q.task == task
            ]
            write_text(folder / "mme" / f"{task}.txt", "\n".join(lines) + "\n")


def _number(question: MmeQuestion) -> int:
    return image_number("mme", f"{question.task}/{question.image}")


def _sample(question: MmeQuestion, prompt: str, max_new_tokens: int) -> Sample:
    text = prompt.replace("{question}", question.text)
    return Sample("mme", _number(question), question.path, text, max_new_tokens)
