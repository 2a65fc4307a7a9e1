"""Image features that are encoded once give the very bits that a stock model computes anew."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import FAMILIES, available
from families.saved_llava import build_coco_folder, build_tiny_llava

import vlmfix
from vlmfix.cli import main
from vlmfix.errors import UnsupportedFeatureError, UnsupportedModelError
from vlmfix.evals import testbed
from vlmfix.evals.run import models
from vlmfix.evals.run.features import METHOD, ImageFeatures
from vlmfix.evals.run.image_rows import Layout, positions_of, rows_of

REPEATED = [0, 0, 1, 1, 1, 2, 2, 0]
"""Which of three images every row of a batch shows."""


@pytest.fixture(scope="module")
def _testbed() -> Any:
    return models.load_model(models.find_model(testbed.MODEL_DIR), dtype="float32", device="cpu")


@pytest.fixture
def model(_testbed: Any) -> Iterator[Any]:
    yield _testbed
    assert METHOD not in _testbed.model.__dict__ and vlmfix.status(_testbed) is None


@pytest.fixture
def inputs(model: Any) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(3, 3, 96, 96, generator=generator)
    ids = torch.randint(5, 200, (len(REPEATED), 74), generator=generator)
    ids[:, 2:66] = model.config.image_token_id
    return {"input_ids": ids, "pixel_values": images[REPEATED]}


@torch.no_grad()
def logits(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    found: torch.Tensor = model(**inputs).logits
    return found


def kept(model: Any, rows: int = len(REPEATED)) -> ImageFeatures:
    features = ImageFeatures(model)
    features.forget(rows)
    return features


def test_logits_are_bitwise_stock_and_images_are_encoded_once(model: Any, inputs: Any) -> None:
    features = kept(model)
    for method in (None, "vhr", "pai", "act"):
        with vlmfix.patched(model, method or "none"):
            expected = logits(model, inputs)
        with vlmfix.patched(model, method or "none"), features.reused():
            assert torch.equal(logits(model, inputs), expected)
            assert torch.equal(logits(model, {k: v.clone() for k, v in inputs.items()}), expected), "goes by content"
    assert (features.asked, features.encoded) == (8 * 8, 8 + 3), "both ways the first time"
    features.forget(8)
    with features.reused():
        logits(model, inputs)
    assert features.encoded == 8 + 3 + 3, "these sizes were checked"
    assert features.summary()["repeated_in_batch"] == "encoded once"


def test_a_method_inside_the_tower_sees_it_run(model: Any, inputs: Any) -> None:
    method = vlmfix.FIA(alpha=3.0)
    with vlmfix.patched(model, method):
        expected = logits(model, inputs)
    features = kept(model)
    with features.reused():
        stock = logits(model, inputs)
        with vlmfix.patched(model, method):
            assert torch.equal(logits(model, inputs), expected)
        assert torch.equal(logits(model, inputs), stock), "what was kept is still the stock model's"
    assert not torch.equal(stock, expected), "the edit is visible"
    assert features.looked_inside == 8 and features.encoded == 8 + 3 + 8


def test_a_hook_that_changes_features_is_not_kept(model: Any, inputs: Any) -> None:
    features = kept(model)
    with features.reused():
        stock = logits(model, inputs)
        handle = model.model.multi_modal_projector.register_forward_hook(lambda module, args, output: output * 1.5)
        changed = logits(model, inputs)
        handle.remove()
        assert torch.equal(logits(model, inputs), stock)
    assert (changed - stock).abs().max() > 0.01


def test_other_images_are_encoded_anew(model: Any, inputs: Any) -> None:
    features = kept(model)
    other = {**inputs, "pixel_values": inputs["pixel_values"].clone()}
    other["pixel_values"][5, 0, 0, 0] += 1
    with features.reused():
        logits(model, inputs)
        found = logits(model, other)
        inputs["pixel_values"][0] += 1  # the very tensor whose features are kept
        written = logits(model, inputs)
    assert torch.equal(found, logits(model, other))
    assert torch.equal(written, logits(model, inputs))


def test_memory_is_bounded(model: Any, inputs: Any) -> None:
    features = kept(model)
    with features.reused():
        for shift in range(5):
            logits(model, {**inputs, "pixel_values": inputs["pixel_values"] + shift})
    assert sum(len(each.arguments["pixel_values"]) for each in features._kept) == 2 * 8
    assert all(getattr(each.output, "last_hidden_state", None) is None for each in features._kept), (
        "states of the tower are let go"
    )
    features.forget()
    assert not features._kept
    with features.reused():
        logits(model, inputs)
    assert not features._kept, "no room was given"


def test_features_that_were_written_into_are_not_handed_out(model: Any, inputs: Any) -> None:
    features = kept(model)
    expected = logits(model, inputs)
    with features.reused():
        logits(model, inputs)
        for tensor, _ in features._kept[0].tensors[:1]:
            tensor.zero_()
        assert torch.equal(logits(model, inputs), expected)


def test_rows_that_round_with_their_batch_are_all_encoded(
    model: Any, inputs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels may round differently for another number of rows: then repeated images are encoded with the rest."""
    stock = type(model.model).get_image_features

    def rounding(self: Any, pixel_values: torch.Tensor, **more: Any) -> Any:
        output = stock(self, pixel_values=pixel_values, **more)
        rounded = [each + 1e-6 * len(pixel_values) for each in getattr(output, "pooler_output", output)]
        if isinstance(output, list):  # transformers 4
            return rounded
        output.pooler_output = rounded
        return output

    monkeypatch.setattr(type(model.model), METHOD, rounding)
    expected = logits(model, inputs)
    features = kept(model)
    with features.reused():
        assert all(torch.equal(logits(model, inputs), expected) for _ in range(3))
        features.forget(8)
        assert torch.equal(logits(model, inputs), expected)
    assert features.encoded == 8 + 3 + 8
    assert "round differently" in features.summary()["repeated_in_batch"]


