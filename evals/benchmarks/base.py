"""What every benchmark offers. Columns, intervals, controls, exports and ``vlmfix score NAME`` follow from it."""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from vlmfix.errors import VlmfixError

from ..data.answers import FileAnswers
from ..data.samples import Answers, Sample, effort
from ..data.write import write_text
from ..options import EvalOptions
from ..stats.bootstrap import finite
from ..stats.figures import Figure
from ..stats.table import Table, differences, summary
from .yes_no import paired_answers

if TYPE_CHECKING:
    from .choice import RunData
    from .coco_objects import MarkedText

EARLY_STOP, YES_BIAS, SELF_VERIFICATION = "early stop", "yes bias", "self-verification"
"""The plain controls: the baseline with descriptions ended earlier, with its yes/no threshold moved, or with
descriptions that lose what the model denies when it is asked."""

THINNING = (EARLY_STOP, SELF_VERIFICATION)
"""Those that take something from descriptions. A benchmark declares the first, and gets both."""


class Benchmark(ABC):
    """One benchmark of a run: what it asks, how answers become figures, and the files they are exchanged in.

    A benchmark is a folder beside this file with a ``task.py`` that defines one such class, or a class that another
    package names under the entry-point group ``vlmfix.benchmarks``. See ``README.md`` beside this file.

    Attributes:
        name: Its name on the command line and in ``results.json``.
        title: Its name for readers.
        summary: One line on what it measures, for ``--help``.
        figures: What it measures; the first ones first in tables.
        matched_on: Control -> name of the figure that the control is matched on, such as ``{"early stop": "recall"}``.
        scoring: Settings that decide how answers are scored, not what they are: a judge, a word similarity.
        row_by_row: Whether every figure counts rows one by one. Otherwise what belongs to several rows of an image is
            counted, and runs are compared on whole images only.
        rows_are: What a row of its table is, in the plural.
        side_names: Names of the further tables that :meth:`side_tables` gives.
        file_flag: Flag under which ``vlmfix score`` takes the file too, such as ``"--captions"``.
        samples: Everything it asks, each different question once.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    summary: ClassVar[str]
    figures: ClassVar[tuple[Figure, ...]]
    matched_on: ClassVar[Mapping[str, str]] = MappingProxyType({})
    scoring: ClassVar[tuple[str, ...]] = ()
    row_by_row: ClassVar[bool] = False
    rows_are: ClassVar[str] = "questions"
    side_names: ClassVar[tuple[str, ...]] = ()
    file_flag: ClassVar[str] = ""
    samples: tuple[Sample, ...]

    def __init_subclass__(cls, **options: Any) -> None:
        """Give the declared figures the benchmark's name."""
        super().__init_subclass__(**options)
        if "figures" in vars(cls):
            cls.figures = tuple(replace(figure, benchmark=cls.name) for figure in cls.figures)
            for figure in cls.figures:
                if figure.control is not None and figure.control not in cls.matched_on:
                    raise TypeError(
                        f"{figure.key} is compared with {figure.control}: say in matched_on what that is matched on"
                    )

    @classmethod
    def figure(cls, name: str) -> Figure:
        """The declared figure of a name.

        Raises:
            KeyError: There is none.
        """
        return {figure.name: figure for figure in cls.figures}[name]

    @classmethod
    def early_stop_figures(cls) -> tuple[Figure, Figure] | None:
        """Hallucination and recall: what a method is compared with the early stop on, and what that is matched on.

        Of several compared ones, the one that other heads are compared on too. None without an early stop.
        """
        compared = [figure for figure in cls.figures if figure.control == EARLY_STOP]
        if EARLY_STOP not in cls.matched_on or not compared:
            return None
        shown = next((figure for figure in compared if figure.head_control), compared[0])
        return shown, cls.figure(cls.matched_on[EARLY_STOP])

    # Asking

    @classmethod
    @abstractmethod
    def make(cls, options: EvalOptions, data: RunData) -> Benchmark:
        """Read what a run asks, and choose images.

        Args:
            options: Of the run.
            data: Where to find data, and whom to tell what the reader must know.

        Raises:
            DataError: A file is missing or broken; the message names it.
        """

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """What identifies its questions and images, for ``config.json``."""

    # Scoring

    @abstractmethod
    def score(self, answers: Answers) -> Table | None:
        """One method's table: the only place where answers become numbers. None if they cannot be scored here."""

    @classmethod
    def differences(cls, table: Table | None, other: Table | None, seed: int) -> dict[str, Any]:
        """Paired difference of two tables in every column that both have: key of the figure -> interval for JSON.

        Args:
            table: The method's.
            other: What it is compared with, about the same images.
            seed: Seed of the bootstrap.
        """
        found = differences([figure for figure in cls.figures if figure.column], table, other, seed)
        return {f"{cls.name}.{name}": interval for name, interval in found.items()}

    def side_tables(self, answers: Answers) -> Mapping[str, Table]:
        """Further tables of a method's answers that ``counts.json`` keeps, by their :attr:`side_names`."""
        return {}

    @classmethod
    def text_differences(cls, own: Mapping[str, Table], other: Mapping[str, Table], seed: int) -> dict[str, Any]:
        """Paired differences that say whether a method breaks texts, from its side tables and the baseline's.

        Args:
            own: The method's, by name.
            other: The baseline's.
            seed: Seed of the bootstrap.

        Returns:
            ``looping``, ``truncation`` and others -> interval; empty where nothing is known of texts.
        """
        return {}

    def about(self) -> str:
        """One line: what was asked, how the answers were read, and what that means for the figures."""
        return f"{self.title}: {len(self.samples)} questions"

    def counts(self, table: Any) -> dict[str, Any]:
        """Integer counts, under the official names where there are any, with ``unparsed`` answers."""
        counts: dict[str, Any] = table.counts()
        return counts

    def breakdown(self, table: Any) -> dict[str, dict[str, float]]:
        """Row name -> figure name -> value as printed (percentages, points), for a table of its own."""
        return {}

    def details(
        self, label: str, tables: Mapping[str, Any], answers: Mapping[str, Answers], seed: int
    ) -> dict[str, Any]:
        """What ``results.json`` holds of a method beside counts, summary and effort.

        Args:
            label: The method.
            tables: Label to table, the baseline first.
            answers: Label to answers.
            seed: Of the bootstrap.
        """
        return {}

    def part(self, label: str, tables: Mapping[str, Any], answers: Mapping[str, Answers], seed: int) -> dict[str, Any]:
        """A method's part of ``results.json``; arguments as of :meth:`details`.

        Returns:
            ``about``; ``asked``, ``truncated``, ``changed``, ``seconds`` and ``pace``; ``counts``; ``summary`` (figure
            name -> value); ``breakdown``; ``paired`` (yes/no answers against the baseline's); and the details.
        """
        table, baseline = tables[label], next(iter(tables))
        part: dict[str, Any] = {
            "about": self.about(),
            "asked": len(self.samples),
            "truncated": sum(answers[label][sample.key].truncated for sample in self.samples),
            **effort(self.samples, answers[label], answers[baseline]),
            "summary": {},
        }
        if table is None:
            return part
        part |= {"counts": self.counts(table), "summary": finite(summary(table, self.figures))}
        part["breakdown"] = {row: finite(figures) for row, figures in self.breakdown(table).items()}
        if label != baseline and (paired := paired_answers(table, tables[baseline], seed)) is not None:
            part["paired"] = paired
        return part | self.details(label, tables, answers, seed)

    def marked(self, sample: Sample, text: str) -> MarkedText | None:
        """An answer with the objects that it names marked, for the report's gallery; None where nothing is marked."""
        return None

    # Files

    @abstractmethod
    def export(self, folder: Path, answers: Answers) -> None:
        """Write one method's answers in the benchmark's own format, for its official scripts.

        Args:
            folder: The method's folder; it exists.
            answers: Its answers.
        """

    @classmethod  # noqa: B027
    def add_score_arguments(cls, parser: ArgumentParser) -> None:
        """Add what ``vlmfix score NAME`` needs to know beside the file of answers (``FILE``, ``--out``, ...)."""

    @classmethod
    def from_files(cls, path: Path, options: Namespace) -> tuple[Benchmark, Answers]:
        """Read a file of answers, whoever generated them: what was asked, and the answers to it.

        :class:`~vlmfix.evals.data.answers.AnswerFile` finds the answers in it; its ``notes`` and ``facts`` are told if
        the answers are given as :class:`~vlmfix.evals.data.answers.FileAnswers`.

        Args:
            path: The file.
            options: As typed, with what :meth:`add_score_arguments` added.

        Raises:
            VlmfixError: The benchmark scores no files, or the file cannot be read; the message says what to do.
        """
        raise VlmfixError(f"vlmfix score knows no file format of {cls.name}; evaluate it with vlmfix eval")

    def report_file(
        self, own: ScoredFile, other: ScoredFile | None, seed: int
    ) -> tuple[dict[str, Any] | None, str] | None:
        """What ``vlmfix score`` writes and shows of a file, if that is more than the declared figures.

        Args:
            own: The file, with its table.
            other: A baseline to compare with, if there is one.
            seed: Of the bootstrap.

        Returns:
            The part of the JSON file (None if there is nothing to write) and the text; or None for the declared figures
            alone. A part without ``baseline`` is compared with one by the declared figures.
        """
        return None


