"""A model that accelerate spreads over devices, with weights on the disk, gives the answers it gives in memory."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from families.saved_llava import build_coco_folder, build_tiny_llava

from vlmfix.cli import main
from vlmfix.errors import VlmfixError
from vlmfix.evals.run import models
from vlmfix.evals.run.shards import Shard
from vlmfix.model import devices


@pytest.fixture
def spread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[Any]]:
    """A model of 290 kB in the folder m, pictures in c; after a call ``--device auto`` has so many bytes of memory."""
    build_tiny_llava(tmp_path / "m", layers=4)
    build_coco_folder(tmp_path / "c", num_images=4)

    def limit(memory: int) -> list[Any]:
        stock = transformers.AutoModelForImageTextToText.from_pretrained
        placements = []

        def small(*args: Any, **options: Any) -> Any:
            if "device_map" in options:
                options["max_memory"] = {"cpu": memory}
            model = stock(*args, **options)
            placements.append(getattr(model, "hf_device_map", None))
            return model

        monkeypatch.setattr(transformers.AutoModelForImageTextToText, "from_pretrained", small)
        return placements

    return limit


@pytest.mark.parametrize("memory", [120_000, 10_000])
def test_weights_on_disk(memory: int, tmp_path: Path, spread: Callable[[int], list[Any]]) -> None:
    """The language model lies on the disk, or everything, the first weights included."""
    placements = spread(memory)
    words = ["eval", "--model", tmp_path / "m", "--data", tmp_path / "c", "--max-new-tokens", 8, "--batch-size", 4]
    words += ["--pope-max-new-tokens", 2, "--method", "vhr", "pai", "--no-controls"]
    found = {}
    for device in ("cpu", "auto"):
        out = tmp_path / device
        assert main([str(word) for word in (*words, "--device", device, "--out", out)]) == 0
        lines = (out / "answers.jsonl").read_text(encoding="utf-8").splitlines()
        records = [json.loads(line) for line in lines]
        found[device] = [{k: v for k, v in record.items() if k not in ("seconds", "key")} for record in records]
    assert found["auto"] == found["cpu"]
    assert placements[0] is None and "disk" in placements[1].values()
    runtime = json.loads((tmp_path / "auto" / "config.json").read_text(encoding="utf-8"))["runtime"]
    assert runtime["device"] in ("cpu, disk", "disk") and runtime["image_features"]["encoded"] < 60


@pytest.mark.parametrize("method", ["adhh", "allpath", "var"])
def test_calibration_with_all_weights_on_disk(method: str, tmp_path: Path, spread: Callable[[int], list[Any]]) -> None:
    placements, found = spread(10_000), {}
    words = ["calibrate", method, "--model", tmp_path / "m", "--data", tmp_path / "c", "--max-new-tokens", 8]
    for device in ("cpu", "auto"):
        out = tmp_path / f"{device}.json"
        assert main([str(word) for word in (*words, "--limit", 4, "--device", device, "--out", out)]) == 0
        found[device] = json.loads(out.read_text(encoding="utf-8"))["methods"]
    assert found["auto"] == found["cpu"] and placements == [None, {"": "disk"}]


def test_inspection_with_all_weights_on_disk(
    tmp_path: Path, spread: Callable[[int], list[Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    placements, found = spread(10_000), {}
    picture = next((tmp_path / "c/val2014").iterdir())
    words = ["inspect", "--model", tmp_path / "m", "--image", picture, "--max-new-tokens", 4, "--objects", "dog"]
    for device in ("cpu", "auto"):
        out = tmp_path / f"{device}.html"
        assert main([str(word) for word in (*words, "--device", device, "--out", out)]) == 0
        found[device] = capsys.readouterr().out.replace(str(out), "")
    assert found["auto"] == found["cpu"] and placements == [None, {"": "disk"}]


def test_where_inputs_belong() -> None:
    def device(placement: Any) -> torch.device:
        model = SimpleNamespace(device=torch.device("meta"), hf_device_map=placement)
        found: torch.device = devices.input_device(model)
        return found

    assert device({"a": "disk", "b": "cpu"}) == torch.device("cpu")
    assert device({"a": "cpu", "b": "cuda:1", "c": "disk"}) == torch.device("cuda:1")
    assert device({"": "cpu"}) == torch.device("cpu")
    assert devices.input_device(SimpleNamespace(device=torch.device("cpu"))) == torch.device("cpu")
    config = SimpleNamespace(dtype=torch.float16)
    if not torch.cuda.is_available():
        assert models.resolve_dtype(None, "auto", config) == "float32"


@pytest.mark.parametrize("instruction", [None, "_is_avx512_bf16_supported", "_is_amx_tile_supported"])
def test_a_cpu_that_computes_in_bfloat16_keeps_it(instruction: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda name=name: name == instruction, raising=False)
    bfloat16, float16 = (SimpleNamespace(dtype=dtype) for dtype in (torch.bfloat16, torch.float16))
    assert models.resolve_dtype(None, "cpu", bfloat16) == ("bfloat16" if instruction else "float32")
    assert models.resolve_dtype(None, "cpu", float16) == "float32"
    assert models.resolve_dtype("float32", "cpu", bfloat16) == "float32"
    monkeypatch.delattr(torch.cpu, "_is_amx_tile_supported")
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported")
    assert models.resolve_dtype(None, "cpu", bfloat16) == "float32"


def test_processes_do_not_spread_over_all_devices() -> None:
    with pytest.raises(VlmfixError, match="start one"):
        Shard(0, 2).device("auto")
    assert Shard().device("auto") == "auto"
