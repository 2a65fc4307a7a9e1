"""What the benchmarks beside CHAIR and POPE print besides their columns: conditions, breakdown, paired answers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from .columns import BENCHMARKS
from .tables import difference_cell, interval_cell, number, p_cell

Rows = list[list[str]]

PAIRED_LEGEND = (
    "yes/no questions; only: those that only the method, or only none, answers right (each distinct question once); p: "
    "exact McNemar test, which takes questions as independent; unparsed: answers without a clear yes or no.",
)


def about_lines(results: Mapping[str, Any]) -> list[str]:
    """One line per benchmark on what was asked and how it was read, with its prompt."""
    first, settings = results["methods"][0], results["settings"]
    asked = [name for name in BENCHMARKS if "about" in first.get(name, {})]
    return [f"{first[name]['about']}; prompt {settings[name]['prompt']!r}" for name in asked]


def breakdowns(results: Mapping[str, Any]) -> Iterator[tuple[str, Rows]]:
    """Benchmark and table of every benchmark that has parts (tasks, dimensions, conditions), the headings first."""
    for name in BENCHMARKS:
        parts = {m["label"]: m[name]["breakdown"] for m in results["methods"] if m.get(name, {}).get("breakdown")}
        if not parts:
            continue
        titles = list(dict.fromkeys(title for part in parts.values() for row in part.values() for title in row))
        rows = [["method", "part", *titles]]
        for label, part in parts.items():
            for row, figures in part.items():
                rows.append([label, row, *(number(figures.get(title), percent=False) for title in titles)])
        yield name, rows


def paired_rows(results: Mapping[str, Any]) -> Rows:
    """McNemar's test and MCC of every method and benchmark with yes/no questions; empty with nothing to compare."""
    reference = results.get("reference", "none")
    rows = [["", "method", "unparsed", f"MCC - {reference}", "95 %", "questions", "only method", f"only {reference}"]]
    rows[0] += ["p", "p (Holm)"]
    for name in BENCHMARKS:
        for method in results["methods"]:
            part = method.get(name, {})
            if "about" not in part or "paired" not in part:
                continue
            row = [name, method["label"], str(part["counts"]["unparsed"])]
            if not part["changed"]:
                rows.append([*row, f"= {reference}", *[""] * 6])
                continue
            test, mcc = part["paired"]["mcnemar"], part["paired"]["mcc"]
            counts = [str(test[key]) for key in ("questions", "only_method", "only_baseline")]
            tested = [p_cell(test["p_value"]), p_cell(test["p_holm"])]
            rows.append([*row, difference_cell(mcc), interval_cell(mcc), *counts, *tested])
    return rows if len(rows) > 1 else []
