"""The columns of a run's tables: the declared figures, and how to read them off ``results.json``."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from ..stats.figures import Figure
from .registry import benchmark_class, benchmark_names


def benchmarks_of(method: Mapping[str, Any]) -> list[str]:
    """The benchmarks that a row of ``results.json`` has figures of, in the order of the run."""
    known = set(benchmark_names())
    return [name for name in method if name in known]


def figure_of(key: str) -> Figure:
    """The declared figure of a key such as ``chair.chair_i``.

    Raises:
        VlmfixError: There is no such benchmark.
        KeyError: It has no such figure.
    """
    benchmark, _, name = key.partition(".")
    return benchmark_class(benchmark).figure(name)


def used_figures(results: Mapping[str, Any]) -> list[Figure]:
    """The columns that a run has values for."""
    methods = results["methods"]
    return [
        figure
        for name in benchmarks_of(methods[0])
        for figure in benchmark_class(name).figures
        if figure.column and any(value_in(method, figure) is not None for method in methods)
    ]


def value_in(method: Mapping[str, Any], figure: Figure) -> float | None:
    """A row's value of a figure; None where it has none."""
    part = method.get(figure.benchmark)
    if part is None:
        return None
    summary = part["summary"] if "summary" in part else part["all"]["summary"]  # POPE's of older runs
    value: float | None = summary.get(figure.name)
    return value


def seconds(method: Mapping[str, Any]) -> float:
    """Wall time of a row's answers in ``generate``."""
    return math.fsum(method[name]["seconds"] for name in benchmarks_of(method))


def changed_methods(results: Mapping[str, Any]) -> Iterable[str]:
    """Labels of the methods that changed at least one answer."""
    for method in results["methods"]:
        if any(method[name].get("changed", 0) for name in benchmarks_of(method)):
            yield method["label"]
