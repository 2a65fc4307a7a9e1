"""Score the answers to further benchmarks that lie in a file, whoever generated them; no model is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlmfix.errors import DataError

from .data.amber import load_amber
from .metrics.amber import score_responses
from .metrics.amber_words import spacy_similarity
from .report import plain_table
from .rescore import read_rows, text_of, write_result

_RESPONSE_KEYS = ("response", "answer", "text", "caption")


def score_amber_file(path: Path, data_dir: Path, *, spacy_model: str | None = None, out: Path | None = None) -> str:
    """Score AMBER responses.

    Args:
        path: JSON lines (or one JSON list) with ``id`` and ``response`` (or ``answer``, ``text``, ``caption``).
        data_dir: Folder with AMBER's annotations.
        spacy_model: spaCy model of the word similarity (official: ``en_core_web_lg``), or None for exact words only.
        out: Where to write figures and integer counts as JSON, if anywhere.

    Returns:
        A plain-text table.

    Raises:
        DataError: A line has no id or no text, an id occurs twice or is unknown, or a task has missing responses.
        UnsupportedFeatureError: A package that is needed is not installed.
    """
    data = load_amber(data_dir)
    responses: dict[int, str] = {}
    for where, row in read_rows(path):
        number = row.get("id")
        if type(number) is not int or number not in data.items:
            raise DataError(f"{where}: expected 'id', an item of AMBER's annotations, found {number!r}")
        if number in responses:
            raise DataError(f"{where}: item {number} has a response already; AMBER takes one response per item")
        responses[number] = text_of(row, where, _RESPONSE_KEYS)
    similarity = None if spacy_model is None else spacy_similarity(spacy_model)
    table = score_responses(data, responses, similarity=similarity, similarity_name=spacy_model)
    counts, figures, summary = table.counts(), table.figures(), table.summary()
    result = {"benchmark": "amber", "similarity": table.similarity, "counts": counts}
    write_result(out, path, {**result, "figures": figures, "summary": summary})
    lines = [f"AMBER, word similarity {table.similarity} (official: en_core_web_lg), {path}"]
    generative = figures.pop("Generative Task", None)
    if generative is not None:
        columns = ["descriptions", *generative, "empty"]
        lines.append(plain_table([columns, [str(counts["non_hallu_num"]), *_texts(generative), str(counts["empty"])]]))
    if figures:
        lines.append(plain_table([["questions", *next(iter(figures.values()))], *_rows(figures)]))
        lines.append(f"unparsed: {counts['unparsed']} of {counts['qa_correct_num']} (neither 'Yes' nor 'No': wrong)")
    return "\n".join([*lines, *(f"AMBER score: {value:.2f}" for value in summary.values())])


def _texts(figures: Mapping[str, float]) -> list[str]:
    return [f"{value:.1f}" for value in figures.values()]


def _rows(groups: Mapping[str, Mapping[str, Any]]) -> Sequence[list[str]]:
    return [[name, *_texts(figures)] for name, figures in groups.items()]
