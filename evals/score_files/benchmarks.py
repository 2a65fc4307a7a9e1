"""Score the answers to further benchmarks that lie in a file, whoever generated them; no model is loaded."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from vlmfix.errors import DataError

from ..benchmarks.amber.data import load_amber
from ..benchmarks.amber.figures import score_responses
from ..benchmarks.amber.objects import spacy_similarity
from ..benchmarks.hallusionbench import figures as hallusionbench
from ..benchmarks.hallusionbench.data import KEY_FIELDS, load_hallusionbench
from ..benchmarks.mme import figures as mme
from ..benchmarks.mme.data import OTHER_TASKS, TASKS, MmeAnswer, load_results, parse_label
from ..benchmarks.mmhal import figures as mmhal
from ..benchmarks.mmhal.data import TYPES, MmhalItem, load_mmhal
from ..data.records import read_rows, text_of
from ..data.write import write_text
from ..stats.intervals import finite
from ..tables import number, plain_table
from .chair import write_result

Rows = Sequence[tuple[str, Mapping[str, Any]]]


def matched_rows(
    rows: Rows, wanted: Sequence[tuple[str, ...]], fields: Sequence[str], path: Path, *, subset: bool = False
) -> list[tuple[int, str, Mapping[str, Any]]]:
    """The rows in the order of the questions, found by their key fields, or by order if no row has these.

    Args:
        rows: (place, row) pairs.
        wanted: The key of each question.
        fields: Names of the key's parts.
        path: The file.
        subset: Whether questions may lack an answer.

    Returns:
        Index of the question, place and row of every answer.

    Raises:
        DataError: A row is about no question, two are about one, or a question has none.
    """
    keyed = [all(name in row for name in fields) for _, row in rows]
    if not any(keyed):
        if len(rows) != len(wanted):
            raise DataError(
                f"{path} has {len(rows)} answers without {', '.join(fields)}, and there are {len(wanted)} questions: "
                "give one answer per question in their order, or these fields"
            )
        return [(index, where, row) for index, (where, row) in enumerate(rows)]
    known = set(wanted)
    found: dict[tuple[str, ...], tuple[str, Mapping[str, Any]]] = {}
    for (where, row), complete in zip(rows, keyed, strict=True):
        if not complete:
            raise DataError(f"{where}: expected {', '.join(fields)} as on the other lines")
        key = tuple(str(row[name]) for name in fields)
        if key not in known:
            raise DataError(f"{where}: the question file has no question {'/'.join(key)}")
        if key in found:
            raise DataError(f"{where}: question {'/'.join(key)} is answered already, on {found[key][0]}")
        found[key] = (where, row)
    missing = [key for key in wanted if key not in found]
    if missing and not subset:
        raise DataError(
            f"{path} answers {len(found)} of {len(wanted)} questions; the first without an answer is "
            f"{'/'.join(missing[0])}; --subset scores those that are there"
        )
    return [(index, *found[key]) for index, key in enumerate(wanted) if key in found]


#: Name of a part of a benchmark -> how many of its items are answered, and how many there are.
Parts = Mapping[str, tuple[int, int]]


def answered(parts: Parts) -> dict[str, dict[str, int]]:
    """The parts for JSON."""
    return {name: {"answered": there, "of": total} for name, (there, total) in parts.items()}


def check_whole(parts: Parts, path: Path) -> None:
    """Refuse answers to something else than the whole of every part.

    Raises:
        DataError: A part has fewer answers than items, or more.
    """
    for name, (there, total) in parts.items():
        if there != total:
            raise DataError(
                f"{path} has answers to {there} of {total} {name}: answer them all, leave the task out, or type "
                "--subset to score what is there"
            )


def subset_lines(parts: Parts) -> list[str]:
    """The line that says what a subset lacks; none if every part is whole."""
    lacking = [f"{there} of {total} {name}" for name, (there, total) in parts.items() if there < total]
    return [f"SUBSET: {', '.join(lacking)}; not comparable with figures of the whole"] if lacking else []


def code_of(row: Mapping[str, Any], key: str, where: str, largest: int) -> int:
    """A whole number from 0 to ``largest`` out of a row.

    Raises:
        DataError: It is something else.
    """
    value = str(row.get(key)).strip()
    if value not in [str(code) for code in range(largest + 1)]:
        raise DataError(f"{where}: expected {key!r} from 0 to {largest}, found {row.get(key)!r}")
    return int(value)


_RESPONSE_KEYS = ("response", "answer", "text", "caption")


_PREDICTION_KEYS = ("model_prediction", "answer", "response", "text")


_JUDGEMENT_KEYS = ("judgement", "judgment", "evaluation")


_MODEL_ANSWER_KEYS = ("model_answer", "answer", "response", "text")


_JUDGE_KEYS = ("judge", "gpt4v_output_gpt_check", "correctness")


def score_amber_file(
    path: Path, data_dir: Path, *, spacy_model: str | None = None, subset: bool = False, out: Path | None = None
) -> str:
    """Score AMBER responses.

    Args:
        path: JSON lines (or one JSON list) with ``id`` and ``response`` (or ``answer``, ``text``, ``caption``).
        data_dir: Folder with AMBER's annotations.
        spacy_model: spaCy model of the word similarity (official: ``en_core_web_lg``), or None for exact words only.
        subset: Score the items that have a response, whichever they are; the table says what is missing.
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
    parts = {
        f"{task} items": (
            sum(data.items[i].task == task for i in responses),
            sum(i.task == task for i in data.items.values()),
        )
        for task in dict.fromkeys(item.task for item in data.items.values())
    }
    if not subset:  # A task may be left out as a whole; its groups are not shown then.
        parts = {task: found for task, found in parts.items() if found[0]}
    else:
        data = replace(data, items={i: item for i, item in data.items.items() if i in responses})
    similarity = None if spacy_model is None else spacy_similarity(spacy_model)
    with _about(path):
        table = score_responses(data, responses, similarity=similarity, similarity_name=spacy_model)
    counts, figures, score = table.counts(), table.figures(), table.official_score()
    summary = {} if score is None else {"AMBER": score}
    result = {"benchmark": "amber", "similarity": table.similarity, "counts": counts, "answered": answered(parts)}
    write_result(out, path, {**result, "figures": figures, "summary": summary})
    lines = [f"AMBER, word similarity {table.similarity} (official: en_core_web_lg), {path}", *subset_lines(parts)]
    generative = figures.pop("Generative Task", None)
    if generative is not None:
        columns = ["descriptions", *generative, "empty"]
        lines.append(plain_table([columns, [str(counts["non_hallu_num"]), *_texts(generative), str(counts["empty"])]]))
    if figures:
        lines.append(plain_table([["questions", *next(iter(figures.values()))], *_rows(figures)]))
        lines.append(f"unparsed: {counts['unparsed']} of {counts['qa_correct_num']} (neither 'Yes' nor 'No': wrong)")
    return "\n".join([*lines, *(f"AMBER score: {value:.2f}" for value in summary.values())])


