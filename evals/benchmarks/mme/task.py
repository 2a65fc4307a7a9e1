"""MME's hallucination subset as a task: existence, count, position and color, two questions per image.

``vlmfix score mme`` takes the results folder of the official tool (``existence.txt``, ...), or rows with ``task`` (or
``category``), ``image`` (or ``question_id``), ``question``, ``label`` (yes or no) and the answer. MME may not be
redistributed, so no question of it is in this package: the answers bring questions and labels with them. Its other
tasks are left out.
"""

from __future__ import annotations

import re
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from vlmfix.errors import DataError
from vlmfix.files import read_text

from ...data.answers import AnswerFile, FileAnswers, yes_no
from ...data.matching import Asked
from ...data.records import text_of
from ...data.samples import Answer, Answers
from ...data.source import dataset_rows, is_dataset, own_image, text_field
from ...data.write import write_text
from ...tables import number, plain_table
from ..base import ScoredFile
from ..questions import Questions
from .figures import PARSERS, TASKS, MmeQuestion, MmeTable, parse_answer, score_answers

IMAGES_PER_TASK = 30

#: The other tasks of MME, which are not in the hallucination subset.
OTHER_TASKS = frozenset(
    "artwork celebrity code_reasoning commonsense_reasoning landmark numerical_calculation OCR posters scene "
    "text_translation".split()
)

_IMAGE_SUFFIXES = (".jpg", ".png", ".jpeg")

_COLUMNS = "image, question, label and answer"


@dataclass(frozen=True)
class Mme(Questions):
    """The questions of MME's hallucination subset.

    Attributes:
        parser: Rule that reads yes or no.
    """

    name: ClassVar[str] = "mme"
    title: ClassVar[str] = "MME"
    summary: ClassVar[str] = "MME's hallucination subset: existence, count, position and color"
    figures = MmeTable.FIGURES
    matched_on: ClassVar[Mapping[str, str]] = {"yes bias": "yes_ratio"}
    identified_by: ClassVar[tuple[str, ...]] = ("task", "image", "text", "label")
    limit_per: ClassVar[str] = "task"

    asked: tuple[MmeQuestion, ...]
    parser: str = "official"

    @classmethod
    def load(cls, where: str) -> list[MmeQuestion]:
        """Read the questions of the hallucination subset.

        Args:
            where: The benchmark's folder, with a folder per task of images and text files beside them (a line per
                question: question, tab, answer), also under ``images`` and ``questions_answers_YN``; or a data set
                with question_id, category, question, answer and image.

        Raises:
            DataError: There is no such task, a file is broken, or an image is missing.
        """
        found = list(_from_dataset(where) if is_dataset(where) else _from_folder(Path(where)))
        if not found:
            raise DataError(f"{where} has none of MME's tasks {', '.join(TASKS)}: give the benchmark's folder")
        return found

    def score(self, answers: Answers) -> MmeTable:
        """One row per question; what belongs to an image stands on its first one."""
        return score_answers(self.asked, self.texts(answers), parser=self.parser, scores=self.scores(answers))

    def about(self) -> str:
        """Questions, images per task and parser."""
        images = len({q.picture for q in self.asked})
        tasks = ", ".join(dict.fromkeys(q.task for q in self.asked))
        return (
            f"MME hallucination subset ({tasks}): {len(self.asked)} questions on {images} images, {self.parser} parser"
        )

    def counts(self, table: MmeTable) -> dict[str, Any]:
        """Counts per task, and unparsed answers of all."""
        return {task: t.counts() for task, t in table.tasks().items()} | {"unparsed": int(table.unparsed.sum())}

    def breakdown(self, table: MmeTable) -> dict[str, dict[str, float]]:
        """Accuracy, accuracy+ and score (0 to 200) per task."""
        shares = {"accuracy": "accuracy", "yes": "yes_ratio", "accuracy+": "accuracy_plus"}
        return {
            task: {**{title: 100 * found[name] for title, name in shares.items()}, "score/200": found["score"]}
            for task, found in ((task, part.summary()) for task, part in table.tasks().items())
        }

    def export(self, folder: Path, answers: Answers) -> None:
        """``mme/TASK.txt``: image, question, label and answer, tab-separated, as the official tool reads."""
        given = self.texts(answers)
        for task in dict.fromkeys(q.task for q in self.asked):
            lines = [
                "\t".join((q.image, q.text, "Yes" if q.label else "No", re.sub(r"\s+", " ", text).strip()))
                for q, text in zip(self.asked, given, strict=True)
                if q.task == task
            ]
            write_text(folder / "mme" / f"{task}.txt", "\n".join(lines) + "\n")

    @classmethod
    def add_score_arguments(cls, parser: ArgumentParser) -> None:
        """Add the choice of a parser."""
        parser.add_argument("--parser", default="official", help=f"rule that reads yes or no: {' or '.join(PARSERS)}")

    @classmethod
    def from_files(cls, path: Path, options: Namespace) -> tuple[Mme, FileAnswers]:
        """Read answers with their questions and labels.

        Args:
            path: The file or folder, as the module says.
            options: As typed.

        Raises:
            DataError: A line is broken, or a task is incomplete and ``--subset`` does not say that it may be.
        """
        file = AnswerFile.of(path, options)
        found = [(q, a) for q, a in (load_results(path) if path.is_dir() else _from_rows(file)) if q.task in TASKS]
        made, answers = cls.answered(file, [q for q, _ in found], [Answer(a) for _, a in found], parser=options.parser)
        images = {name: int(table.images.sum()) for name, table in made.score(answers).tasks().items()}
        for name, number_of in images.items():
            if number_of != IMAGES_PER_TASK and not file.subset:
                raise DataError(
                    f"{path} has answers to {number_of} of {IMAGES_PER_TASK} images of {name}: answer them all, leave "
                    "the task out, or type --subset to score what is there"
                )
        file.covers({f"images of {name}": (number_of, IMAGES_PER_TASK) for name, number_of in images.items()})
        return made, answers

    def report_file(self, own: ScoredFile, other: ScoredFile | None, seed: int) -> tuple[dict[str, Any], str]:
        """One row per task, and the total of all four."""
        tables, total = own.table.tasks(), own.table.total()
        result: dict[str, Any] = {"parser": self.parser, "total": total}
        result["tasks"] = {task: {"counts": t.counts(), "summary": t.summary()} for task, t in tables.items()}
        lines = [["task", "n", "accuracy", "accuracy+", "score (200)", "yes", "unparsed"]]
        for task, table in tables.items():
            c, s = table.counts(), table.summary()
            figures = [number(s["accuracy"]), number(s["accuracy_plus"]), f"{s['score']:.2f}", number(s["yes_ratio"])]
            lines.append([task, str(c["n"]), *figures, str(c["unparsed"])])
        text = f"MME, hallucination subset, parser {self.parser}, {own.path}\n{plain_table(lines)}"
        return result, text if total is None else f"{text}\ntotal (800): {total:.2f}"


