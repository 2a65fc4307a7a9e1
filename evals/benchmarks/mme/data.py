"""Answers to MME in the official tool's format (Fu et al. 2023, arXiv:2306.13394).

MME may not be redistributed, so no question of it is in this package: the answers bring questions and labels with them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from vlmfix.errors import DataError
from vlmfix.files import read_text

MmeTask = Literal["existence", "count", "position", "color"]


TASKS: tuple[MmeTask, ...] = get_args(MmeTask)


#: The other tasks of MME, which are not in the hallucination subset.
OTHER_TASKS = frozenset(
    "artwork celebrity code_reasoning commonsense_reasoning landmark numerical_calculation OCR posters scene "
    "text_translation".split()
)


_COLUMNS = "image, question, label and answer"


@dataclass(frozen=True)
class MmeAnswer:
    """One answered question.

    Attributes:
        task: Its task.
        image: Name of the image.
        question: The question; the two questions of an image differ in it.
        label: Whether yes is right.
        answer: What the model said.
    """

    task: str
    image: str
    question: str
    label: bool
    answer: str


def parse_label(value: object, where: str) -> bool:
    """Whether yes is right, from "yes" or "no".

    Raises:
        DataError: anything else; the message begins with ``where``.
    """
    text = str(value).strip().lower()
    if text not in ("yes", "no"):
        raise DataError(f"{where}: expected the label yes or no, found {value!r}")
    return text == "yes"


def load_results(folder: Path | str) -> list[MmeAnswer]:
    """Read a folder of the official tool: one file per task (``existence.txt``), of lines with four columns.

    The columns, separated by tabs, are image, question, label (yes or no) and answer. Files of other tasks of MME are
    left out.

    Raises:
        DataError: no file of the hallucination subset, a file cannot be read, or a line is broken.
    """
    folder = Path(folder)
    files = [path for task in TASKS if (path := folder / f"{task}.txt").exists()]
    if not files:
        raise DataError(f"{folder} has none of {', '.join(f'{task}.txt' for task in TASKS)}: give the results folder")
    return [answer for path in files for answer in _answers(path)]


def _answers(path: Path) -> list[MmeAnswer]:
    lines = read_text(path, what="MME results file", remedy="write it again with the official tool").split("\n")
    answers = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where, columns = f"{path} line {number}", line.rstrip("\r").split("\t")
        if len(columns) != 4:
            raise DataError(
                f"{where}: expected four columns separated by tabs ({_COLUMNS}), found {len(columns)}; write answers "
                "on one line, without tabs"
            )
        image, question, label, answer = columns
        answers.append(MmeAnswer(path.stem, image, question, parse_label(label, where), answer))
    if not answers:
        raise DataError(f"{path} is empty: expected lines of {_COLUMNS}, separated by tabs")
    return answers
