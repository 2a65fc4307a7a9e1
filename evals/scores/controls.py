"""Each method of a run beside plain controls: an earlier stop, a shifted threshold, self-verification, other heads."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..benchmarks.base import EARLY_STOP, SELF_VERIFICATION, THINNING, YES_BIAS, Benchmark
from ..benchmarks.registry import benchmark_class
from ..benchmarks.yes_no import question_rows
from ..data.samples import Answers
from ..stats.bootstrap import RESAMPLES, Interval, finite, interval_dict
from ..stats.figures import Figure, SumStatistic
from ..stats.table import Table
from .bias_curves import BiasCurve, Thinned, YesBias
from .lengths import WORDS, at_length
from .thinned import thinned_versions

if TYPE_CHECKING:
    from ..run.methods import MethodSpec

#: Benchmark -> method label -> table.
Tables = Mapping[str, Mapping[str, Any]]

#: Benchmark -> method label -> name of a control -> its table.
ControlTables = dict[str, dict[str, dict[str, Table]]]

#: Benchmark -> name of a control -> the baseline under every bias.
Curves = Mapping[str, Mapping[str, BiasCurve]]

HEAD_CONTROLS = {"all": "every head", "unselected": "other heads"}


def bias_curves(name: str, baseline: Table | None, versions: Mapping[str, Sequence[Table]]) -> dict[str, BiasCurve]:
    """The controls of a benchmark: name -> the baseline under every bias.

    Args:
        name: The benchmark.
        baseline: The baseline's table; None where nobody could score its answers.
        versions: Control -> the same with less in its descriptions (see :mod:`vlmfix.evals.scores.thinned`).
    """
    wanted = benchmark_class(name).matched_on
    curves: dict[str, BiasCurve] = {}
    for control, tables in versions.items():
        if EARLY_STOP in wanted and not math.isnan(_matched(name, control).statistic.of(tables[0])):
            curves[control] = Thinned(tables)
    if YES_BIAS in wanted and baseline is not None:
        rows = question_rows(baseline)
        scores = baseline.columns.get("score", baseline.columns.get("margin"))
        if scores is not None and len(rows) and np.isfinite(scores[rows]).all():
            curves[YES_BIAS] = YesBias(baseline, rows, scores[rows])
    return curves


def run_curves(
    tasks: Sequence[Benchmark], tables: Tables, baseline: str, answers: Answers, decode: Callable[[list[int]], str]
) -> tuple[Curves, ControlTables]:
    """The controls of a run.

    Args:
        tasks: What was asked.
        tables: Benchmark to label to table.
        baseline: Label of the baseline.
        answers: The baseline's.
        decode: Token ids to text.

    Returns:
        The curves; and the tables of the thinned versions, for ``counts.json``, which is all that is needed to match
        them again on some of the images.
    """
    curves: dict[str, dict[str, BiasCurve]] = {}
    kept: ControlTables = {}
    for task in tasks:
        versions = thinned_versions(task, answers, decode) if EARLY_STOP in task.matched_on else {}
        table = tables[task.name][baseline]
        curves[task.name] = bias_curves(task.name, table, versions)
        for control, found in versions.items():
            if control in curves[task.name]:
                kept.setdefault(task.name, {}).setdefault(baseline, {}).update(_stored(control, found))
    return curves, kept


def _stored(control: str, versions: Sequence[Table]) -> dict[str, Table]:
    """Versions by name, with the columns that any of them changes."""
    changing = [
        name
        for name, values in versions[0].columns.items()
        if name == "knob" or any(not _equal(values, table.columns[name]) for table in versions)
    ]
    return {
        f"{control} {number}": Table(
            t.image_ids, {name: t.columns[name] for name in changing}, t.splits, t.items, t.truth
        )
        for number, t in enumerate(versions)
    }


def _equal(a: NDArray[Any], b: NDArray[Any]) -> bool:
    return np.array_equal(a, b, equal_nan=a.dtype.kind == "f")


def stored_versions(baseline: Table, controls: Mapping[str, Table]) -> dict[str, list[Table]]:
    """The versions that ``counts.json`` keeps, on the rows of the baseline's table, by control; none of older runs."""
    found: dict[str, list[Table]] = {}
    for control in THINNING:
        while (table := controls.get(f"{control} {len(found.get(control, ()))}")) is not None:
            columns = {**baseline.columns, **table.columns}
            if "stop_bias" in columns:  # Its name in older runs.
                columns["knob"] = columns.pop("stop_bias")
            version = Table(baseline.image_ids, columns, baseline.splits, baseline.items, baseline.truth)
            found.setdefault(control, []).append(version)
    return found


