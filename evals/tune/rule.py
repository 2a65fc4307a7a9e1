"""Which setting of a method is chosen: the rule is fixed before any setting is tried."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vlmfix.errors import VlmfixError

TOLERANCE = 1e-12
"""Of the margin, against rounding."""


@dataclass(frozen=True)
class Goal:
    """What is lowered, and what must not fall.

    Attributes:
        name: What is lowered, as it is printed.
        hallucination: Its value, a share.
        guards: What must not fall by more than the margin, by name; shares.
    """

    name: str
    hallucination: float
    guards: Mapping[str, float]

    def loss(self, baseline: Goal) -> float:
        """Return the largest fall of a guard below the baseline's, negative if all of them rose."""
        return max(baseline.guards[name] - value for name, value in self.guards.items())


def goal_of(row: Mapping[str, Any]) -> Goal:
    """Read the goal off a row of ``results.json``.

    With captions it is CHAIR_i at the captions' recall (and POPE's accuracy, if both are asked); with POPE alone the
    share of absent objects that are confirmed, at the share of present ones that are.
    """
    guards = {}
    if "pope" in row:
        counts = row["pope"]["all"]["counts"]
        guards["POPE accuracy"] = row["pope"]["all"]["summary"]["accuracy"]
    if "chair" not in row:
        return Goal(
            "POPE false yes",
            counts["FP"] / max(counts["FP"] + counts["TN"], 1),
            {"POPE recall": row["pope"]["all"]["summary"]["recall"]},
        )
    summary = row["chair"]["summary"]
    return Goal("CHAIR_i", _known(summary["chair_i"]), {"CHAIR recall": _known(summary["recall"]), **guards})


def _known(value: float | None) -> float:
    if value is None:
        raise VlmfixError("these captions name no object, or these images show none: give more images with --limit N")
    return value


def admitted(goal: Goal, baseline: Goal, margin: float) -> bool:
    """Return whether no guard falls by more than ``margin`` (a share) below the baseline's."""
    return goal.loss(baseline) <= margin + TOLERANCE


def choose(goals: Sequence[Goal], baseline: Goal, margin: float) -> int | None:
    """Return the index of the admitted setting with the least hallucination, the first of equals; None if none is."""
    best = None
    for index, goal in enumerate(goals):
        least = baseline.hallucination if best is None else goals[best].hallucination
        if admitted(goal, baseline, margin) and goal.hallucination < least:
            best = index
    return best
