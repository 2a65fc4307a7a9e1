"""From answers to figures: counts, paired differences to ``none``, controls and verdicts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..benchmarks.base import EARLY_STOP, SELF_VERIFICATION
from ..benchmarks.registry import Tasks
from ..data.samples import Answers
from ..stats.bootstrap import CONFIDENCE, RESAMPLES
from .controls import ControlTables, Curves, asking_cost, control_lines, curve_points, run_curves
from .counts import count_run
from .verdicts import correct_controls, correct_rows

if TYPE_CHECKING:
    from ..run.methods import MethodSpec


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
        The scores' part of ``results.json``: ``methods``, ``controls``, ``early_stop_curve``,
        ``self_verification_curve``, ``self_verification`` (its cost), ``intervals`` and ``corrections``; and
        ``counts``, the benchmarks of ``counts.json``.
    """
    tables: dict[str, dict[str, Any]] = {
        task.name: {spec.label: task.score(answers[spec.label]) for spec in methods} for task in tasks.tasks
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
            row["differences"] = {}
            for task in tasks.tasks:
                found = tables[task.name]
                row["differences"] |= task.differences(found[spec.label], found[baseline], seed)
        rows.append(row)
    curves: Curves = {}
    kept: ControlTables = {}
    if controls:
        curves, kept = run_curves(tasks.tasks, tables, baseline, answers[baseline], decode)
    compared = control_lines(methods, tables, curves, seed, kept) if controls else []
    changed = {(str(row["label"]), task.name): row[task.name]["changed"] for row in rows for task in tasks.tasks}
    for control in compared:
        if not changed[control["method"], control["metric"].partition(".")[0]]:
            control["verdict"] = "unchanged"
    correct_controls(compared, rows)
    return {
        "methods": rows,
        "controls": compared,
        "early_stop_curve": curve_points(curves, EARLY_STOP),
        "self_verification_curve": curve_points(curves, SELF_VERIFICATION),
        "self_verification": asking_cost(curves, answers[baseline]),
        "intervals": {
            "confidence": CONFIDENCE,
            "resamples": RESAMPLES,
            "resampled": "images",
            "method": "percentile bootstrap, paired",
            "controls": "matched again in every resample",
        },
        "corrections": correct_rows(rows),
        "counts": count_run({**tables, **_side_tables(tasks, methods, answers)}, kept),
    }


def _side_tables(
    tasks: Tasks, methods: Sequence[MethodSpec], answers: Mapping[str, Answers]
) -> dict[str, dict[str, Any]]:
    """What ``counts.json`` keeps beside the benchmarks' tables: name -> label -> table."""
    found: dict[str, dict[str, Any]] = {}
    for task in tasks.tasks:
        for spec in methods:
            for name, table in task.side_tables(answers[spec.label]).items():
                found.setdefault(name, {})[spec.label] = table
    return found
