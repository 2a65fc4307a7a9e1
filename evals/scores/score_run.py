"""From answers to figures: counts, paired differences to ``none``, controls and verdicts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..benchmarks.columns import BY_KEY, METRICS
from ..benchmarks.registry import Tasks
from ..data.samples import Answers
from ..run.methods import MethodSpec
from ..stats.intervals import CONFIDENCE, RESAMPLES, interval_dict
from .controls import ControlTables, Tables, control_lines, curve_points, defined, make_early_stop
from .counts import count_run
from .differences import correct_controls, correct_rows, difference


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
        The scores' part of ``results.json``: ``methods``, ``controls``, ``early_stop_curve``, ``intervals`` and
        ``corrections``; and ``counts``, the benchmarks of ``counts.json``.
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
                if (found := tables.get(metric.benchmark)) and defined(metric, found.values())
            }
        rows.append(row)
    changed = {(str(row["label"]), task.name): row[task.name]["changed"] for row in rows for task in tasks.tasks}
    kept: ControlTables = {}
    early_stop = make_early_stop(tasks.chair, answers[baseline], decode) if controls else None
    compared: list[dict[str, Any]] = []
    if controls:
        found = {task.name: task.stopper(answers[baseline], decode) for task in tasks.tasks}
        stoppers = {name: stopper for name, stopper in found.items() if stopper is not None}
        compared = control_lines(methods, tables, early_stop, seed, kept, stoppers)
    for control in compared:
        if not changed[control["method"], BY_KEY[control["metric"]].benchmark]:
            control["verdict"] = "unchanged"
    correct_controls(compared)
    return {
        "methods": rows,
        "controls": compared,
        "early_stop_curve": curve_points(early_stop),
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
