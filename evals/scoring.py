"""From answers to figures: counts, paired differences to ``none``, controls and verdicts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from .benchmarks.chair import ChairTask
from .columns import BY_KEY, METRICS, Metric
from .config import MethodSpec
from .controls import early_stop_control, yes_bias_control
from .counting import count_run
from .differences import difference
from .intervals import CONFIDENCE, RESAMPLES
from .quality import correct_controls, correct_rows, interval_dict
from .samples import Answers
from .tables import finite
from .tasks import Tasks

#: Benchmark -> method label -> table.
Tables = Mapping[str, Mapping[str, Any]]

#: Benchmark -> method label -> name of a control -> its table; filled while the controls are compared.
ControlTables = dict[str, dict[str, dict[str, Any]]]

#: What a method is compared on with its head controls.
HEAD_CONTROL_METRICS = ("chair.chair_i", "chair.f1", "pope.auc")


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
    tables: dict[str, dict[str, Any]] = {
        task.name: {spec.label: task.table(answers[spec.label]) for spec in methods} for task in tasks.tasks
    }
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
        for task in tasks.tasks:
            row[task.name] = task.part(spec.label, tables[task.name], answers, seed)
        if spec.label != baseline:
            row["differences"] = {
                metric.key: interval_dict(difference(metric, found[spec.label], found[baseline], seed))
                for metric in METRICS
                if (found := tables.get(metric.benchmark)) and _defined(metric, found.values())
            }
        rows.append(row)
    changed = {(str(row["label"]), task.name): row[task.name]["changed"] for row in rows for task in tasks.tasks}
    kept: ControlTables = {}
    compared = _controls(tasks, methods, answers, tables, decode, seed, kept) if controls else []
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
        "counts": count_run(tasks, {**tables, **_text_tables(tasks, methods, answers)}, kept),
    }


def _text_tables(tasks: Tasks, methods: Sequence[MethodSpec], answers: Mapping[str, Answers]) -> Tables:
    chair = tasks.chair
    return {} if chair is None else {"text": {spec.label: chair.text_table(answers[spec.label]) for spec in methods}}


def _defined(metric: Metric, tables: Iterable[Any]) -> bool:
    """Whether every table has the figure: answers without a judge have no table, answers without scores no AUC."""
    return all(table is not None and (metric.name != "auc" or table.score is not None) for table in tables)


def _controls(
    tasks: Tasks,
    methods: Sequence[MethodSpec],
    answers: Mapping[str, Answers],
    tables: Tables,
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
            found += _early_stop(tasks.chair, spec, answers, tables["chair"], decode, seed, kept)
        if tasks.pope is not None:
            found += _yes_bias(spec, tables["pope"], seed, kept, baseline=methods[0].label)
        for control in methods:
            if control.parent == spec.label:
                name = {"all": "every head", "unselected": "other heads"}[control.params["select"]]
                for metric in (BY_KEY[key] for key in HEAD_CONTROL_METRICS):
                    own = tables.get(metric.benchmark, {})
                    if own and _defined(metric, own.values()):
                        found.append(compare(spec.label, name, metric, own[spec.label], own[control.label], seed))
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
    tables: Mapping[str, Any],
    decode: Callable[[list[int]], str],
    seed: int,
    kept: ControlTables,
) -> list[dict[str, Any]]:
    baseline = next(iter(tables))
    given = {sample.image_id: answers[baseline][sample.key] for sample in task.samples}
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
    spec: MethodSpec, tables: Mapping[str, Any], seed: int, kept: ControlTables, *, baseline: str
) -> list[dict[str, Any]]:
    if tables[baseline].score is None:
        return []
    ratio = tables[spec.label].summary()["yes_ratio"]
    control = yes_bias_control(tables[baseline], ratio)
    kept.setdefault("pope", {}).setdefault(spec.label, {})["yes bias"] = control.table
    matched = f"yes {100 * ratio:.1f}, {100 * control.table.summary()['yes_ratio']:.1f}"
    row = compare(spec.label, "yes bias", BY_KEY["pope.accuracy"], tables[spec.label], control.table, seed, matched)
    return [{**row, "bias": control.bias}]
