"""What the questions about an image share is read once, and the answers are those of whole prompts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families.saved_llava import build_coco_folder, build_tiny_llava
from run_folders import answers_of

import vlmfix
from vlmfix.cli import main
from vlmfix.errors import UnsupportedFeatureError
from vlmfix.evals.run import prefixes

METHODS = ("pai", "var", "vhr")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    build_tiny_llava(folder / "m", layers=3)
    build_coco_folder(folder / "c", num_images=4)
    return folder


def run(home: Path, out: Path, *more: object) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """The answers by key, and what ``config.json`` says about prefixes."""
    words = ["eval", "--model", home / "m", "--data", home / "c", "--out", out, "--max-new-tokens", 6]
    words += ["--pope-max-new-tokens", 2, "--batch-size", 7, "--method", *METHODS, "--no-controls", *more]
    assert main([str(word) for word in words]) == 0
    return answers_of(out), json.loads((out / "config.json").read_text(encoding="utf-8"))["runtime"]["prefixes"]


@pytest.fixture(scope="module")
def whole(home: Path) -> dict[str, dict[str, Any]]:
    """The answers to whole prompts."""
    answers, said = run(home, home / "whole", "--no-share-prefixes")
    assert said == {"shared": False}
    return answers


def test_answers_are_those_of_whole_prompts(
    home: Path, whole: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    stock = vlmfix.shared_prefix

    def counted(model: Any, inputs: Any) -> Any:
        read.append(len(inputs["input_ids"]))
        return stock(model, inputs)

    monkeypatch.setattr(vlmfix, "shared_prefix", counted)
    found, said = run(home, tmp_path / "run")
    assert found.keys() == whole.keys()
    for key, record in found.items():
        for name, value in record.items():
            expected = whole[key][name]
            assert value == (pytest.approx(expected, abs=1e-3) if name in ("score", "eos_gaps") else expected)
    assert said["shared"] and set(said["differences"]) == {"none", "pai", "var"}
    assert all(0 <= difference < 1e-4 for difference in said["differences"].values())
    assert set(said["whole"]) == {"vhr"}, "its heads are scaled in the rows of the image too"
    asked = sum(record["method"] == "none" for record in found.values())
    assert sum(read) < asked, "none and pai share one prefix, and all questions of a batch about an image"


@pytest.mark.parametrize("way", ["differs", "cannot"])
def test_where_prefixes_cannot_be_shared_whole_prompts_are_read(
    way: str, home: Path, whole: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(model: Any, inputs: Any) -> Any:
        raise UnsupportedFeatureError("it has windows")

    if way == "differs":
        monkeypatch.setattr(prefixes, "TOLERANCE", {torch.float32: -1.0})
    else:
        monkeypatch.setattr(vlmfix, "shared_prefix", refused)
    found, said = run(home, tmp_path / "run")
    assert found == whole, "to the last bit"
    if way == "differs":
        assert "more than rounding" in said["whole"]["pai"]
    else:
        assert said == {"shared": False, "reason": "it has windows"}
