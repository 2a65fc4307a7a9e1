"""Which settings are tried, and which of them is chosen: by a rule that is fixed before any is tried."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from vlmfix.errors import MethodError, VlmfixError, how_to_install
from vlmfix.methods.parameters import Choice, Range, Space
from vlmfix.methods.registry import method_from_dict
from vlmfix.recipes import parse_value

from ..benchmarks.chair.text_quality import BROKEN_BY

if TYPE_CHECKING:
    from vlmfix.methods.base import Method


_ASKS_PER_SETTING = 10
"""How often the optimiser may repeat itself before a space counts as exhausted."""

_DIGITS = 3
"""Of a number tried: a recipe should be readable, and no figure is known better."""

TOLERANCE = 1e-12
"""Of the margin, against rounding."""


def space_of(method: Method, fixed: Collection[str], ranges: Collection[str]) -> dict[str, Range | Choice]:
    """Return what is searched: the method's declared space without what is fixed, the user's ranges before its own.

    Args:
        method: Where the search starts.
        fixed: Names of parameters that are not searched.
        ranges: ``parameter=low:high`` or ``parameter=value,value,...``.

    Raises:
        MethodError: The method has no such parameter, a range is none, or nothing is left to search.
    """
    known = sorted(field.name for field in fields(method))
    space = {key: value for key, value in method.search_space.items() if key not in fixed}
    for text in ranges:
        key, separator, values = text.partition("=")
        if not separator or key not in known:
            raise MethodError(
                f"--range {text}: expected PARAMETER=LOW:HIGH or PARAMETER=A,B; {method.name} has {', '.join(known)}"
            )
        if key in fixed:
            raise MethodError(f"--range {text}: --set fixes {key}; leave one of them out")
        space[key] = _parse_range(text, values)
    if not space:
        raise MethodError(
            f"nothing is left to search of {method.name}; give --range PARAMETER=LOW:HIGH (it has {', '.join(known)})"
        )
    return space


def _parse_range(text: str, values: str) -> Range | Choice:
    low, colon, high = values.partition(":")
    if not colon or "," in values:
        return Choice(tuple(parse_value(value) for value in values.split(",")))
    try:
        bounds = Range(float(low), float(high))
    except ValueError:
        bounds = Range(math.nan, math.nan)
    if not -math.inf < bounds.low < bounds.high < math.inf:
        raise MethodError(f"--range {text}: expected a smaller and a larger number, such as alpha=1.1:2.0")
    return bounds


class Search:
    """A seeded search over a method's settings (tree-structured Parzen estimators with constraints, by optuna).

    The same seed and the same outcomes give the same settings, so that a run that was killed goes on where it stopped.

    Args:
        start: The first setting; what is not searched stays as it is there.
        space: What is searched.
        seed: Of the optimiser.

    Attributes:
        space: What is searched.

    Raises:
        VlmfixError: optuna is not installed.
    """

    def __init__(self, start: Method, space: Space, *, seed: int) -> None:
        try:
            import optuna
        except ImportError as error:
            raise VlmfixError(f"this needs optuna; type: {how_to_install('tune')}") from error
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._start, self.space = start.to_dict(), space
        self._study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed, n_startup_trials=5))
        self._trial: Any = None
        self._outcomes: dict[str, tuple[float, float]] = {}

    def settings(self, budget: int) -> Iterator[Method]:
        """Yield different settings, at most ``budget``; :meth:`tell` the outcome of each before asking for the next.

        Fewer come when the space has no more, as far as ``10 * budget`` suggestions show.

        Raises:
            MethodError: A range of the user's leaves what the method takes.
        """
        yield method_from_dict(self._start)  # Beside the optimiser: it may lie outside the space.
        for _ in range(budget * _ASKS_PER_SETTING):
            if len(self._outcomes) == budget:
                return
            self._trial = self._study.ask()
            values = {key: _suggest(self._trial, key, space) for key, space in self.space.items()}
            method = method_from_dict({**self._start, **values})
            known = self._outcomes.get(_key(method))
            if known is None:
                yield method
            else:  # Said once more, so that the optimiser looks elsewhere.
                self._say(*known)

    def tell(self, method: Method, goal: Goal, baseline: Goal, margin: float) -> None:
        """Tell the optimiser what came of the setting it suggested last."""
        outcome = goal.hallucination, goal.excess(baseline, margin)
        self._outcomes[_key(method)] = outcome
        if self._trial is not None:
            self._say(*outcome)

    def _say(self, hallucination: float, excess: float) -> None:
        self._trial.set_constraint("loss", excess)
        self._study.tell(self._trial, hallucination)


def _key(method: Method) -> str:
    return json.dumps(method.to_dict(), sort_keys=True)


def _suggest(trial: Any, key: str, space: Range | Choice) -> Any:
    if isinstance(space, Range):
        value = trial.suggest_float(key, space.low, space.high, log=space.log)
        return min(max(float(f"{value:.{_DIGITS}g}"), space.low), space.high)
    # By index: optuna's categories are plain values.
    return space.values[trial.suggest_categorical(key, list(range(len(space.values))))]


@dataclass(frozen=True)
class Goal:
    """What is lowered, and what must not fall.

    Attributes:
        name: What is lowered, as it is printed.
        hallucination: Its value, a share.
        guards: What must not fall by more than the margin, by name; shares.
        text: Rates of captions' repetition, loops and truncation, none of which may break the text; empty without
            captions.
    """

    name: str
    hallucination: float
    guards: Mapping[str, float]
    text: Mapping[str, float] = field(default_factory=dict)

    def excess(self, baseline: Goal, margin: float) -> float:
        """Return by how much the setting loses too much, 0 or less if it does not.

        That is the largest fall of a guard below the baseline's less ``margin`` (a share), or the largest rise of a
        rate of the text above the baseline's less :data:`~vlmfix.evals.benchmarks.chair.text_quality.BROKEN_BY`.
        """
        falls = (baseline.guards[name] - value - margin for name, value in self.guards.items())
        return max(*falls, *(rise - BROKEN_BY for rise in self.rises(baseline).values()))

    def rises(self, baseline: Goal) -> dict[str, float]:
        """Return how far each rate of the text rises above the baseline's."""
        return {name: value - baseline.text[name] for name, value in self.text.items()}


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
    summary, rates = row["chair"]["summary"], row["chair"]["text_quality"]["summary"]
    text = {name: rates[name] for name in ("repetition", "looping", "truncation")}
    return Goal("CHAIR_i", _known(summary["chair_i"]), {"CHAIR recall": _known(summary["recall"]), **guards}, text)


def _known(value: float | None) -> float:
    if value is None:
        raise VlmfixError("these captions name no object, or these images show none: give more images with --limit N")
    return value


def admitted(goal: Goal, baseline: Goal, margin: float) -> bool:
    """Return whether no guard falls by more than ``margin`` (a share) below the baseline's, and the text holds."""
    return goal.excess(baseline, margin) <= TOLERANCE


def choose(goals: Sequence[Goal], baseline: Goal, margin: float) -> int | None:
    """Return the index of the admitted setting with the least hallucination, the first of equals; None if none is."""
    best = None
    for index, goal in enumerate(goals):
        least = baseline.hallucination if best is None else goals[best].hallucination
        if admitted(goal, baseline, margin) and goal.hallucination < least:
            best = index
    return best
