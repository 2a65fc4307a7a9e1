"""Questions of one's own: JSON lines (or one JSON list) of image, question and answer.

    {"image": "kitchen.jpg", "question": "Is there a dog in the image?", "answer": "no"}
    {"image": "kitchen.jpg", "question": "What is on the table?", "answer": ["a cup", "a mug"]}

``image`` is a file, relative to the file of questions; without it (or with null) the question is asked alone. An
``answer`` of yes or no makes a yes/no question, anything else a free one; a list holds answers that are all right.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmfix.errors import DataError


@dataclass(frozen=True)
class CustomQuestion:
    """One question.

    Attributes:
        image: As the file names it; empty without one.
        path: The image's file, or None.
        text: The question.
        label: Whether yes is right; None for a free question.
        answers: The right answers of a free question; empty for a yes/no question.
        row: The line it was read from, without the image's bytes.
    """

    image: str
    path: Path | None
    text: str
    label: bool | None
    answers: tuple[str, ...]
    row: Mapping[str, Any]


def read_questions(rows: Iterable[tuple[str, Mapping[str, Any], Path | None]]) -> list[CustomQuestion]:
    """Read questions.

    Args:
        rows: Place for messages, fields, and the image's file.

    Raises:
        DataError: A row has no question or no answer, or a question about an image occurs twice; or there is no row.
    """
    found: list[CustomQuestion] = []
    seen: dict[tuple[Path | None, str], str] = {}
    for where, row, path in rows:
        text, answer = row.get("question"), row.get("answer")
        if not isinstance(text, str) or not text.strip():
            raise DataError(f"{where}: expected 'question' with a text, found {text!r}")
        first = seen.setdefault((path, text), where)
        if first != where:
            raise DataError(f"{where}: the same question about the same image as {first}; ask it once")
        right = _answers(answer, where)
        words = {each.strip().strip(".").lower() for each in right}
        label = "yes" in words if len(words) == 1 and words <= {"yes", "no"} else None
        image = row.get("image")
        kept = {name: value for name, value in row.items() if name != "image"}
        found.append(
            CustomQuestion(
                image if isinstance(image, str) else (path.name if path is not None else ""),
                path,
                text,
                label,
                () if label is not None else right,
                kept,
            )
        )
    if not found:
        raise DataError("there are no questions; expected lines with image, question and answer")
    return found


def _answers(value: Any, where: str) -> tuple[str, ...]:
    if isinstance(value, bool):
        return ("yes" if value else "no",)
    given = value if isinstance(value, (list, tuple)) else [value]
    right = tuple(str(each) for each in given if each is not None and str(each).strip())
    if not right:
        raise DataError(f"{where}: expected 'answer' (yes, no, a text, or a list of texts), found {value!r}")
    return right