def curve_points(curves: Curves, control: str) -> list[dict[str, Any]]:
    """The curve of a control that thins descriptions, of the first benchmark that has one, for ``results.json``.

    Where descriptions have a length, a point also has its ``words``, and ``of_length``: the baseline's figures at that
    length by regression (:mod:`vlmfix.evals.scores.lengths`).
    """
    for name, found in curves.items():
        curve = found.get(control)
        figures = benchmark_class(name).early_stop_figures()
        if isinstance(curve, Thinned) and figures is not None:
            shown, matched = (_sums(figure) for figure in figures)
            names = [figures[1].name, figures[0].name, "words"]
            start = curve.table(0)
            has_length = WORDS.is_defined(start)
            points = []
            for bias, *values in curve.points(matched, [shown, *([WORDS] if has_length else [])]):
                point: dict[str, Any] = finite({"bias": bias, **dict(zip(names, values, strict=False))})
                if has_length:
                    of_length = at_length(start, matched, [matched, shown], values[-1])
                    point["of_length"] = finite(dict(zip(names, of_length, strict=False)))
                points.append(point)
            return points
    return []


def asking_cost(curves: Curves, answers: Answers) -> dict[str, Any] | None:
    """What self-verification costs beside the descriptions: questions, seconds, and ``pace``, their ratio to theirs.

    Args:
        curves: The controls.
        answers: The baseline's.

    Returns:
        None without this control.
    """
    asked = [answer for answer in answers.values() if answer.asked is not None]
    if not any(SELF_VERIFICATION in found for found in curves.values()):
        return None
    seconds, own = (math.fsum(times) for times in zip(*((a.asked_seconds, a.seconds) for a in asked), strict=True))
    return {
        "captions": len(asked),
        "questions": sum(len(answer.asked or ()) for answer in asked),
        "seconds": round(seconds, 3),
        "pace": round(seconds / own, 3) if own else None,
    }


def control_lines(
    methods: Sequence[MethodSpec], tables: Tables, curves: Curves, seed: int, kept: ControlTables
) -> list[dict[str, Any]]:
    """The lines of the controls' table, without corrections.

    Args:
        methods: Rows, the baseline first.
        tables: Benchmark to label to table.
        curves: The controls that are a bias.
        seed: Of the bootstrap.
        kept: Where the controls' tables go, for ``counts.json``.
    """
    found: list[dict[str, Any]] = []
    compared = [spec for spec in methods if spec.role == "method"]
    n_resamples = resamples_for(len(compared), curves)
    for spec in compared:
        for benchmark, by_name in curves.items():
            for control, curve in by_name.items():
                own = tables[benchmark][spec.label]
                lines, table = bias_lines(spec.label, benchmark, control, curve, own, seed, n_resamples)
                found += lines
                if table is not None:
                    kept.setdefault(benchmark, {}).setdefault(spec.label, {})[control] = table
        for other in methods:
            if other.parent == spec.label:
                found += head_lines(spec.label, other.label, str(other.params["select"]), tables, seed)
    return found


def resamples_for(methods: int, curves: Curves) -> int:
    """How many resamples a run's controls need.

    All their lines are corrected as one family, and no p-value is below 2 / (resamples + 1): with too few of them
    nothing could be rejected among many methods.

    Args:
        methods: How many methods are compared with their controls.
        curves: The controls.
    """
    lines = sum(len(_compared_with(name, control)) for name, found in curves.items() for control in found)
    return max(RESAMPLES, 60 * methods * lines)