def score_hallusionbench_file(path: Path, questions: Path, *, subset: bool = False, out: Path | None = None) -> str:
    """Score HallusionBench answers.

    Args:
        path: JSON lines (or one JSON list), matched to the questions by their key fields (category, subcategory,
            set_id, figure_id, question_id), or by order if no line has them. Each line has a judge code (``judge``,
            ``gpt4v_output_gpt_check`` or ``correctness``: 0 incorrect, 1 correct, 2 unclear) and perhaps ``same`` (0 or
            1); if no line is judged, the word yes or no of ``model_prediction`` (or ``answer``, ``response``,
            ``text``) is read.
        questions: ``HallusionBench.json``.
        subset: Score the questions that have an answer, whichever they are; a group or a figure counts by its answered
            questions.
        out: Where to write figures and integer counts as JSON, if anywhere.

    Returns:
        A plain-text table.

    Raises:
        DataError: Questions and answers do not match, or only some lines are judged.
    """
    everything = load_hallusionbench(questions)
    found = matched_rows(read_rows(path), [q.key for q in everything], KEY_FIELDS, path, subset=subset)
    asked, rows = [everything[index] for index, _, _ in found], [(where, row) for _, where, row in found]
    parts = {"questions": (len(asked), len(everything))}
    judge_key = next((key for key in _JUDGE_KEYS if key in rows[0][1]), None)
    if judge_key is None:
        judged = next((where for where, row in rows if any(key in row for key in _JUDGE_KEYS)), None)
        if judged is not None:
            raise DataError(f"{judged} has a judge code and {rows[0][0]} has none: judge all lines, or none")
        table = hallusionbench.score_answers(asked, [text_of(row, where, _PREDICTION_KEYS) for where, row in rows])
    else:
        codes = [code_of(row, judge_key, where, 2) for where, row in rows]
        agreed = [code_of(row, "same", where, 1) == 1 for where, row in rows] if "same" in rows[0][1] else None
        table = hallusionbench.score_judgements(asked, codes, same=agreed, judge=f"codes in {judge_key!r}")
    counts, figures = table.counts(), table.percentages()
    result = {"benchmark": "hallusionbench", "judge": table.judge, "counts": counts, "figures": finite(figures)}
    result["answered"] = answered(parts)
    write_result(out, path, {**result, "yes_no": finite(table.yes_no())})
    columns = ["questions", *figures, "unclear", "yes/no diff", "fp"]
    values = [*_texts(figures), str(counts["unclear"]), *(f"{value:.3f}" for value in table.yes_no().values())]
    lines = [f"HallusionBench, judged by {table.judge}, {path}", *subset_lines(parts)]
    lines.append(plain_table([columns, [str(len(table)), *values]]))
    if not table.judged:
        lines.append(f"unparsed: {counts['unparsed']} of {len(table)} (not one of yes and no: unclear)")
    return "\n".join(lines)


