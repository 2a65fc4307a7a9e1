"""Hallucination against recall against seconds: which rows of a run are worth having.

A row is dominated if another one is at least as good in all three and better in one. Hallucination and recall are
ratios of counts and compared exactly; seconds are wall times of one run, and those within five percent of each other
count as equal. The early-stop control (``none``'s own captions, ended earlier: :mod:`vlmfix.evals.early_stop`) takes
part with every point of its curve, at the seconds of ``none``: what a bias on the end token gives for nothing dominates
too.

All of it goes by point estimates: a row may be on the front by chance. The intervals stand beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .columns import BY_KEY, Metric, figure
from .tables import difference_cell, interval_cell, number

AXES = (("chair.chair_i", "chair.recall"), ("amber.chair", "amber.cover"))
"""Hallucination and recall of each benchmark that has both."""
SECONDS_TIE = 0.05
EARLY_STOP = "early stop"

LEGEND = (
    "front: no other row is at least as good in hallucination, recall and seconds and better in one (seconds within "
    "5 % count as equal); early stop: none's captions, ended earlier. It goes by point estimates: mind the intervals."
)


@dataclass(frozen=True)
class Point:
    """What counts in the comparison of rows.

    Attributes:
        label: Of the row.
        hallucination: 0 to 1, less is better.
        recall: 0 to 1, more is better.
        seconds: Wall time, less is better.
    """

    label: str
    hallucination: float
    recall: float
    seconds: float

    def dominates(self, other: Point) -> bool:
        """Whether this one is at least as good in all three, and better in one."""
        slower = self.seconds > other.seconds and not _same_time(self.seconds, other.seconds)
        if self.hallucination > other.hallucination or self.recall < other.recall or slower:
            return False
        faster = self.seconds < other.seconds and not _same_time(self.seconds, other.seconds)
        return self.hallucination < other.hallucination or self.recall > other.recall or faster


def _same_time(a: float, b: float) -> bool:
    return abs(a - b) <= SECONDS_TIE * max(a, b)


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


def axes(results: Mapping[str, Any]) -> tuple[Metric, Metric] | None:
    """Hallucination and recall of the first benchmark of a run that has both; None if there is none."""
    for keys in AXES:
        found = [BY_KEY[key] for key in keys if key in BY_KEY]
        if len(found) == len(keys) and all(figure(results["methods"][0], metric) is not None for metric in found):
            return found[0], found[1]
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
        values = [figure(row, metric) for metric in chosen]
        if values[0] is not None and values[1] is not None:
            points.append(Point(row["label"], values[0], values[1], row[benchmark]["seconds"]))
    rivals = [
        Point(EARLY_STOP, point["chair_i"], point["recall"], points[0].seconds)
        for point in results.get("early_stop_curve", ())
        if benchmark == "chair" and point["chair_i"] is not None and point["bias"] > 0 and points
    ]
    dominated = front(points, rivals)
    return [
        {
            "label": point.label,
            "hallucination": point.hallucination,
            "recall": point.recall,
            "seconds": point.seconds,
            "front": not dominated[point.label],
            "dominated_by": dominated[point.label],
        }
        for point in points
    ]


def pareto_rows(results: Mapping[str, Any]) -> list[list[str]]:
    """The table: figures with their paired intervals, seconds per answer and as a multiple, and who dominates.

    Empty with fewer than two rows; the front first, then by hallucination.
    """
    found, chosen = pareto(results), axes(results)
    if len(found) < 2 or chosen is None:
        return []
    by_label = {row["label"]: row for row in results["methods"]}
    base = found[0]["seconds"]
    rows = [["front", "method", chosen[0].heading, "- none", "95 %", chosen[1].heading, "- none", "95 %", "seconds ↓"]]
    rows[0] += ["x none", "dominated by"]
    for point in sorted(found, key=lambda p: (not p["front"], p["hallucination"], -p["recall"])):
        differences = by_label[point["label"]].get("differences", {})
        cells = ["*" if point["front"] else "", point["label"]]
        for metric, name in zip(chosen, ("hallucination", "recall"), strict=True):
            difference = differences.get(metric.key)
            cells += [number(point[name]), difference_cell(difference), interval_cell(difference)]
        ratio = f"{point['seconds'] / base:.2f}" if base else "-"
        rows.append([*cells, f"{point['seconds']:.1f}", ratio, _names(point["dominated_by"])])
    return rows


def _names(labels: Sequence[str], most: int = 1) -> str:
    more = f" +{len(labels) - most}" if len(labels) > most else ""
    return ", ".join(labels[:most]) + more
