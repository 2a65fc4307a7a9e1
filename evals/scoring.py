"""From answers to figures: counts, paired differences to ``none``, controls and verdicts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .columns import BY_KEY, METRICS, Metric
from .config import MethodSpec
from .controls import early_stop_control, yes_bias_control
from .counting import count_run, invented_by_category, text_table
from .differences import difference
from .intervals import CONFIDENCE, RESAMPLES
from .metrics.chair import ChairTable, score_captions
from .metrics.pope import PopeTable, score_answers
from .quality import (
    correct_controls,
    correct_rows,
    interval_dict,
    length_matched,
    paired_answers,
    text_differences,
    text_quality,
)
from .samples import Answer
from .tables import finite
from .tasks import ChairTask, PopeTask, Tasks

Answers = Mapping[tuple[str, int, str], Answer]
#: Benchmark -> method label -> name of a control -> its table; filled while the controls are compared.
ControlTables = dict[str, dict[str, dict[str, Any]]]


def score_run(
    tasks: Tasks,
    methods: Sequence[MethodSpec],
    answers: Mapping[str, Answers],
    *,
    decode: Callable[[list[int]], str],
    controls: bool = True,
    seed: int = 0,
) -> dict[str, Any]:
    """Score every method and compare it with ``none`` and with its controls.

    Args:
        tasks: What was asked.
        methods: Rows, the baseline first.
        answers: Method label to its answers by (benchmark, image id, question).
        decode: Token ids to text, for the early-stop control.
        controls: Whether to compare with the controls.
        seed: Seed of the bootstrap.

    Returns:
        The scores' part of ``results.json``: ``methods``, ``controls``, ``intervals`` and ``corrections``; and
        ``counts``, the benchmarks of ``counts.json``.
    """
    chair = {spec.label: _chair_table(tasks.chair, answers[spec.label]) for spec in methods} if tasks.chair else {}
    pope = {spec.label: _pope_table(tasks.pope, answers[spec.label]) for spec in methods} if tasks.pope else {}
    text = {spec.label: text_table(tasks.chair, answers[spec.label]) for spec in methods} if tasks.chair else {}
    baseline = methods[0].label
    rows: list[dict[str, Any]] = []
    for spec in methods:
        row: dict[str, Any] = {
            "label": spec.label,
            "describe": spec.describe(),
            "params": dict(spec.params),
            "role": spec.role,
            "parent": spec.parent,
        }
        if tasks.chair:
            row["chair"] = _chair_part(tasks.chair, chair[spec.label], answers[spec.label], answers[baseline])
            row["chair"]["text_quality"] = _quality_part(tasks.chair, spec.label, answers, chair, seed)
            row["chair"]["invented"] = invented_by_category(chair[spec.label])
            if spec.label != baseline:
                row["chair"]["text_quality"]["differences"] = text_differences(text[spec.label], text[baseline], seed)
        if tasks.pope:
            row["pope"] = _pope_part(tasks.pope, pope[spec.label], answers[spec.label], answers[baseline])
            if spec.label != baseline:
                distinct = _distinct_questions(tasks.pope)
                row["pope"]["paired"] = paired_answers(pope[spec.label], pope[baseline], distinct, seed)
        if spec.label != baseline:
            row["differences"] = {
                metric.key: interval_dict(difference(metric, tables[spec.label], tables[baseline], seed))
                for metric in METRICS
                if (tables := chair if metric.benchmark == "chair" else pope) and _defined(metric, tables.values())
            }
        rows.append(row)
    changed = {
        (str(row["label"]), metric.benchmark): row[metric.benchmark]["changed"]
        for row in rows
        for metric in METRICS
        if metric.benchmark in row
    }
    kept: ControlTables = {}
    compared = _controls(tasks, methods, answers, chair, pope, decode, seed, kept) if controls else []
    for control in compared:
        if not changed[control["method"], BY_KEY[control["metric"]].benchmark]:
            control["verdict"] = "unchanged"
    correct_controls(compared)
    return {
        "methods": rows,
        "controls": compared,
        "intervals": {
            "confidence": CONFIDENCE,
            "resamples": RESAMPLES,
            "resampled": "images",
            "method": "percentile bootstrap, paired",
        },
        "corrections": correct_rows(rows),
        "counts": count_run(tasks, {"chair": chair, "pope": pope, "text": text}, kept),
    }


def _key(task: PopeTask, question: Any) -> tuple[str, int, str]:
    return ("pope", question.image_id, task.prompt_text(question))


def _chair_table(task: ChairTask, answers: Answers) -> ChairTable:
    return score_captions(_captions(task, answers), task.truth, task.matcher)


def _captions(task: ChairTask, answers: Answers) -> dict[int, str]:
    return {s.image_id: answers[s.benchmark, s.image_id, s.question].text for s in task.samples}


def _quality_part(
    task: ChairTask, label: str, answers: Mapping[str, Answers], tables: Mapping[str, ChairTable], seed: int
) -> dict[str, Any]:
    baseline = next(iter(tables))
    own, other = _captions(task, answers[label]), _captions(task, answers[baseline])
    truncated = {s.image_id: answers[label][s.benchmark, s.image_id, s.question].truncated for s in task.samples}
    part = text_quality(own, truncated)
    if label != baseline:
        pair = (tables[label], tables[baseline])
        part["length_matched"] = length_matched((own, other), pair, task.truth, task.matcher, seed)
    return part


def _distinct_questions(task: PopeTask) -> list[int]:
    """Rows of the first occurrence of every question: the splits share their positives, asked only once."""
    first: dict[tuple[str, int, str], int] = {}
    for row, question in enumerate(task.questions):
        first.setdefault(_key(task, question), row)
    return list(first.values())


def _pope_table(task: PopeTask, answers: Answers) -> PopeTable:
    given = [answers[_key(task, question)] for question in task.questions]
    scores = [answer.score for answer in given if answer.score is not None]
    # One missing score (a method that overflows, a vocabulary without a yes token) leaves the table without any.
    return score_answers(
        task.questions, [answer.text for answer in given], scores=scores if len(scores) == len(given) else None
    )


def _chair_part(task: ChairTask, table: ChairTable, answers: Answers, baseline: Answers) -> dict[str, Any]:
    keys = [(s.benchmark, s.image_id, s.question) for s in task.samples]
    return {
        "counts": {**table.counts(), "words": int(table.words.sum())},
        "summary": finite(table.summary()),
        "truncated": sum(answers[key].truncated for key in keys),
        "changed": sum(answers[key].tokens != baseline[key].tokens for key in keys),
        "seconds": round(sum(answers[key].seconds for key in keys), 3),
    }


def _pope_part(task: PopeTask, table: PopeTable, answers: Answers, baseline: Answers) -> dict[str, Any]:
    keys = [(s.benchmark, s.image_id, s.question) for s in task.samples]
    splits = list(dict.fromkeys(question.split for question in task.questions))
    part: dict[str, Any] = {
        "parser": table.parser,
        "splits": splits,
        "asked": len(keys),
        "changed": sum(
            (answers[key].text, answers[key].score) != (baseline[key].text, baseline[key].score) for key in keys
        ),
        "seconds": round(sum(answers[key].seconds for key in keys), 3),
        "all": {"counts": table.counts(), "summary": finite(table.summary())},
    }
    f1 = []
    for split in splits:
        questions = [question for question in task.questions if question.split == split]
        own = _pope_table(PopeTask(tuple(questions), task.samples, task.prompt, task.max_new_tokens), answers)
        part[split] = {"counts": own.counts(), "summary": finite(own.summary())}
        f1.append(own.summary()["f1"])
    part["mean_f1_of_splits"] = sum(f1) / len(f1)  # The figure LLaVA prints; the table's F1 pools all questions.
    return part


def _defined(metric: Metric, tables: Any) -> bool:
    return metric.name != "auc" or all(table.score is not None for table in tables)


def _controls(
    tasks: Tasks,
    methods: Sequence[MethodSpec],
    answers: Mapping[str, Answers],
    chair: Mapping[str, ChairTable],
    pope: Mapping[str, PopeTable],
    decode: Callable[[list[int]], str],
    seed: int,
    kept: ControlTables,
) -> list[dict[str, Any]]:
    """Each method against what needs no method: a shifted threshold, or other heads."""
    found: list[dict[str, Any]] = []
    for spec in methods:
        if spec.role != "method":
            continue
        if tasks.chair is not None:
            found += _early_stop(tasks.chair, spec, answers, chair, decode, seed, kept)
        if tasks.pope is not None:
            found += _yes_bias(spec, pope, seed, kept, baseline=methods[0].label)
        for control in methods:
            if control.parent == spec.label:
                name = {"all": "every head", "unselected": "other heads"}[control.params["select"]]
                for metric in METRICS:
                    tables = chair if metric.benchmark == "chair" else pope
                    if (
                        metric.key in ("chair.chair_i", "chair.f1", "pope.auc")
                        and tables
                        and _defined(metric, tables.values())
                    ):
                        found.append(compare(spec.label, name, metric, tables[spec.label], tables[control.label], seed))
    return found


def compare(
    label: str, control: str, metric: Metric, table: Any, other: Any, seed: int, matched: str = ""
) -> dict[str, Any]:
    """One line of the controls: a method's figure, its control's, the paired difference and what follows from it."""
    interval = difference(metric, table, other, seed)
    if interval.low * metric.better > 0 and interval.high * metric.better > 0:
        verdict = "better"
    elif interval.low * metric.better < 0 and interval.high * metric.better < 0:
        verdict = "worse"
    else:
        verdict = "same"
    return {
        "method": label,
        "control": control,
        "matched": matched,
        "metric": metric.key,
        "method_value": finite(table.summary())[metric.name],
        "control_value": finite(other.summary())[metric.name],
        "difference": interval_dict(interval),
        "verdict": verdict,
    }


def _early_stop(
    task: ChairTask,
    spec: MethodSpec,
    answers: Mapping[str, Answers],
    tables: Mapping[str, ChairTable],
    decode: Callable[[list[int]], str],
    seed: int,
    kept: ControlTables,
) -> list[dict[str, Any]]:
    baseline = next(iter(tables))
    given = {s.image_id: answers[baseline][s.benchmark, s.image_id, s.question] for s in task.samples}
    recall = tables[spec.label].summary()["recall"]
    if not recall == recall:  # NaN: nothing to recall in these images.
        return []
    control = early_stop_control(
        {i: answer.tokens for i, answer in given.items()},
        {i: answer.eos_gaps for i, answer in given.items()},
        decode,
        recall,
        task.truth,
        task.matcher,
    )
    kept.setdefault("chair", {}).setdefault(spec.label, {})["early stop"] = control.table
    reached = control.table.summary()["recall"]
    matched = f"recall {100 * recall:.1f}, {100 * reached:.1f}"
    rows = [
        compare(spec.label, "early stop", BY_KEY[key], tables[spec.label], control.table, seed, matched)
        for key in ("chair.chair_i", "chair.chair_s")
    ]
    return [{**row, "bias": control.bias} for row in rows]


def _yes_bias(
    spec: MethodSpec, tables: Mapping[str, PopeTable], seed: int, kept: ControlTables, *, baseline: str
) -> list[dict[str, Any]]:
    if tables[baseline].score is None:
        return []
    ratio = tables[spec.label].summary()["yes_ratio"]
    control = yes_bias_control(tables[baseline], ratio)
    kept.setdefault("pope", {}).setdefault(spec.label, {})["yes bias"] = control.table
    matched = f"yes {100 * ratio:.1f}, {100 * control.table.summary()['yes_ratio']:.1f}"
    row = compare(spec.label, "yes bias", BY_KEY["pope.accuracy"], tables[spec.label], control.table, seed, matched)
    return [{**row, "bias": control.bias}]
