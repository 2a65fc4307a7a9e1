"""Score captions or answers that lie in a file, whoever generated them; no model is loaded."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlmfix.errors import DataError

from .cache import write_json
from .config import SCHEMA_VERSION
from .data.coco import CocoData
from .data.pope import load_questions
from .metrics.chair import ChairMatcher, ground_truth, score_captions
from .metrics.pope import PopeTable, score_answers, score_labels
from .tables import finite, number, plain_table
from .tasks import parse_image_id

_TEXT_KEYS = ("caption", "text", "answer", "ans")


def score_chair_file(path: Path, data_dir: Path, *, mode: str = "original", out: Path | None = None) -> str:
    """Score captions with CHAIR.

    Args:
        path: JSON lines (or one JSON list) with ``image_id`` (integer, or a COCO file name) and ``caption``, ``text``
            or ``answer``.
        data_dir: COCO folder; only its annotation files are read.
        mode: CHAIR's word normalisation, of captions and ground truth alike.
        out: Where to write figures and integer counts as JSON, if anywhere.

    Returns:
        A plain-text table.

    Raises:
        DataError: A line has no image id or no text, an image occurs twice or has no annotation.
    """
    captions: dict[int, str] = {}
    for where, row in read_rows(path):
        name = row.get("image_id", row.get("image"))
        if name is None:
            raise DataError(f"{where}: expected 'image_id', found the keys {', '.join(row)}")
        image_id = parse_image_id(name, where)
        if image_id in captions:
            raise DataError(f"{where}: image {image_id} has a caption already; CHAIR takes one caption per image")
        captions[image_id] = text_of(row, where)
    matcher = ChairMatcher(mode)  # type: ignore[arg-type]
    data = CocoData.load(data_dir)
    table = score_captions(captions, ground_truth(data, sorted(captions), matcher), matcher)
    result = {"benchmark": "chair", "mode": mode, "counts": table.counts(), "summary": finite(table.summary())}
    write_result(out, path, result)
    summary = table.summary()
    columns = ["captions", "CHAIR_s", "CHAIR_i", "recall", "precision", "F1", "words"]
    names = ("chair_s", "chair_i", "recall", "precision", "f1")
    row_text = [str(len(table)), *(number(summary[name]) for name in names), f"{summary['length_words']:.1f}"]
    return f"CHAIR, {mode} mode, {path}\n" + plain_table([columns, row_text])


def score_pope_file(path: Path, questions: Sequence[Path], *, parser: str = "official", out: Path | None = None) -> str:
    """Score POPE answers.

    Args:
        path: JSON lines (or one JSON list) with ``answer``, ``text`` or ``caption``. Answers are matched to the
            questions by ``question_id`` (with ``split`` or ``category`` where several files repeat ids), or by order
            if no line has one. Without question files every line must carry its ``label``.
        questions: POPE question files.
        parser: Rule that reads yes or no, see ``metrics.pope.parse_answer``.
        out: Where to write figures and integer counts as JSON, if anywhere.

    Returns:
        A plain-text table, one row per split.

    Raises:
        DataError: Questions and answers do not match.
    """
    rows = read_rows(path)
    tables = _tables_from_questions(rows, questions, path, parser) if questions else _table_from_labels(rows, parser)
    result = {
        "benchmark": "pope",
        "parser": parser,
        "splits": {split: {"counts": t.counts(), "summary": finite(t.summary())} for split, t in tables.items()},
    }
    write_result(out, path, result)
    columns = ["split", "n", "accuracy", "precision", "recall", "F1", "yes", "unparsed"]
    names = ("accuracy", "precision", "recall", "f1", "yes_ratio")
    lines = [columns]
    for split, table in tables.items():
        summary, counts = table.summary(), table.counts()
        lines.append([split, str(counts["n"]), *(number(summary[n]) for n in names), str(counts["unparsed"])])
    return f"POPE, parser {parser}, {path}\n" + plain_table(lines)


def _tables_from_questions(
    rows: Sequence[tuple[str, Mapping[str, Any]]], files: Sequence[Path], path: Path, parser: str
) -> dict[str, PopeTable]:
    questions = [question for file in files for question in load_questions(file)]
    if all("question_id" in row for _, row in rows):
        splits = {question.split for question in questions}
        answers: dict[tuple[str, str], str] = {}
        for where, row in rows:
            split = str(row.get("split", row.get("category", next(iter(splits)) if len(splits) == 1 else "")))
            if split not in splits:
                raise DataError(
                    f"{where}: the question files have the splits {', '.join(sorted(splits))}, and the line says "
                    f"{split!r}; score one split at a time, or add 'split' to every line"
                )
            answers[split, str(row["question_id"])] = text_of(row, where)
        lacking = [q for q in questions if (q.split, q.question_id) not in answers]
        if lacking:
            raise DataError(
                f"{path} answers {len(questions) - len(lacking)} of {len(questions)} questions; the first without an "
                f"answer is {lacking[0].split} question {lacking[0].question_id}"
            )
        texts = [answers[q.split, q.question_id] for q in questions]
    elif len(rows) != len(questions):
        raise DataError(
            f"{path} has {len(rows)} answers without question_id, the question files {len(questions)} questions"
        )
    else:
        texts = [text_of(row, where) for where, row in rows]
    by_split: dict[str, list[int]] = {}
    for index, question in enumerate(questions):
        by_split.setdefault(question.split, []).append(index)
    return {
        split: score_answers([questions[i] for i in chosen], [texts[i] for i in chosen], parser=parser)  # type: ignore[arg-type]
        for split, chosen in by_split.items()
    }


def _table_from_labels(rows: Sequence[tuple[str, Mapping[str, Any]]], parser: str) -> dict[str, PopeTable]:
    known = {"yes": True, "1": True, "true": True, "no": False, "0": False, "false": False}
    labels = []
    for where, row in rows:
        label = known.get(str(row.get("label")).strip().lower())
        if label is None:
            raise DataError(
                f"{where}: without --questions every line needs a label (yes or no), found {row.get('label')!r}"
            )
        labels.append(label)
    texts = [text_of(row, where) for where, row in rows]
    return {"all": score_labels(labels, texts, image_ids=range(len(rows)), parser=parser)}  # type: ignore[arg-type]


def read_rows(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """JSON lines, or one JSON list, as (where, object) pairs; ``where`` names the file and line for messages.

    Raises:
        DataError: The file is missing, empty, or a line is no JSON object.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    rows = []
    try:
        entries = json.loads(text) if text.lstrip().startswith("[") else None
    except ValueError as error:
        raise DataError(f"{path}: expected JSON lines or one JSON list ({error})") from error
    if entries is not None:
        rows = [(f"{path} entry {i}", entry) for i, entry in enumerate(entries, 1)]
    else:
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                try:
                    rows.append((f"{path} line {number}", json.loads(line)))
                except ValueError as error:
                    raise DataError(f"{path} line {number}: not JSON ({error})") from error
    for where, row in rows:
        if not isinstance(row, dict):
            raise DataError(f"{where}: expected a JSON object, found {str(row)[:40]!r}")
    if not rows:
        raise DataError(f"{path} is empty; expected JSON lines")
    return rows


def text_of(row: Mapping[str, Any], where: str, keys: Sequence[str] = _TEXT_KEYS) -> str:
    """The text under the first of ``keys`` that the row has.

    Raises:
        DataError: It has none of them, or the first one holds null, a list or an object.
    """
    for key in keys:
        if key in row:
            value = row[key]
            if value is None:
                raise DataError(f"{where}: {key!r} is null; give the text, or an empty one if there is no answer")
            if isinstance(value, list | dict):
                raise DataError(f"{where}: expected text in {key!r}, found {str(value)[:40]!r}")
            return str(value)
    raise DataError(f"{where}: expected one of {', '.join(keys)}, found the keys {', '.join(row)}")


def write_result(out: Path | None, path: Path, result: Mapping[str, Any]) -> None:
    """Write figures and counts as JSON to ``out``, if it is given; ``path`` is the file they were scored from."""
    if out is not None:
        write_json(out, {"schema_version": SCHEMA_VERSION, "file": str(path), **result})
