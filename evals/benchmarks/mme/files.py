"""MME of answers in a file.

The file is the results folder of the official tool (``existence.txt``, ...; see :func:`.data.load_results`), or rows
with ``task`` (or ``category``), ``image`` (or ``question_id``), ``question``, ``label`` (yes or no) and the answer.
Other tasks of MME are left out.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmfix.errors import DataError

from ...data.answers import AnswerFile, FileAnswers, label_of, once_each, yes_no
from ...data.records import text_of
from ...data.samples import Answer, Answers, Sample
from ...tables import number, plain_table
from ..base import ScoredFile
from ..parts import answered, check_whole, subset_lines
from .data import OTHER_TASKS, TASKS, MmeAnswer, load_results
from .figures import IMAGES_PER_TASK, PARSERS, MmeTable, parse_answer
from .task import Mme, MmeQuestion


@dataclass(frozen=True)
class MmeFile(Mme):
    """MME as a file answers it.

    Attributes:
        path: The file.
        subset: Whether a task may have fewer images than MME has.
    """

    path: Path = Path()
    subset: bool = False

    @classmethod
    def add_score_arguments(cls, parser: ArgumentParser) -> None:
        """Add what scoring needs to know beside the answers."""
        parser.add_argument("--parser", default="official", help="rule that reads yes or no: official or lmms")

    @classmethod
    def from_files(cls, path: Path, options: Namespace) -> tuple[Mme, FileAnswers]:
        """See :func:`read_mme`."""
        return read_mme(path, options)

    def report_file(self, own: ScoredFile, other: ScoredFile | None, seed: int) -> tuple[dict[str, Any], str]:
        """One row per task, and the total of all four."""
        tables, total = own.table.tasks(), own.table.total()
        parts = _parts(own.table)
        result: dict[str, Any] = {"parser": self.parser, "total": total, "answered": answered(parts)}
        result["tasks"] = {task: {"counts": t.counts(), "summary": t.summary()} for task, t in tables.items()}
        lines = [["task", "n", "accuracy", "accuracy+", "score (200)", "yes", "unparsed"]]
        for task, table in tables.items():
            c, s = table.counts(), table.summary()
            figures = [number(s["accuracy"]), number(s["accuracy_plus"]), f"{s['score']:.2f}", number(s["yes_ratio"])]
            lines.append([task, str(c["n"]), *figures, str(c["unparsed"])])
        title = f"MME, hallucination subset, parser {self.parser}, {own.path}"
        text = "\n".join([title, *subset_lines(parts), plain_table(lines)])
        return result, text if total is None else f"{text}\ntotal (800): {total:.2f}"

    def score(self, answers: Answers) -> MmeTable:
        """One row per question; every task must be whole unless the user says otherwise."""
        table = super().score(answers)
        if not self.subset:
            check_whole(_parts(table), self.path)
        return table


def _parts(table: MmeTable) -> dict[str, tuple[int, int]]:
    return {f"images of {task}": (t.counts()["images"], IMAGES_PER_TASK) for task, t in table.tasks().items()}


def read_mme(path: Path, options: Namespace) -> tuple[Mme, FileAnswers]:
    """Read answers with their questions and labels.

    Args:
        path: The file or folder, as the module says.
        options: As typed.

    Raises:
        DataError: A line is broken, or a task is incomplete and ``--subset`` does not say that it may be.
    """
    file = AnswerFile.of(path, options)
    answers = [a for a in (load_results(path) if path.is_dir() else _from_rows(file)) if a.task in TASKS]
    asked = tuple(MmeQuestion(a.task, a.image, None, a.question, a.label) for a in answers)
    # Each its own: answers to one question, if there are several, are for the table to refuse.
    each = tuple(Sample(Mme.name, i, None, a.question) for i, a in enumerate(answers))
    task = MmeFile(asked, each, each, "{question}", 0, options.parser, path, options.subset)
    return task, FileAnswers(file, each, [Answer(a.answer, (), False, (), None, 0.0) for a in answers])


def _readings(text: str) -> set[bool | None]:
    return {parse_answer(text, parser) for parser in PARSERS}


def _from_rows(file: AnswerFile) -> Sequence[MmeAnswer]:
    rows, repeated = once_each(file.rows())
    file.repeats(repeated)
    named = []
    for row in rows:
        task = text_of(row.fields, row.where, ("task", "category"))
        if task not in TASKS and task not in OTHER_TASKS:
            raise DataError(f"{row.where}: MME has no task {task!r}; its hallucination subset is {', '.join(TASKS)}")
        image = text_of(row.fields, row.where, ("image", "question_id"))
        named.append((task, image, text_of(row.fields, row.where, ("question",))))
    labels = [label_of(row) for row in rows]
    if any(key == "answer" for key, _ in labels):
        file.notes.append("'answer' is taken for the label, because another key holds the model's text")
    given = file.given(rows, [asked for _, _, asked in named], [yes_no(label) for _, label in labels], _readings)
    return [
        MmeAnswer(task, image, question, label, each.text)
        for (task, image, question), (_, label), each in zip(named, labels, given, strict=True)
    ]
