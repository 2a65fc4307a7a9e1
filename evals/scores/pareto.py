"""Hallucination against recall against seconds: which rows of a run are worth having.

A row is dominated if another one is at least as good in all three and better in one. Hallucination and recall are
ratios of counts and compared exactly. Seconds are a row's time as a multiple of the baseline's in the same batch: two
rows differ where their ranges between the quartiles over batches do not touch and their medians differ by more than
five percent; otherwise, and with fewer than four batches, they count as equal. Rows that changed no answer are the
baseline under another name and take no part. The controls that thin ``none``'s own captions
(:mod:`vlmfix.evals.scores.thinned`) take part with every point of their curves: early stop at the seconds of ``none``,
self-verification at those and the time of its questions. What needs no method dominates too.

All of it goes by point estimates: a row may be on the front by chance. The intervals stand beside it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..benchmarks.base import EARLY_STOP, SELF_VERIFICATION
from ..benchmarks.columns import benchmarks_of, value_in
from ..benchmarks.registry import benchmark_class
from ..stats.figures import Figure
from ..tables import Table, difference_cell, interval_cell, number

SECONDS_TIE = 0.05

FEWEST_BATCHES = 4
"""With fewer nothing is known about times."""

LEGEND = (
    "front: no other row is at least as good in hallucination, recall and seconds and better in one. Seconds: times "
    "none's in the same batch, median and quartiles over batches; they differ where quartiles do not overlap and "
    "medians by more than 5 %. early stop: none's captions, ended earlier; self-verification: without what none denies "
    "when asked. It goes by point estimates: mind the intervals."
)


@dataclass(frozen=True)
class Point:
    """What counts in the comparison of rows.

    Attributes:
        label: Of the row.
        hallucination: 0 to 1, less is better.
        recall: 0 to 1, more is better.
        seconds: Time as a multiple of the baseline's, less is better.
        quartiles: Of that over batches; None where the time is taken as it is.
    """

    label: str
    hallucination: float
    recall: float
    seconds: float
    quartiles: tuple[float, float] | None = None

    def dominates(self, other: Point) -> bool:
        """Whether this one is at least as good in all three, and better in one."""
        if self.hallucination > other.hallucination or self.recall < other.recall or other.faster(self):
            return False
        return self.hallucination < other.hallucination or self.recall > other.recall or self.faster(other)

    def faster(self, other: Point) -> bool:
        """Whether this one takes less time for certain (see the module)."""
        own, others = (each.quartiles or (each.seconds, each.seconds) for each in (self, other))
        return own[1] < others[0] and self.seconds < (1 - SECONDS_TIE) * other.seconds


def front(points: Sequence[Point], rivals: Sequence[Point] = ()) -> dict[str, list[str]]:
    """Who dominates each point: label -> labels, in the order given, none for the front.

    Args:
        points: The rows.
        rivals: Points that may dominate and are no rows themselves.
    """
    return {
        point.label: list(dict.fromkeys(o.label for o in (*points, *rivals) if o is not point and o.dominates(point)))
        for point in points
    }


def flat_front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The (recall, hallucination) pairs that no other one beats in both, by rising recall: the line in the plots."""
    return sorted({(x, y) for x, y in points if not any((u >= x and v <= y) and (u, v) != (x, y) for u, v in points)})


def axes(results: Mapping[str, Any]) -> tuple[Figure, Figure] | None:
    """Hallucination and recall of the first benchmark of a run that has both; None if there is none.

    They are the figure that an early stop is matched on, and what a method is compared with it on.
    """
    first = results["methods"][0]
    for name in benchmarks_of(first):
        found = benchmark_class(name).early_stop_figures()
        if found is not None and all(value_in(first, figure) is not None for figure in found):
            return found
    return None


