"""``smol``: strengths of its methods, and the tables that README shows."""

from __future__ import annotations

import json
from pathlib import Path

import calibrate_testbed as strengths_script
import pytest
import smol_table as table

import vlmfix
from vlmfix.evals.benchmarks.custom.task import Custom
from vlmfix.evals.data.samples import Answer, Sample
from vlmfix.evals.options import EvalOptions
from vlmfix.evals.run.methods import plan_methods, strengths_on
from vlmfix.evals.testbed import OF_SMOL, RECIPES

ROOT = Path(__file__).resolve().parents[3]


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


@pytest.mark.parametrize("name", OF_SMOL)
def test_the_recipe_holds_what_its_rule_chooses_from_its_grid(name: str) -> None:
    recipe = json.loads(RECIPES[name].read_text(encoding="utf-8"))
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
        ({"a": (0.16, 0.8), "b": (0.17, 0.81)}, "a", "no setting lowers CHAIR_i; the lowest is taken"),
        (
            {"a": (0.10, 0.7), "b": (0.12, 0.75)},
            "b",
            "all settings that keep the text whole lose more than a point of recall; the smallest loss is taken",
        ),
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


def test_right_answers_are_told_by_kind(tmp_path: Path) -> None:
    table.write_questions("heldout", 3, tmp_path / "q.jsonl")
    asked = Custom.load(str(tmp_path / "q.jsonl"))
    kinds = [str(each.row["kind"]) for each in asked]
    assert {*kinds} <= {*table.KINDS} and len(asked) > 6 and kinds.count("colour") > 1
    assert all(each.path is not None and each.path.is_file() for each in asked)
    assert all((each.label is not None) == (kind == "relation") for each, kind in zip(asked, kinds, strict=True))
    samples = tuple(Sample("custom", number, None, each.text) for number, each in enumerate(asked))
    given = {sample.key: Answer(str(each.row["answer"])) for sample, each in zip(samples, asked, strict=True)}
    given[samples[kinds.index("colour")].key] = Answer("Plaid.")
    benchmark = Custom(tuple(asked), samples)
    found = benchmark.breakdown(benchmark.score(given))
    assert {kind: row["n"] for kind, row in found.items()} == {kind: kinds.count(kind) for kind in kinds}
    for kind, row in found.items():
        wrong = 100 / kinds.count("colour") if kind == "colour" else 0
        assert row["right"] == pytest.approx(100 - wrong)


def test_the_tables_on_file_are_those_of_the_figures() -> None:
    figures = json.loads((ROOT / "evals/testbed/smol/figures.json").read_text(encoding="utf-8"))
    assert table.opening_table(figures) in (ROOT / "README.md").read_text(encoding="utf-8")
    text = (ROOT / "evals/testbed/README.md").read_text(encoding="utf-8")
    for split in table.SPLITS:
        assert table.captions_table(figures, split) in text
        assert table.questions_table(figures, split) in text


def test_the_tables_of_the_other_seed_are_those_of_its_figures() -> None:
    figures = json.loads((ROOT / "evals/testbed/smol/figures_seed1.json").read_text(encoding="utf-8"))
    text = (ROOT / "evals/testbed/SMOL_SEED1.md").read_text(encoding="utf-8")
    assert table.opening_table(figures, "smol-seed1") in text
    for split in table.SPLITS:
        assert table.captions_table(figures, split) in text


def test_accuracy_of_other_questions_is_not_that_of_pope() -> None:
    difference = {"estimate": -0.004, "low": -0.01, "high": 0.001}
    none = {"estimate": 0.0, "low": 0.0, "high": 0.0}
    found = table._changes({"pope.accuracy": difference, "custom.accuracy": none})
    assert found == {"accuracy": [-0.4, -1.0, 0.1], "custom.accuracy": [0.0, 0.0, 0.0]}