def bias_lines(
    label: str,
    benchmark: str,
    control: str,
    curve: BiasCurve,
    table: Table | None,
    seed: int,
    n_resamples: int = RESAMPLES,
) -> tuple[list[dict[str, Any]], Table | None]:
    """A method against the baseline under a bias, which is matched again in every resample.

    Args:
        label: The method.
        benchmark: The benchmark.
        control: Name of the control.
        curve: The baseline under every bias.
        table: The method's table.
        seed: Of the bootstrap.
        n_resamples: Of the bootstrap.

    Returns:
        A line per figure, and the control's table where it is matched on all images; nothing where the figure to match
        is undefined.
    """
    matched = _matched(benchmark, control)
    if table is None or math.isnan(target := matched.statistic.of(table)):
        return [], None
    place = curve.nearest(_sums(matched), target)
    other = curve.table(place)
    figures = _compared_with(benchmark, control)
    statistics = [_sums(figure) for figure in figures]
    intervals = curve.differences(_sums(matched), table, statistics, seed=seed, n_resamples=n_resamples)
    told = matched_on(control, benchmark, table, other)
    lines = [
        {**line(label, control, figure, table, other, interval, told), "bias": float(curve.biases[place])}
        for figure, interval in zip(figures, intervals, strict=True)
    ]
    return lines, other


def stored_lines(
    label: str, benchmark: str, control: str, table: Table, other: Table, seed: int
) -> list[dict[str, Any]]:
    """A method against the table of a control as it was chosen; arguments as of :func:`bias_lines`.

    The choice is held fixed, so the intervals are narrower than they should be.
    """
    told = matched_on(control, benchmark, table, other)
    return [
        line(label, control, figure, table, other, figure.statistic.difference(table, other, seed=seed), told)
        for figure in _compared_with(benchmark, control)
    ]


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
    for name, by_label in tables.items():
        own, other = by_label[label], by_label[control]
        for figure in benchmark_class(name).figures:
            if figure.head_control and defined(figure, (own, other)) and not math.isnan(figure.statistic.of(own)):
                interval = figure.statistic.difference(own, other, seed=seed)
                lines.append(line(label, HEAD_CONTROLS[select], figure, own, other, interval))
    return lines


def defined(figure: Figure, tables: Iterable[Any]) -> bool:
    """Whether every table has the figure."""
    return all(figure.statistic.is_defined(table) for table in tables)


def line(
    label: str, control: str, figure: Figure, table: Table, other: Table, interval: Interval, matched: str = ""
) -> dict[str, Any]:
    """One line of the controls: a method's figure, its control's, the paired difference and what follows from it."""
    towards = sorted(end * figure.better for end in (interval.low, interval.high))
    verdict = "better" if towards[0] > 0 else "worse" if towards[1] < 0 else "same"
    return {
        "method": label,
        "control": control,
        "matched": matched,
        "metric": figure.key,
        **finite({"method_value": figure.statistic.of(table), "control_value": figure.statistic.of(other)}),
        "difference": interval_dict(interval),
        "verdict": verdict,
    }


def matched_on(control: str, benchmark: str, table: Table, other: Table) -> str:
    """What a control was matched on, of the method and of the control: recall, or the share of yes."""
    figure = _matched(benchmark, control)
    own, reached = (100 * figure.statistic.of(each) for each in (table, other))
    return f"{figure.title.lower()} {own:.1f}, {reached:.1f}"


def _compared_with(benchmark: str, control: str) -> list[Figure]:
    """What a method is compared with a control on; what it is compared with other heads on too comes first."""
    figures = [figure for figure in benchmark_class(benchmark).figures if figure.control == _declared(control)]
    return sorted(figures, key=lambda figure: not figure.head_control)


def _matched(benchmark: str, control: str) -> Figure:
    found = benchmark_class(benchmark)
    return found.figure(found.matched_on[_declared(control)])


def _declared(control: str) -> str:
    """The control as benchmarks declare it: all that thin descriptions are matched and compared on the same figures."""
    return EARLY_STOP if control in THINNING else control


def _sums(figure: Figure) -> SumStatistic:
    """The figure's statistic; a benchmark whose figure is none of sums has no control on it (see ``Benchmark``)."""
    assert isinstance(figure.statistic, SumStatistic)
    return figure.statistic
