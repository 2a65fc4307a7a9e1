"""``vlmfix export``: a checkpoint with folded factors has the logits of the patched model."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from client_runs import answer, inputs, picture, stock
from families.tiny_llava import RAGGED, collate, forward

import vlmfix
from vlmfix.cli import main
from vlmfix.clients.export import EXPORT_FILE

LISTS = {"up_heads": [[0, 1], [2, 3]], "down_heads": [[1, 0]], "down": 0.25}
FIXED: list[tuple[str, dict[str, Any], int]] = [
    ("vhr", {"select": "all", "alpha": 1.5, "layers": "1:"}, 2 * 4),
    ("allpath", LISTS, 3),
    ("adhh", {"mode": "always", "heads": [[0, 2], [2, 0]]}, 2),
]


@pytest.mark.parametrize(("name", "parameters", "factors"), FIXED)
def test_logits_are_those_of_the_patched_model(
    processor_folder: Path, tmp_path: Path, name: str, parameters: dict[str, Any], factors: int
) -> None:
    model = stock(processor_folder)
    asked = inputs(processor_folder, picture(0))
    before = model(**asked).logits
    assert vlmfix.export(model, tmp_path, name, **parameters) == factors
    assert torch.equal(model(**asked).logits, before)
    expected = vlmfix.patch(model, name, **parameters)(**asked).logits
    found = stock(tmp_path)(**asked).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert (before - expected).abs().max() > 0.01
    about = json.loads((tmp_path / EXPORT_FILE).read_text())
    assert about["factors"] == factors and about["methods"][0]["method"] == name


def test_several_methods_multiply(tiny: Any, tmp_path: Path) -> None:
    methods = [vlmfix.VHR(select="all", alpha=2.0, layers=[0]), vlmfix.AllPath(**LISTS)]
    vlmfix.export(vlmfix.patch(tiny, "pai"), tmp_path, methods)
    vlmfix.patch(tiny, methods)
    torch.testing.assert_close(
        forward(stock(tmp_path), collate(RAGGED[:1])).logits, forward(tiny, collate(RAGGED[:1])).logits
    )


def test_a_command(processor_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", str(processor_folder), "--out", str(tmp_path)]
    assert main(["export", "vhr", "--set", "select=all", "alpha=3", "layers=:", *words]) == 0
    assert "LlavaForConditionalGeneration with 12 factors" in capsys.readouterr().out
    patched = vlmfix.patch(stock(processor_folder), "vhr", select="all", alpha=3.0, layers=":")
    assert answer(stock(tmp_path), tmp_path, picture(1)) == answer(patched, processor_folder, picture(1))
    assert main(["export", "vhr", "--model", "/nowhere", "--out", str(tmp_path)]) == 2
    assert main(["export", "vhr", "--model", str(processor_folder), "--out", f"{processor_folder}/."]) == 2
    assert "whose weights would be lost" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("vhr", "chooses heads anew for every prompt"),
        ("deco", "decides on the next token"),
        ("spin", "chooses heads anew for every prompt"),
        ("pai", "edits the attention of each prompt"),
        ("vcd", "decides on the next token"),
        ("none", "All factors are 1"),
    ],
)
def test_what_no_weight_holds_is_refused(tiny: Any, tmp_path: Path, name: str, reason: str) -> None:
    with pytest.raises(vlmfix.MethodError, match=reason):
        vlmfix.export(tiny, tmp_path, name)
    assert not list(tmp_path.iterdir())


def test_weights_that_take_no_factor_are_refused(tiny: Any, tmp_path: Path) -> None:
    class Packed(torch.nn.Linear):
        """Another layout of weights."""

    model = copy.deepcopy(tiny)
    attention = model.model.language_model.layers[0].self_attn
    attention.o_proj = Packed(attention.o_proj.in_features, attention.o_proj.out_features, bias=False)
    with pytest.raises(vlmfix.UnsupportedFeatureError, match=r"layers\.0\.self_attn\.o_proj is no plain matrix"):
        vlmfix.export(model, tmp_path, "vhr", select="all", layers=":")