def parse_label(value: object, where: str) -> bool:
    """Whether yes is right, from "yes" or "no".

    Raises:
        DataError: anything else; the message begins with ``where``.
    """
    text = str(value).strip().lower()
    if text not in ("yes", "no"):
        raise DataError(f"{where}: expected the label yes or no, found {value!r}")
    return text == "yes"


def _from_folder(folder: Path) -> Iterator[MmeQuestion]:
    for task in TASKS:
        texts = folder / task / "questions_answers_YN"
        images = folder / task / "images"
        texts, images = (texts, images) if texts.is_dir() else (folder / task, folder / task)
        for file in sorted(texts.glob("*.txt")) if texts.is_dir() else ():
            path = next((p for s in _IMAGE_SUFFIXES if (p := images / f"{file.stem}{s}").is_file()), None)
            if path is None:
                raise DataError(f"{file} has no image {file.stem}{'|'.join(_IMAGE_SUFFIXES)} in {images}")
            for where, line in _lines(file, "MME question file", "unpack the task again"):
                text, tab, label = line.rpartition("\t")
                if not tab:
                    raise DataError(f"{where}: expected a question, a tab, and Yes or No, found {line[:60]!r}")
                yield MmeQuestion(task, path.name, text.strip(), parse_label(label, where), path)


def _lines(path: Path, what: str, remedy: str) -> Iterator[tuple[str, str]]:
    """The lines of a file that hold anything, with their places."""
    for place, line in enumerate(read_text(path, what=what, remedy=remedy).split("\n"), 1):
        if line.strip():
            yield f"{path} line {place}", line.rstrip("\r")


def _from_dataset(where: str) -> Iterator[MmeQuestion]:
    for place, row in dataset_rows(where):
        task = text_field(row, ("category", "task"), place)
        if task in TASKS:
            image = text_field(row, ("question_id", "image_id"), place).rpartition("/")[2]
            label = parse_label(text_field(row, ("answer", "label"), place), place)
            yield MmeQuestion(task, image, text_field(row, ("question",), place).strip(), label, own_image(row, place))


def load_results(folder: Path) -> list[tuple[MmeQuestion, str]]:
    """Read a folder of the official tool: one file per task (``existence.txt``), of lines with four columns.

    The columns, separated by tabs, are image, question, label (yes or no) and answer. Files of other tasks of MME are
    left out.

    Returns:
        The questions, each with its answer.

    Raises:
        DataError: no file of the hallucination subset, a file cannot be read, or a line is broken.
    """
    files = [path for task in TASKS if (path := folder / f"{task}.txt").exists()]
    if not files:
        raise DataError(f"{folder} has none of {', '.join(f'{task}.txt' for task in TASKS)}: give the results folder")
    return [answer for path in files for answer in _results(path)]


def _results(path: Path) -> list[tuple[MmeQuestion, str]]:
    answers = []
    for where, line in _lines(path, "MME results file", "write it again with the official tool"):
        columns = line.split("\t")
        if len(columns) != 4:
            raise DataError(
                f"{where}: expected four columns separated by tabs ({_COLUMNS}), found {len(columns)}; write answers "
                "on one line, without tabs"
            )
        image, text, label, answer = columns
        answers.append((MmeQuestion(path.stem, image, text, parse_label(label, where)), answer))
    if not answers:
        raise DataError(f"{path} is empty: expected lines of {_COLUMNS}, separated by tabs")
    return answers


def _readings(text: str) -> tuple[bool | None, ...]:
    return tuple(parse_answer(text, parser) for parser in PARSERS)


def _from_rows(file: AnswerFile) -> list[tuple[MmeQuestion, str]]:
    rows = file.distinct(file.rows())
    named = []
    for row in rows:
        task = text_of(row.fields, row.where, ("task", "category"))
        if task not in TASKS and task not in OTHER_TASKS:
            raise DataError(f"{row.where}: MME has no task {task!r}; its hallucination subset is {', '.join(TASKS)}")
        image = text_of(row.fields, row.where, ("image", "question_id"))
        named.append((task, image, text_of(row.fields, row.where, ("question",))))
    asked = [MmeQuestion(*each, label) for each, label in zip(named, file.labels(rows), strict=True)]
    given = file.given(rows, [Asked((), q.text, truth=yes_no(q.label)) for q in asked], _readings)
    return [(question, each.text) for question, each in zip(asked, given, strict=True)]