def score_mme_file(path: Path, *, parser: str = "official", subset: bool = False, out: Path | None = None) -> str:
    """Score answers to the hallucination subset of MME.

    Args:
        path: Folder of the official tool (``existence.txt``, ...; see ``data.mme.load_results``), or JSON lines (or one
            JSON list) with ``task`` (or ``category``), ``image`` (or ``question_id``), ``question``, ``label`` (yes or
            no) and ``answer`` (or ``response``, ``text``). Other tasks of MME are left out.
        parser: Rule that reads yes or no, see ``metrics.mme.parse_answer``.
        subset: Whether a task may have fewer images than MME has.
        out: Where to write figures and integer counts as JSON, if anywhere.

    Returns:
        A plain-text table, one row per task.

    Raises:
        DataError: A line is broken, a task is incomplete, or a question is answered twice.
    """
    answers = load_results(path) if path.is_dir() else [_mme_answer(row, where) for where, row in read_rows(path)]
    with _about(path):
        whole = mme.score_answers(answers, parser=parser, images=None)  # type: ignore[arg-type]
    tables = whole.tasks()
    parts = {f"images of {task}": (t.counts()["images"], mme.IMAGES_PER_TASK) for task, t in tables.items()}
    if not subset:
        check_whole(parts, path)
    result: dict[str, Any] = {"benchmark": "mme", "parser": parser, "total": whole.total()}
    result["answered"] = answered(parts)
    result["tasks"] = {task: {"counts": t.counts(), "summary": t.summary()} for task, t in tables.items()}
    write_result(out, path, result)
    lines = [["task", "n", "accuracy", "accuracy+", "score (200)", "yes", "unparsed"]]
    for task, table in tables.items():
        c, s = table.counts(), table.summary()
        figures = [number(s["accuracy"]), number(s["accuracy_plus"]), f"{s['score']:.2f}", number(s["yes_ratio"])]
        lines.append([task, str(c["n"]), *figures, str(c["unparsed"])])
    title = f"MME, hallucination subset, parser {parser}, {path}"
    text = "\n".join([title, *subset_lines(parts), plain_table(lines)])
    return text if result["total"] is None else f"{text}\ntotal (800): {result['total']:.2f}"


