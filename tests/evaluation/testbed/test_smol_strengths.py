"""``smol``: strengths of its methods, and the tables that README shows."""

from __future__ import annotations

import json
from pathlib import Path

import calibrate_testbed as strengths_script
import pytest
import smol_table as table

import vlmfix
from vlmfix.evals.options import EvalOptions
from vlmfix.evals.run.methods import plan_methods, strengths_on
from vlmfix.evals.testbed import RECIPES

ROOT = Path(__file__).resolve().parents[3]


FIGURES = json.loads((ROOT / "evals/testbed/smol/figures.json").read_text(encoding="utf-8"))


def test_smol_runs_at_the_strengths_of_its_recipe() -> None:
    strengths, notes = strengths_on("smol")
    assert {*table.METHODS, *table.HEAD_METHODS} == {*strengths}
    assert "calibration split" in notes[0]
    assert any("sink_threshold" in note and "distribution" in note for note in notes), "how it was set is said"
    specs = {spec.label: spec for spec in plan_methods(EvalOptions(model="smol"), strengths)}
    assert specs["vhr"].params["alpha"] == strengths["vhr"]["alpha"] < vlmfix.VHR().alpha
    assert specs["vhr/all"].params["alpha"] == strengths["vhr"]["alpha"], "a control has the method's strength"
    assert specs["var"].params["sink_threshold"] < vlmfix.VAR().sink_threshold, "20 is out of reach of its tokens"
    assert strengths_on("some/model") == ({}, [])


def test_the_recipe_holds_what_its_rule_chooses_from_its_grid() -> None:
    recipe = json.loads(RECIPES["smol"].read_text(encoding="utf-8"))
    none = recipe["grid"][0]
    assert none["method"] == "none"
    for chosen in recipe["methods"]:
        tried = {str(n): row for n, row in enumerate(recipe["grid"]) if row["method"] == chosen["method"]}
        label, note = strengths_script.choose({"none": none, **tried}, tried)
        assert {key: chosen.get(key) for key in tried[label] if key in chosen} == {
            key: value for key, value in tried[label].items() if key in chosen
        }
        assert not note or f"{chosen['method']}: {note}" in recipe["notes"]


@pytest.mark.parametrize(
    ("rows", "label", "note"),
    [
        ({"a": (0.14, 0.795), "b": (0.12, 0.785), "c": (0.13, 0.795)}, "c", ""),
        ({"a": (0.16, 0.8), "b": (0.17, 0.81)}, "a", "no setting lowers CHAIR_i"),
        ({"a": (0.10, 0.7), "b": (0.12, 0.75)}, "b", "every setting of whole text loses more recall"),
    ],
)
def test_the_rule(rows: dict[str, tuple[float, float]], label: str, note: str) -> None:
    none = {"chair_i": 0.15, "recall": 0.8, "rep_4": 0.04, "cut_off": 0.0}
    found = {key: {**none, "chair_i": chair_i, "recall": recall} for key, (chair_i, recall) in rows.items()}
    assert strengths_script.choose({"none": none, **found}, rows) == (label, note)
    broken = {"z": {**none, "chair_i": 0.01, "rep_4": 0.07}, "y": {**none, "chair_i": 0.01, "cut_off": 0.06}}
    assert strengths_script.choose({"none": none, **broken, **found}, [*broken, *rows]) == (label, note), (
        "broken text wins"
    )
    assert strengths_script.choose({"none": none, **broken}, broken)[0] == "z"


def test_readme_shows_the_figures_as_they_were_written() -> None:
    assert table.opening_table(FIGURES) in (ROOT / "README.md").read_text(encoding="utf-8")
    text = (ROOT / "evals/testbed/README.md").read_text(encoding="utf-8")
    for split in table.SPLITS:
        assert table.captions_table(FIGURES, split) in text
        assert table.questions_table(FIGURES, split) in text


def test_questions_have_kinds(tmp_path: Path) -> None:
    from vlmfix.evals.benchmarks.custom.task import Custom

    table.write_questions("heldout", 2, tmp_path / "q.jsonl")
    asked = Custom.load(str(tmp_path / "q.jsonl"))
    assert {each.row["kind"] for each in asked} <= {*table.KINDS} and len(asked) > 4
    assert all(each.path is not None and each.path.is_file() for each in asked)
    assert all((each.label is not None) == (each.row["kind"] == "relation") for each in asked)