def pareto(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every row with its three figures and who dominates it; empty where no benchmark has both figures.

    Args:
        results: The content of ``results.json``.
    """
    chosen = axes(results)
    if chosen is None:
        return []
    benchmark = chosen[0].benchmark
    points = []
    for row in results["methods"]:
        values = [value_in(row, figure) for figure in chosen]
        part = row.get(benchmark, {})
        copy = "differences" in row and not part.get("changed", 1)
        if values[0] is not None and values[1] is not None and not copy:
            points.append(Point(row["label"], values[0], values[1], *_times(results, row, benchmark)))
    asking = (results.get("self_verification") or {}).get("pace") or 0.0
    rivals = [
        Point(control, hallucination, recall, points[0].seconds + more)
        for control, more in ((EARLY_STOP, 0.0), (SELF_VERIFICATION, asking))
        for bias, recall, hallucination in curve_of(results, control, chosen)
        if bias > 0 and points
    ]
    dominated = front(points, rivals)
    return [
        {
            "label": point.label,
            "hallucination": point.hallucination,
            "recall": point.recall,
            "relative_seconds": point.seconds,
            "front": not dominated[point.label],
            "dominated_by": dominated[point.label],
        }
        for point in points
    ]


CURVES = {EARLY_STOP: "early_stop_curve", SELF_VERIFICATION: "self_verification_curve"}
"""Where ``results.json`` keeps the curves of the controls that thin descriptions."""


def curve_of(
    results: Mapping[str, Any], control: str, chosen: tuple[Figure, Figure]
) -> list[tuple[float, float, float]]:
    """Bias, recall and hallucination along a control's curve, without places where they are undefined.

    Args:
        results: The content of ``results.json``.
        control: One of :data:`CURVES`.
        chosen: Hallucination and recall.
    """
    shown, matched = (each.name for each in chosen)
    found = [(p["bias"], p.get(matched), p.get(shown)) for p in results.get(CURVES[control], ())]
    return [(bias, recall, value) for bias, recall, value in found if recall is not None and value is not None]


def _times(
    results: Mapping[str, Any], row: Mapping[str, Any], benchmark: str
) -> tuple[float, tuple[float, float] | None]:
    """A row's time as a multiple of the baseline's, with quartiles; of runs that kept no pace the ratio of the sums."""
    part, pace = row[benchmark], row[benchmark].get("pace")
    if pace:
        low, high = pace["quartiles"] if pace["batches"] >= FEWEST_BATCHES else (0.0, math.inf)
        return float(pace["median"]), (float(low), float(high))
    whole = results["methods"][0][benchmark]["seconds"]
    return (float(part["seconds"] / whole) if whole else 1.0), None


def front_sentence(results: Mapping[str, Any]) -> str:
    """Who is on the front, with seconds; empty for runs that compare fewer than two methods."""
    found, chosen = pareto(results), axes(results)
    if len(found) < 3 or chosen is None:
        return ""
    best = [f"{p['label']} x {p['relative_seconds']:.2f}" for p in sorted(found, key=_by_hallucination) if p["front"]]
    named = f"{chosen[0].full_title}, {chosen[1].title} and seconds"
    return f"Not dominated in {named}, by point estimates: {', '.join(best) or 'no row, only controls'}."


def _by_hallucination(point: Mapping[str, Any]) -> tuple[float, float]:
    return point["hallucination"], -point["recall"]


def pareto_table(results: Mapping[str, Any]) -> Table | None:
    """Figures with their paired intervals, time as a multiple of the baseline's, and who dominates.

    The front first, then by hallucination; None with fewer than two rows.
    """
    found, chosen = pareto(results), axes(results)
    if len(found) < 2 or chosen is None:
        return None
    by_label = {row["label"]: row for row in results["methods"]}
    rows = [["front", "method", chosen[0].heading, "- none", "95 %", chosen[1].heading, "- none", "95 %", "seconds ↓"]]
    rows[0] += ["quartiles", "dominated by"]
    for point in sorted(found, key=lambda p: (not p["front"], _by_hallucination(p))):
        differences = by_label[point["label"]].get("differences", {})
        cells = ["*" if point["front"] else "", point["label"]]
        for figure, name in zip(chosen, ("hallucination", "recall"), strict=True):
            difference = differences.get(figure.key)
            cells += [number(point[name]), difference_cell(difference), interval_cell(difference)]
        spread = by_label[point["label"]][chosen[0].benchmark].get("pace") or {"batches": 0}
        quartiles = ",".join(f"{end:.2f}" for end in spread["quartiles"]) if spread["batches"] > 1 else ""
        rows.append([*cells, f"x {point['relative_seconds']:.2f}", quartiles, _names(point["dominated_by"])])
    return Table(rows, "Hallucination against recall against seconds", words=(1, -1), notes=(LEGEND,))


def _names(labels: Sequence[str], most: int = 1) -> str:
    more = f" +{len(labels) - most}" if len(labels) > most else ""
    return ", ".join(labels[:most]) + more