@contextmanager
def _about(path: Path) -> Iterator[None]:
    """Name the file in an error about its answers as a whole."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{path}: {error}") from error


def _mme_answer(row: Mapping[str, Any], where: str) -> MmeAnswer:
    task = text_of(row, where, ("task", "category"))
    if task not in TASKS and task not in OTHER_TASKS:
        raise DataError(f"{where}: MME has no task {task!r}; its hallucination subset is {', '.join(TASKS)}")
    return MmeAnswer(
        task=task,
        image=text_of(row, where, ("image", "question_id")),
        question=text_of(row, where, ("question",)),
        label=parse_label(text_of(row, where, ("label",)), where),
        answer=text_of(row, where, ("answer", "response", "text")),
    )


def score_mmhal_file(
    path: Path,
    questions: Path,
    *,
    judge: str | None = None,
    requests: Path | None = None,
    subset: bool = False,
    out: Path | None = None,
) -> str:
    """Score judged MMHal-Bench answers, or write what a judge is to be asked about them.

    Args:
        path: JSON lines (or one JSON list, such as the template filled in), matched to the questions by ``index`` (from
            0), or by ``image_id`` and ``question``, or by order if no line has them. Lines with ``rating`` (0 to 6) or
            ``judgement`` (text with "Rating: N") are scored. Lines with ``model_answer`` (or ``answer``, ``response``,
            ``text``) only cannot be: the requests to a judge are written instead.
        questions: ``response_template.json``.
        judge: Name of the judge, for the table.
        requests: Where to write the requests; default the name of ``path`` with ``.judge.jsonl``.
        subset: Take the questions that have an answer, whichever they are.
        out: Where to write figures and integer counts as JSON, if anywhere.

    Returns:
        A plain-text table, or a line that says where the requests are and that there is no score.

    Raises:
        DataError: Questions and answers do not match, or only some lines are judged.
    """
    everything = load_mmhal(questions)
    rows: Rows = read_rows(path)
    by_index = any("index" in row for _, row in rows)
    wanted = [(str(item.index),) if by_index else (item.image_id, item.question) for item in everything]
    fields = ("index",) if by_index else ("image_id", "question")
    found = matched_rows(rows, wanted, fields, path, subset=subset)
    items, rows = [everything[index] for index, _, _ in found], [(where, row) for _, where, row in found]
    parts = {"questions": (len(items), len(everything))}
    judged = [any(row.get(key) is not None for key in ("rating", *_JUDGEMENT_KEYS)) for _, row in rows]
    if not any(judged):
        told = _write_requests(items, rows, requests or path.with_name(path.stem + ".judge.jsonl"), path)
        return "\n".join([told, *subset_lines(parts)])
    if not all(judged):
        raise DataError(f"{rows[judged.index(False)][0]} has no rating or judgement: judge all answers")
    if all("rating" in row for _, row in rows):
        ratings = [code_of(row, "rating", where, mmhal.MAX_RATING) for where, row in rows]
        table = mmhal.score_ratings(items, ratings, judge=judge or "unnamed")
    else:
        texts = [text_of(row, where, _JUDGEMENT_KEYS) for where, row in rows]
        table = mmhal.score_judgements(items, texts, judge=judge or "unnamed")
    counts, summary, by_type = table.counts(), table.summary(), table.by_type()
    result = {"benchmark": "mmhal", "judge": table.judge, "counts": counts, "answered": answered(parts), **summary}
    write_result(out, path, {**result, "by_type": list(by_type.values()), "types_in_order": list(by_type)})
    columns = ["questions", "score (0-6)", "hallucinated", *TYPES, "unparsed"]
    values = [f"{summary['average_score']:.2f}", number(summary["hallucination_rate"])]
    types = [f"{by_type[name]:.2f}" if name in by_type else "-" for name in TYPES]
    hint = "" if judge else " (say who with --judge NAME: the figures depend on it)"
    shown = plain_table([columns, [str(len(table)), *values, *types, str(counts["unparsed"])]])
    return "\n".join([f"MMHal-Bench, judge {table.judge}{hint}, {path}", *subset_lines(parts), shown])


def _write_requests(items: Sequence[MmhalItem], rows: Rows, requests: Path, path: Path) -> str:
    answers = [text_of(row, where, _MODEL_ANSWER_KEYS) for where, row in rows]
    if not any(answer.strip() for answer in answers):
        raise DataError(f"{path}: every answer is empty; fill in 'model_answer'")
    lines = [
        json.dumps({"index": item.index, "prompt": mmhal.judge_prompt(item, answer)})
        for item, answer in zip(items, answers, strict=True)
    ]
    write_text(requests, "\n".join(lines) + "\n")
    return (
        f"MMHal-Bench, {path}: not scored, because a judge must rate the answers (officially gpt-4-0314 at temperature "
        f"0).\nThe {len(lines)} requests are in {requests}. Have 'prompt' of each line answered (the instruction is "
        "ours, not the official one),\nwrite the answers as JSON lines with index and judgement, and score that file "
        "with --judge NAME."
    )


def _texts(figures: Mapping[str, float]) -> list[str]:
    return [number(value, percent=False) for value in figures.values()]


def _rows(groups: Mapping[str, Mapping[str, Any]]) -> Sequence[list[str]]:
    # The JSON file keeps the names as the official script spells them.
    shown = {"Descriminative Task": "All", "Exsitence": "Existence"}
    return [[shown.get(name, name), *_texts(figures)] for name, figures in groups.items()]
