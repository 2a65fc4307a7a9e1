"""--method all: what a model takes, what it does not and why, and the run of all of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from families.saved_llava import build_coco_folder, build_tiny_llava

import vlmfix
from vlmfix.cli import main
from vlmfix.errors import MethodError
from vlmfix.evals.options import EvalOptions
from vlmfix.evals.run.methods import every_method, expand_all, plan_methods
from vlmfix.methods.registry import method_names


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_llava(tmp_path_factory.mktemp("model") / "m", layers=4)


@pytest.fixture(scope="module")
def config(model_folder: Path) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(model_folder)


def test_taken_and_refused_are_what_patching_the_real_model_says(model_folder: Path, config: Any) -> None:
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(model_folder)
    takes, refused = every_method(config, {})
    assert sorted([*takes, *refused, "none"]) == sorted(method_names())
    assert {"vhr", "var", "pai"} <= set(takes) and {"adaiat", "allpath", "cmai"} <= set(refused)
    for name in takes:
        with vlmfix.patched(model, name):
            pass
    assert refused.pop("opera") == "it searches beams, and the answers of a run are greedy"
    for name, reason in refused.items():
        with pytest.raises(MethodError) as raised, vlmfix.patched(model, name):
            pass
        assert str(raised.value) == reason


def test_known_parameters_are_used(config: Any) -> None:
    takes, refused = every_method(config, {"cmai": {"experimental": True}, "vhr": {"layers": [99]}})
    assert "cmai" in takes and "99" in refused["vhr"]


def test_all_is_replaced_where_it_stands(config: Any) -> None:
    assert expand_all(["vhr", "x.json"], config, {}) == (("vhr", "x.json"), [])
    names, notes = expand_all(["spin", "all", "cmai", "act.json"], config, {})
    assert names[0] == "spin" and names[-2:] == ("cmai", "act.json") and names.count("spin") == 1
    assert any(note.startswith("left out: adaiat needs statistics") for note in notes)
    assert any(note.startswith("left out: opera: it searches beams") for note in notes)
    assert not any("cmai" in note for note in notes), "what is named beside it is not left out"


def test_a_run_of_all_methods(model_folder: Path, tmp_path: Path, capsys: Any) -> None:
    data = build_coco_folder(tmp_path / "c", num_images=4)
    words = ["eval", "--model", model_folder, "--data", data, "--out", tmp_path / "r", "--method", "all"]
    words += ["--max-new-tokens", 6, "--batch-size", 64, "--benchmark", "chair"]
    assert main([str(word) for word in words]) == 0
    text = capsys.readouterr().out
    results = json.loads((tmp_path / "r" / "results.json").read_text())
    labels = [row["label"] for row in results["methods"]]
    assert {"vhr", "pai", "spin"} <= set(labels) and "adaiat" not in labels
    assert any(note.startswith("left out: adaiat needs statistics") for note in results["notes"])
    changed = [row for row in results["methods"][1:] if row["chair"]["changed"]]
    assert results["corrections"]["rows"] == len(changed) > 5, "Holm counts every row that changed something"
    assert text.count("left out: adaiat") == 1, "before the run"
    report = (tmp_path / "r" / "report.md").read_text(encoding="utf-8")
    assert "front" in report and "dominated by" in report
    for name in ("report.md", "report.html"):
        assert "left out: adaiat" in (tmp_path / "r" / name).read_text()


def test_a_search_of_its_own_is_refused_before_anything_runs() -> None:
    with pytest.raises(MethodError, match="greedy"):
        plan_methods(EvalOptions(methods=("opera",)))
