"""Each method of a run beside what needs no method: an earlier stop, a shifted threshold, other heads."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..benchmarks.base import ItemTable, Stopper
from ..benchmarks.chair.early_stop import EarlyStop
from ..benchmarks.chair.task import ChairTask
from ..benchmarks.columns import BY_KEY, Metric
from ..benchmarks.yes_no import PopeTable, yes_bias_control
from ..data.samples import Answers
from ..run.methods import MethodSpec
from ..stats.intervals import finite, interval_dict
from .differences import difference, value

#: Benchmark -> method label -> table.
Tables = Mapping[str, Mapping[str, Any]]


#: Benchmark -> method label -> name of a control -> its table; filled while the controls are compared.
ControlTables = dict[str, dict[str, dict[str, Any]]]


#: What a method is compared on with its early stop, its yes bias and its head controls.
EARLY_STOP_METRICS = {"chair": ("chair.chair_i", "chair.chair_s"), "amber": ("amber.chair", "amber.hal")}


#: Benchmark -> the recall that an early stop is matched on.
_RECALL = {"chair": "recall", "amber": "cover"}


YES_BIAS_METRICS = {
    "pope": "pope.accuracy",
    "amber": "amber.accuracy",
    "mme": "mme.accuracy",
    "hallusionbench": "hallusionbench.aacc",
    "custom": "custom.accuracy",
}


HEAD_CONTROL_METRICS = (
    *("chair.chair_i", "chair.f1", "pope.auc", "sycophancy.accuracy_wrong_hint", "amber.chair", "amber.f1"),
    *("mme.score", "hallusionbench.aacc", "mmhal.average_score", "custom.accuracy", "custom.contains"),
)


HEAD_CONTROLS = {"all": "every head", "unselected": "other heads"}


def defined(metric: Metric, tables: Iterable[Any]) -> bool:
    """Whether every table has the figure: answers without a judge have no table, answers without scores no AUC."""
    return all(
        table is not None and (metric.name != "auc" or getattr(table, "score", None) is not None) for table in tables
    )


def make_early_stop(task: ChairTask | None, answers: Answers, decode: Callable[[list[int]], str]) -> EarlyStop | None:
    """The baseline's captions under every earlier stop; None without captions or without any object to recall.

    Args:
        task: What was captioned, if anything.
        answers: The baseline's, with tokens and stop margins.
        decode: Token ids to text.
    """
    if task is None or not any(task.truth[sample.image_id] for sample in task.samples):
        return None
    given = {sample.image_id: answers[sample.key] for sample in task.samples}
    tokens = {i: answer.tokens for i, answer in given.items()}
    return EarlyStop(tokens, {i: a.eos_gaps for i, a in given.items()}, decode, task.truth, task.matcher)


def curve_points(early_stop: EarlyStop | None) -> list[dict[str, float | None]]:
    """The early-stop curve for ``results.json``."""
    if early_stop is None:
        return []
    return [finite({"bias": p.bias, "recall": p.recall, "chair_i": p.chair_i}) for p in early_stop.curve()]


def control_lines(
    methods: Sequence[MethodSpec],
    tables: Tables,
    early_stop: EarlyStop | None,
    seed: int,
    kept: ControlTables,
    stoppers: Mapping[str, Stopper] = MappingProxyType({}),
) -> list[dict[str, Any]]:
    """The lines of the controls' table, without corrections.

    Args:
        methods: Rows, the baseline first.
        tables: Benchmark to label to table.
        early_stop: The baseline's captions, ended earlier.
        seed: Of the bootstrap.
        kept: Where the controls' tables go, for ``counts.json``.
        stoppers: Benchmark -> its early stop, of those beside CHAIR.
    """
    if early_stop is not None:
        stoppers = {"chair": _chair_stopper(early_stop), **stoppers}
    found: list[dict[str, Any]] = []
    for spec in methods:
        if spec.role != "method":
            continue
        for benchmark, stopper in stoppers.items():
            found += _early_stop(spec, benchmark, tables[benchmark], stopper, seed, kept)
        for benchmark in YES_BIAS_METRICS:
            if benchmark in tables:
                found += _yes_bias(spec, benchmark, tables[benchmark], seed, kept, baseline=methods[0].label)
        for control in methods:
            if control.parent == spec.label:
                found += head_lines(spec.label, control.label, str(control.params["select"]), tables, seed)
    return found


def head_lines(label: str, control: str, select: str, tables: Tables, seed: int) -> list[dict[str, Any]]:
    """A method against the same factor on other heads.

    Args:
        label: The method.
        control: Label of the row with other heads.
        select: Which heads that row scales.
        tables: Benchmark to label to table.
        seed: Of the bootstrap.
    """
    lines = []
    for metric in (BY_KEY[key] for key in HEAD_CONTROL_METRICS):
        own = tables.get(metric.benchmark, {})
        if own and defined(metric, (own[label], own[control])) and not math.isnan(value(metric, own[label])):
            lines.append(compare(label, HEAD_CONTROLS[select], metric, own[label], own[control], seed))
    return lines


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
        **finite({"method_value": value(metric, table), "control_value": value(metric, other)}),
        "difference": interval_dict(interval),
        "verdict": verdict,
    }


def matched_on(name: str, benchmark: str, table: Any, control: Any) -> str:
    """What a control was matched on, of the method and of the control: recall, or the share of yes."""
    figure = _RECALL[benchmark] if name == "early stop" else "yes_ratio"
    word = "yes" if name == "yes bias" else figure
    key = f"{benchmark}.{figure}"
    own, reached = (100 * value(BY_KEY[key], each) for each in (table, control))
    return f"{word} {own:.1f}, {reached:.1f}"


def _early_stop(
    spec: MethodSpec, benchmark: str, tables: Mapping[str, Any], stopper: Stopper, seed: int, kept: ControlTables
) -> list[dict[str, Any]]:
    table = tables[spec.label]
    recall = value(BY_KEY[f"{benchmark}.{_RECALL[benchmark]}"], table)
    if math.isnan(recall):
        return []
    bias, stopped = stopper(recall)
    kept.setdefault(benchmark, {}).setdefault(spec.label, {})["early stop"] = stopped
    matched = matched_on("early stop", benchmark, table, stopped)
    rows = [
        compare(spec.label, "early stop", BY_KEY[key], table, stopped, seed, matched)
        for key in EARLY_STOP_METRICS[benchmark]
    ]
    return [{**row, "bias": bias} for row in rows]


def _chair_stopper(early_stop: EarlyStop) -> Stopper:
    def at(recall: float) -> tuple[float, Any]:
        control = early_stop.at(recall)
        return control.bias, control.table

    return at


def _yes_bias(
    spec: MethodSpec, benchmark: str, tables: Mapping[str, Any], seed: int, kept: ControlTables, *, baseline: str
) -> list[dict[str, Any]]:
    found = _questions(tables[baseline])
    if found is None:
        return []
    rows, stock = found
    table = tables[spec.label]
    control = yes_bias_control(stock, float((table.prediction[rows] == 1).mean()))
    shifted = _as_answers(tables[baseline], rows, control.table)
    kept.setdefault(benchmark, {}).setdefault(spec.label, {})["yes bias"] = shifted
    matched = matched_on("yes bias", benchmark, table, shifted)
    row = compare(spec.label, "yes bias", BY_KEY[YES_BIAS_METRICS[benchmark]], table, shifted, seed, matched)
    return [{**row, "bias": control.bias}]


def _questions(table: Any) -> tuple[NDArray[np.int64], PopeTable] | None:
    """The rows that are yes/no questions, int64 [m], and these as POPE's; None without any, or without their scores."""
    if table is None:
        return None
    if isinstance(table, PopeTable):
        return None if table.score is None else (np.arange(len(table)), table)
    columns = table.columns
    score = columns.get("score", columns.get("margin"))
    if score is None or not {"label", "prediction"} <= columns.keys():
        return None
    rows = np.flatnonzero(columns.get("questions", np.ones(len(table))))
    if not len(rows) or not np.isfinite(score[rows]).all():
        return None
    names = table.question_ids
    return rows, PopeTable(
        image_ids=table.image_ids[rows],
        label=columns["label"][rows],
        prediction=columns["prediction"][rows],
        unparsed=columns["prediction"][rows] < 0,
        score=score[rows],
        parser="score",
        question_ids=tuple(names[i] for i in rows.tolist()),
    )


def _as_answers(table: Any, rows: NDArray[np.int64], answers: PopeTable) -> Any:
    """A table with other answers to its questions, those rows; what is made of several answers is left out."""
    if isinstance(table, PopeTable):
        return answers
    columns = {name: table.columns[name] for name in ("label", "score", "questions", "margin") if name in table.columns}
    for name in ("prediction", "correct"):
        columns[name] = table.columns[name].copy()
        columns[name][rows] = getattr(answers, name)
    return ItemTable(table.image_ids, table.splits, table.items, columns)
