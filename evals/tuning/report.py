"""What a search found, on the images it chose on and on those it did not see, side by side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..columns import BY_KEY, figure
from ..tables import difference_cell, interval_cell, number, plain_table
from .rule import Goal

SHOWN = ("chair.chair_i", "chair.chair_s", "chair.recall", "chair.f1", "pope.accuracy", "pope.f1", "pope.yes_ratio")


def recipe_text(
    calibration: Mapping[str, Any], heldout: Mapping[str, Any], label: str, baseline: Goal
) -> dict[str, Any]:
    """The part of a recipe that says how its setting did: ``calibration``, ``heldout``, and all settings tried.

    Args:
        calibration: Results of the run that chose.
        heldout: Results of the run that confirms; its row ``chosen`` is the setting.
        label: The chosen row of ``calibration``.
        baseline: The goal without a method.
    """
    return {
        "goal": baseline.name,
        "calibration": _figures(calibration, label),
        "heldout": _figures(heldout, "chosen"),
        "grid": [
            {**row["params"], **{key: value for key in SHOWN if (value := figure(row, BY_KEY[key])) is not None}}
            for row in calibration["methods"]
        ],
        "versions": heldout["settings"]["versions"],
        "model": {"name": heldout["model"], **heldout["settings"]["model"]},
    }


def _figures(results: Mapping[str, Any], label: str) -> dict[str, Any]:
    rows = {row["label"]: row for row in results["methods"]}
    own, none = rows[label], results["methods"][0]
    found = {}
    for key in SHOWN:
        value = figure(own, BY_KEY[key])
        if value is not None:
            found[key] = {"none": figure(none, BY_KEY[key]), "value": value, "difference": own["differences"].get(key)}
    return {"data": results["data"], "command": results["command"], "figures": found}


def tuning_table(recipe: Mapping[str, Any]) -> str:
    """The chosen setting on both sets of images: figures, paired differences to none, and their 95 % intervals."""
    rows = [
        ["", "calibration", "", "", "", "held out", "", "", ""],
        ["", *["none", "chosen", "difference", "95 %"] * 2],
    ]
    for key in recipe["heldout"]["figures"]:
        metric = BY_KEY[key]
        cells: list[str] = []
        for side in ("calibration", "heldout"):
            found = recipe[side]["figures"][key]
            difference = found["difference"]
            cells += [number(found["none"], percent=metric.percent), number(found["value"], percent=metric.percent)]
            cells += [
                difference_cell(difference, percent=metric.percent),
                interval_cell(difference, percent=metric.percent),
            ]
        rows.append([f"{metric.benchmark.upper()} {metric.title.removeprefix('CHAIR_')}", *cells])
    tried = recipe["settings_tried"]
    return (
        f"{plain_table(rows)}\n\nThe calibration side is the best of {tried} settings on these very images, so it "
        "flatters; the held-out side is what to expect."
    )
