"""Settings to try, one after the other: the one it starts from, then what a seeded optimiser suggests."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any

from vlmfix.errors import MethodError, VlmfixError, how_to_install
from vlmfix.methods.parameters import Choice, Range, Space
from vlmfix.methods.registry import method_from_dict
from vlmfix.recipes import parse_value

from .rule import Goal

if TYPE_CHECKING:
    from vlmfix.methods.base import Method


_ASKS_PER_SETTING = 10
"""How often the optimiser may repeat itself before a space counts as exhausted."""


_DIGITS = 3
"""Of a number tried: a recipe should be readable, and no figure is known better."""


def space_of(method: Method, fixed: Collection[str], ranges: Collection[str]) -> dict[str, Range | Choice]:
    """Return what is searched: the method's declared space without what is fixed, the user's ranges before its own.

    Args:
        method: Where the search starts.
        fixed: Names of parameters that are not searched.
        ranges: ``parameter=low:high`` or ``parameter=value,value,...``.

    Raises:
        MethodError: The method has no such parameter, a range is none, or nothing is left to search.
    """
    known = sorted(field.name for field in dataclasses.fields(method))
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
        outcome = goal.hallucination, goal.loss(baseline) - margin
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
