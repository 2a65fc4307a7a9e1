"""Score the answers to further benchmarks that lie in a file, whoever generated them; no model is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlmfix.errors import DataError

from .data.amber import load_amber
from .data.hallusionbench import KEY_FIELDS, HallusionQuestion, load_hallusionbench, question_key
from .metrics.amber import score_responses
from .metrics.amber_words import spacy_similarity
from .metrics.hallusionbench import score_answers, score_judgements
from .report import finite, number, plain_table
from .rescore import read_rows, text_of, write_result

Rows = Sequence[tuple[str, Mapping[str, Any]]]

_RESPONSE_KEYS = ("response", "answer", "text", "caption")
_PREDICTION_KEYS = ("model_prediction", "answer", "response", "text")
_JUDGE_KEYS = ("judge", "gpt4v_output_gpt_check", "correctness")


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
        item = row.get("id")
        if type(item) is not int or item not in data.items:
            raise DataError(f"{where}: expected 'id', an item of AMBER's annotations, found {item!r}")
        if item in responses:
            raise DataError(f"{where}: item {item} has a response already; AMBER takes one response per item")
        responses[item] = text_of(row, where, _RESPONSE_KEYS)
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


def score_hallusionbench_file(path: Path, questions: Path, *, out: Path | None = None) -> str:
    """Score HallusionBench answers.

    Args:
        path: JSON lines (or one JSON list), matched to the questions by their key fields (category, subcategory,
            set_id, figure_id, question_id), or by order if no line has them. Each line has a judge code (``judge``,
            ``gpt4v_output_gpt_check`` or ``correctness``: 0 incorrect, 1 correct, 2 unclear) and perhaps ``same`` (0 or
            1); if no line is judged, the word yes or no of ``model_prediction`` (or ``answer``, ``response``,
            ``text``) is read.
        questions: ``HallusionBench.json``.
        out: Where to write figures and integer counts as JSON, if anywhere.

    Returns:
        A plain-text table.

    Raises:
        DataError: Questions and answers do not match, or only some lines are judged.
    """
    asked = load_hallusionbench(questions)
    rows = _matched(read_rows(path), asked, path)
    judge_key = next((key for key in _JUDGE_KEYS if key in rows[0][1]), None)
    if judge_key is None:
        judged = next((where for where, row in rows if any(key in row for key in _JUDGE_KEYS)), None)
        if judged is not None:
            raise DataError(f"{judged} has a judge code and {rows[0][0]} has none: judge all lines, or none")
        table = score_answers(asked, [text_of(row, where, _PREDICTION_KEYS) for where, row in rows])
    else:
        codes = [_code(row, judge_key, where, 2) for where, row in rows]
        agreed = [_code(row, "same", where, 1) == 1 for where, row in rows] if "same" in rows[0][1] else None
        table = score_judgements(asked, codes, same=agreed, judge=f"codes in {judge_key!r}")
    counts, figures = table.counts(), table.figures()
    result = {"benchmark": "hallusionbench", "judge": table.judge, "counts": counts, "figures": finite(figures)}
    write_result(out, path, {**result, "yes_no": finite(table.yes_no())})
    columns = ["questions", *figures, "unclear", "yes/no diff", "fp"]
    values = [*_texts(figures), str(counts["unclear"]), *(f"{value:.3f}" for value in table.yes_no().values())]
    lines = [f"HallusionBench, judged by {table.judge}, {path}", plain_table([columns, [str(len(table)), *values]])]
    if table.unparsed is not None:
        lines.append(f"unparsed: {table.unparsed} of {len(table)} (not one of yes and no: unclear)")
    return "\n".join(lines)


def _matched(rows: Rows, questions: Sequence[HallusionQuestion], path: Path) -> Rows:
    """The rows in the order of the questions."""
    keyed = [all(name in row for name in KEY_FIELDS) for _, row in rows]
    if not any(keyed):
        if len(rows) != len(questions):
            raise DataError(
                f"{path} has {len(rows)} answers without {', '.join(KEY_FIELDS)}, the question file "
                f"{len(questions)} questions: give one answer per question, or these fields"
            )
        return rows
    known = {question.key for question in questions}
    found: dict[tuple[str, ...], tuple[str, Mapping[str, Any]]] = {}
    for (where, row), complete in zip(rows, keyed, strict=True):
        if not complete:
            raise DataError(f"{where}: expected {', '.join(KEY_FIELDS)} as on the other lines")
        key = question_key(row)
        if key not in known:
            raise DataError(f"{where}: the question file has no question {'/'.join(key)}")
        if key in found:
            raise DataError(f"{where}: question {'/'.join(key)} is answered already, on {found[key][0]}")
        found[key] = (where, row)
    missing = [question.key for question in questions if question.key not in found]
    if missing:
        raise DataError(
            f"{path} answers {len(found)} of {len(questions)} questions; the first without an answer is "
            f"{'/'.join(missing[0])}"
        )
    return [found[question.key] for question in questions]


def _code(row: Mapping[str, Any], key: str, where: str, largest: int) -> int:
    value = str(row.get(key)).strip()
    if value not in [str(code) for code in range(largest + 1)]:
        raise DataError(f"{where}: expected {key!r} from 0 to {largest}, found {row.get(key)!r}")
    return int(value)


def _texts(figures: Mapping[str, float]) -> list[str]:
    return [number(value, percent=False) for value in figures.values()]


def _rows(groups: Mapping[str, Mapping[str, Any]]) -> Sequence[list[str]]:
    return [[name, *_texts(figures)] for name, figures in groups.items()]