@dataclass(frozen=True)
class ScoredFile:
    """A file of answers, scored.

    Attributes:
        path: The file.
        task: What was asked.
        answers: The answers.
        table: Their table; None if they cannot be scored without something else, such as a judge.
    """

    path: Path
    task: Any
    answers: Answers
    table: Any

    @property
    def facts(self) -> dict[str, Any]:
        """What was found out about the file, for JSON."""
        return self.answers.file.facts if isinstance(self.answers, FileAnswers) else {}

    @property
    def notes(self) -> list[str]:
        """What the reader of the figures must know about it."""
        return self.answers.file.notes if isinstance(self.answers, FileAnswers) else []


def safe_name(label: str) -> str:
    """A method's label as the name of a folder."""
    return re.sub(r"[^\w.+-]", "-", label)


def whole_groups(
    keys: Sequence[Any], right: NDArray[np.bool_], rows: NDArray[np.bool_] | None = None
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """What belongs to several rows, on the first one of each group.

    Args:
        keys: The group of each row, [n].
        right: Whether each row is right, [n].
        rows: Which rows take part, [n]; all by default.

    Returns:
        Whether a row is the first of its group, and whether it is and all rows of the group are right; bool [n] both.
    """
    groups: dict[Any, list[int]] = {}
    for row in range(len(right)) if rows is None else np.flatnonzero(rows).tolist():
        groups.setdefault(keys[row], []).append(row)
    first, whole = np.zeros(len(right), dtype=np.bool_), np.zeros(len(right), dtype=np.bool_)
    for members in groups.values():
        first[members[0]], whole[members[0]] = True, right[members].all()
    return first, whole


def distinct(samples: Sequence[Sample]) -> tuple[Sample, ...]:
    """Each different sample once, in order."""
    return tuple({sample.key: sample for sample in samples}.values())


def texts(samples: Sequence[Sample], answers: Answers) -> list[str]:
    """The answers' texts, in the order of the samples."""
    return [answers[sample.key].text for sample in samples]


def write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write JSON lines."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_list(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write one JSON list."""
    write_text(path, json.dumps(list(rows), indent=1, ensure_ascii=False) + "\n")
