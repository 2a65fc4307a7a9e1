"""``scripts/bench.py`` at tiny sizes: that it runs, that it compares like with like, and what its tables say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import bench
import bench_measure
import bench_models
import bench_variants
import pytest
import torch

import vlmfix


@pytest.fixture(scope="module")
def model() -> Any:
    return bench_models.build("tiny", "cpu", torch.float32)


@pytest.fixture(scope="module")
def strong() -> Any:
    """With weights large enough for edits to be seen."""
    model = bench_models.build("tiny", "cpu", torch.float32)
    with torch.no_grad():
        for layer in model.model.language_model.layers:
            for parameter in layer.self_attn.parameters():
                parameter.mul_(4)
    return model


def answer(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    options = {"do_sample": False, "max_new_tokens": 5, "return_dict_in_generate": True, "output_logits": True}
    return torch.stack(model.generate(**inputs, **options).logits)


@pytest.mark.parametrize("options", [[], ["--compiled", "yes"], ["--model", "tiny-qwen"]], ids=" ".join)
def test_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str]) -> None:
    out = tmp_path / "bench.json"
    words = ["--device", "cpu", "--model", "tiny", "--image-tokens", "16", "--text-tokens", "12", "--batch", "1", "2"]
    words += ["--rounds", "2", "--new-tokens", "4", "--only", "eager", "var", "released var", "--out", str(out)]
    assert bench.main([*words, *options]) == 0
    printed = capsys.readouterr().out
    report = json.loads(out.read_text())
    is_qwen = "tiny-qwen" in options
    variants = ["unpatched", "eager", "var"] + ([] if is_qwen else ["released var"])
    assert [setting["batch"] for setting in report["settings"]] == [1, 2]
    for setting in report["settings"]:
        assert list(setting["variants"]) == variants
        assert setting["compiled"] == ("--compiled" in options)
        for name, row in setting["variants"].items():
            assert name in printed
            for part in ("prefill", "decode", "end_to_end"):
                low, middle, high = row[part]["wall_ratio"]
                assert 0 < low <= middle <= high
                assert len(row[part]["all_wall_seconds"]) == 2
        stock = setting["variants"]["unpatched"]
        assert stock["prefill"]["cpu_ratio"] == [1, 1, 1] and stock["memory_ratio"] == 1
        assert stock["end_to_end"]["wall_seconds"] > stock["prefill"]["wall_seconds"]
        assert setting["variants"]["var"]["edited"] > 0
    assert report["machine"]["torch"] == torch.__version__


def test_the_readme_tables(capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "--device",
        "cpu",
        "--model",
        "tiny",
        "--image-tokens",
        "16",
        "48",
        "--text-tokens",
        "12",
        "--readme",
        "--clock",
        "cpu",
    ]
    assert bench.main([*words, "--rounds", "1", "--new-tokens", "4"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("| | prefill | decode, per token | whole answer |") == 2
    for name in ("unpatched (SDPA)", "unpatched (eager)", "`vhr`", "`fia`", "`mma`", "`var` as released", "MiB |"):
        assert name in printed
    assert "--readme" in printed.splitlines()[0]


@pytest.mark.parametrize("name", ["var", "pai", "vhr"])
@pytest.mark.parametrize("batch", [1, 2])
def test_the_released_way_is_the_same_edit(strong: Any, name: str, batch: int) -> None:
    inputs = bench_models.make_inputs(strong, 16, 12, batch)
    stock = answer(bench_variants.make(strong, "unpatched", 16), inputs)
    patched = answer(bench_variants.make(strong, name, 16), inputs)
    released = answer(bench_variants.make(strong, f"released {name}", 16), inputs)
    assert (patched - stock).abs().max() > 1e-4
    torch.testing.assert_close(released, patched, atol=2e-6, rtol=1e-4)


def test_every_variant_acts(strong: Any) -> None:
    inputs = bench_models.make_inputs(strong, 16, 40, 1)
    for name in bench_variants.METHODS:
        copy = bench_variants.make(strong, name, 16)
        answer(copy, inputs)
        acts = bench_variants.edited(copy)
        assert acts is not None
        if not name.startswith("act"):  # no key stands out by 5/N among so few
            assert (acts > 0) == (name != "none"), name


def test_copies_share_weights_and_nothing_else(model: Any) -> None:
    copy = bench_variants.make(model, "pai", 16)
    assert vlmfix.status(model) is None and vlmfix.status(copy) is not None
    theirs = dict(model.named_parameters())
    assert all(each.data_ptr() == theirs[name].data_ptr() for name, each in copy.named_parameters())
    assert bench_variants.make(model, "eager", 16).config.text_config._attn_implementation == "eager"
    assert model.config.text_config._attn_implementation == "sdpa"


def test_an_image_of_several_tiles_and_an_odd_one(model: Any) -> None:
    inputs = bench_models.make_inputs(model, 48, 12, 2)
    assert inputs["pixel_values"].shape[0] == 6
    assert (inputs["input_ids"] == bench_models.IMAGE_ID).sum(1).tolist() == [48, 48]
    with pytest.raises(SystemExit, match="multiples of 16"):
        bench_models.make_inputs(model, 20, 12, 1)
    assert bench_models._grid(2880) == (48, 60)


def test_unknown_variants_are_named(model: Any) -> None:
    with pytest.raises(SystemExit, match="nonsense"):
        bench_variants.names(model, ["nonsense"])
    assert bench_variants.names(model, ["vhr"]) == ["unpatched", "vhr"]


def test_bytes_of_a_decode_step(model: Any) -> None:
    text = model.config.text_config
    layers = sum(p.numel() for p in model.model.language_model.layers.parameters())
    weights = 4 * (layers + text.vocab_size * text.hidden_size)
    keys_and_values = 2 * 3 * 2 * 16 * 4  # layers, key heads, their size, fp32
    assert bench_measure.step_bytes(model, 0, 1) == weights
    assert bench_measure.step_bytes(model, 10, 3) == weights + 30 * keys_and_values
    assert bench_measure.bandwidth(torch.device("cpu"), 2**20) > 0


def test_ratios_are_paired() -> None:
    def timing(seconds: float) -> bench_measure.Timing:
        return bench_measure.Timing(
            wall=dict.fromkeys(bench_measure.PARTS, seconds), cpu=dict.fromkeys(("prefill",), 1)
        )

    stock, mine = [timing(1.0), timing(2.0), timing(4.0)], [timing(1.1), timing(2.2), timing(4.8)]
    assert bench_measure.ratios(mine, stock, "prefill", "wall") == pytest.approx((1.1, 1.1, 1.15))
    assert bench_measure.ratios(mine[:1], stock[:1], "decode", "wall") == pytest.approx((1.1, 1.1, 1.1))


def test_rounds_change_direction_and_drop_the_first() -> None:
    seen: list[str] = []

    def variant(name: str) -> Any:
        return lambda: seen.append(name) or bench_measure.Timing({}, {})

    found = bench_measure.rounds({name: variant(name) for name in "abc"}, 2, lambda text: None)
    assert "".join(seen) == "cbaabccba"
    assert [len(each) for each in found.values()] == [2, 2, 2]
