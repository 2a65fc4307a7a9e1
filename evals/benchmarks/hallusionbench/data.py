"""HallusionBench's questions: yes/no about figures, original and edited (Guan et al. 2024, arXiv:2310.14566).

The file is ``HallusionBench.json`` of tianyi-lab/HallusionBench (BSD-3-Clause).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmfix.errors import DataError

from ...data.records import read_rows

#: The fields that tell a question from all others.
KEY_FIELDS = ("category", "subcategory", "set_id", "figure_id", "question_id")

_SOURCE = "download HallusionBench.json from tianyi-lab/HallusionBench"


@dataclass(frozen=True)
class HallusionQuestion:
    """One yes/no question.

    Attributes:
        category: "VD" (cannot be answered without the image) or "VS" (the image is a supplement).
        subcategory: Such as "chart" or "illusion".
        set_id: Number of the set of figures, as a string.
        figure_id: Figure of the set; "0" is the original, for VS no figure at all.
        question_id: Question of the set; variants with different figures share it.
        visual_input: 0 no image, 1 original image, 2 edited image.
        text: The question.
        reference: The right answer as a sentence.
        label: Whether yes is right.
        image: Path of the image below the folder of the images, or None.
        path: The image's file; None without one, and where only answers are scored.
    """

    category: str
    subcategory: str
    set_id: str
    figure_id: str
    question_id: str
    visual_input: int
    text: str
    reference: str
    label: bool
    image: str | None
    path: Path | None = None

    @property
    def key(self) -> tuple[str, ...]:
        """The values of :data:`KEY_FIELDS`."""
        return (self.category, self.subcategory, self.set_id, self.figure_id, self.question_id)

    @property
    def unit(self) -> str:
        """The set of figures, which holds every variant of its questions: what is chosen and resampled."""
        return "/".join(self.key[:3])

    @property
    def picture(self) -> str:
        """The figure's name."""
        return "/".join(self.key[:4])

    @property
    def figure(self) -> tuple[str, ...] | None:
        """The figure that is asked about, or None if there is none."""
        return None if self.without_image else self.key[:4]

    @property
    def group(self) -> tuple[str, ...]:
        """What all variants of the question share."""
        return (*self.key[:3], self.question_id)

    @property
    def original(self) -> bool:
        """Whether this is the variant the others were made from."""
        return self.figure_id == "0"

    @property
    def without_image(self) -> bool:
        """Whether the question is asked without an image."""
        return self.category == "VS" and self.original


def load_hallusionbench(path: Path | str) -> list[HallusionQuestion]:
    """Read ``HallusionBench.json``, in file order.

    Raises:
        DataError: the file is missing or broken, an entry is incomplete, or a question occurs twice. The message names
            file and entry.
    """
    return read_questions(read_rows(Path(path), what="HallusionBench file", remedy=_SOURCE))


def read_questions(rows: Iterable[tuple[str, Any]]) -> list[HallusionQuestion]:
    """Read questions from rows with the fields of ``HallusionBench.json``, each with its place for messages.

    Raises:
        DataError: a row is incomplete, or a question occurs twice.
    """
    seen: dict[tuple[str, ...], int] = {}
    questions = []
    for number, (where, row) in enumerate(rows, 1):
        question = _question(row, where)
        first = seen.setdefault(question.key, number)
        if first != number:
            raise DataError(f"{where}: the same question as entry {first}: make the ids unique")
        questions.append(question)
    return questions


def _question(row: Any, where: str) -> HallusionQuestion:
    fields = (*KEY_FIELDS, "visual_input", "question", "gt_answer_details", "gt_answer")
    if not isinstance(row, Mapping) or not all(name in row for name in fields):
        raise DataError(f"{where}: expected an object with {', '.join(fields)}, found {str(row)[:60]!r}: {_SOURCE}")
    category, visual, label = str(row["category"]), str(row["visual_input"]), str(row["gt_answer"])
    for name, value, known in (
        ("category", category, ("VD", "VS")),
        ("visual_input", visual, ("0", "1", "2")),
        ("gt_answer", label, ("0", "1")),
    ):
        if value not in known:
            raise DataError(f"{where}: expected {name} {' or '.join(known)}, found {value!r}")
    return HallusionQuestion(
        category=category,
        subcategory=str(row["subcategory"]),
        set_id=str(row["set_id"]),
        figure_id=str(row["figure_id"]),
        question_id=str(row["question_id"]),
        visual_input=int(visual),
        text=str(row["question"]),
        reference=str(row["gt_answer_details"]),
        label=label == "1",
        image=row.get("filename"),
    )