def test_time_counts_as_if_nothing_was_reused(model: Any, inputs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that goes by one second per look: every run of the tower takes one."""
    seconds = iter(range(1000))
    monkeypatch.setattr("vlmfix.evals.run.features.time.perf_counter", lambda: float(next(seconds)))
    features = kept(model)
    with features.reused():
        logits(model, inputs)
        assert features.saved == -1.0, "the second way was only a check"
        features.saved = 0.0
        logits(model, inputs)
        assert features.saved == 1.0, "what the eight images took"
        features.saved = 0.0
        features.forget(8)
        logits(model, inputs)
        assert features.saved == pytest.approx(8 / 3 - 1), "five images of three that took a second"


@pytest.mark.families
@pytest.mark.parametrize("name", [family.name for family in FAMILIES])
def test_every_family_is_bitwise_stock(name: str) -> None:
    family = available(name)
    model = family.build()
    first, second = family.sample(seed=1), family.sample(seed=2)
    third = dataclasses.replace(family.sample(seed=3), pixels=first.pixels)
    inputs = family.collate([first, second, third])
    try:
        features = kept(model, 3 * 4)
        with vlmfix.patched(model, "none"):
            expected = family.forward(model, inputs).logits
    except (UnsupportedModelError, UnsupportedFeatureError, AttributeError) as error:
        pytest.skip(f"upstream, transformers {transformers.__version__}: {error}")
    for _ in range(2):
        features.forget(3 * 4)
        for _ in range(2):
            with vlmfix.patched(model, "none"), features.reused():
                assert torch.equal(family.forward(model, inputs).logits, expected)
    summary = features.summary()
    if not summary["reused"]:
        assert summary["reason"].startswith(type(model).__name__)
    elif name in ("llava", "llava_next", "qwen2_vl", "qwen2_5_vl", "glm4v", "gemma3"):
        assert summary["repeated_in_batch"] == "encoded once"
    elif features.looked_inside:  # the patch itself looks at what leaves the projector
        assert name in ("blip2_opt", "blip2_t5", "instructblip", "instructblipvideo", "florence2")
    elif "video" not in name:
        assert 0 < features.encoded < features.asked


def test_patches_behind_one_another_belong_to_the_images_of_a_grid() -> None:
    grid = torch.tensor([[1, 2, 2], [1, 1, 2], [1, 2, 2]])
    patches = torch.arange(20.0).reshape(10, 2)
    patches[6:] = patches[:4]
    layout = Layout.find([patches, grid])
    assert layout == Layout(3, (4, 2, 4))
    assert positions_of([patches, grid], layout) == [0, 1, 0]
    few = rows_of({"pixel_values": patches, "grid": grid, "flag": True}, layout, [0, 1])
    assert torch.equal(few["pixel_values"], patches[:6]) and torch.equal(few["grid"], grid[:2]) and few["flag"]
    patches[9, 1] += 1
    assert positions_of([patches, grid], layout) == [0, 1, 2]
    assert Layout.find([patches, grid[:2]]) is None, "the products do not add up"
    assert Layout.find([patches, grid.float()]) is None
    assert Layout.find([patches, torch.rand(10, 3)]) == Layout(10)


# Whole runs


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    build_tiny_llava(folder / "m", layers=3)
    build_coco_folder(folder / "c", num_images=4)
    return folder


def run(home: Path, out: Path, *more: object) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    words = ["eval", "--model", home / "m", "--data", home / "c", "--out", out, "--max-new-tokens", 8]
    words += ["--pope-max-new-tokens", 2, "--batch-size", 6, "--method", "vhr", "fia", "pai", "--no-controls"]
    words += ["--no-share-prefixes", *more]
    assert main([str(word) for word in words]) == 0
    lines = (out / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    records = [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]
    return records, json.loads((out / "config.json").read_text(encoding="utf-8"))["runtime"]["image_features"]


def test_a_run_with_and_without_gives_the_same_bytes(home: Path, tmp_path: Path) -> None:
    on, summary = run(home, tmp_path / "on")
    off, none = run(home, tmp_path / "off", "--no-reuse-images")
    assert on == off
    assert none == {"reused": False}
    assert summary["reused"] and summary["repeated_in_batch"] == "encoded once"
    asked_by_one = (summary["asked"] - 4) // 4  # one warm-up
    assert summary["encoded_for_methods_inside"] == asked_by_one == len(on) // 4
    assert summary["encoded"] - asked_by_one < summary["asked"] / 3


def test_a_resumed_run_decodes_what_a_whole_one_does(home: Path, tmp_path: Path) -> None:
    whole, _ = run(home, tmp_path / "whole")
    out = tmp_path / "resumed"
    out.mkdir()
    (out / "config.json").write_bytes((tmp_path / "whole" / "config.json").read_bytes())
    data = (tmp_path / "whole" / "answers.jsonl").read_bytes()
    (out / "answers.jsonl").write_bytes(data[: len(data) * 2 // 3])
    assert run(home, out)[0] == whole
