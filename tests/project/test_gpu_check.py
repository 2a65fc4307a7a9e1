"""``scripts/gpu_check.py`` at toy sizes on a CPU: every part runs, disagreement is seen, what was left out is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gpu_check
import pytest


def check(folder: Path, *words: str) -> tuple[int, dict[str, Any], str]:
    out = folder / "found"
    status = gpu_check.main(["--device", "cpu", "--tiny", "--out", str(out), *words])
    return status, json.loads(out.with_suffix(".json").read_text())["parts"], out.with_suffix(".md").read_text()


def test_kernels_agree_with_the_formulas(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "KERNELS", ("sdpa", "eager", "flash_attention_2"))
    status, parts, text = check(tmp_path, "--only", "agreement", "caches", "training")
    told = {(row["kernel"], row["dtype"]): row for row in parts["agreement"]}
    assert status == 0 and told["sdpa", "float32"]["kept"] and told["eager", "float32"]["kept"]
    assert told["sdpa", "float32"]["methods"] == 3 and told["sdpa", "float32"]["deviation"] > 0
    assert told["sdpa", "bfloat16"]["deviation"] > 0.01 and "kept" not in told["sdpa", "bfloat16"]
    assert "FlashAttention" in told["flash_attention_2", "bfloat16"]["left_out"]
    assert {row["left_out"] for row in parts["caches"]} == {"needs a GPU", "there is 1"}
    assert parts["training"][0]["left_out"] and "flash attention 2" in text
    monkeypatch.setattr(gpu_check, "TOLERANCE", 0.0)
    monkeypatch.setattr(gpu_check, "KERNELS", ("sdpa",))
    assert check(tmp_path, "--only", "agreement")[0] == 1


def test_speed_is_measured_and_held_against_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "VARIANTS", ("pai", "vcd"))
    monkeypatch.setattr(gpu_check, "LIMITS", dict.fromkeys(gpu_check.LIMITS, 0.01) | {"peak memory": 100.0})
    status, parts, text = check(tmp_path, "--only", "speed", "--minutes", "0.02")
    measured = [row for row in parts["speed"] if "variants" in row]
    assert status == 0 and measured and len(parts["speed"]) == 8
    assert {row["left_out"] for row in parts["speed"] if row not in measured} <= {"no time was left"}
    first = {(each["variant"], each["limit"]): each["kept"] for each in measured[0]["limits"]}
    assert first["pai", "decode, eager"] is False and first["pai", "peak memory"] is True
    assert first["vcd", "decode, second branch"] is False
    assert "Limits missed: pai, decode, eager" in text and "no time was left" in text


def test_a_part_that_fails_is_told_and_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> Any:
        raise RuntimeError("no such kernel")

    monkeypatch.setitem(gpu_check.PARTS, "caches", fails)
    status, parts, text = check(tmp_path, "--only", "caches", "training")
    assert status == 1 and "no such kernel" in parts["caches"][0]["failed"] and parts["training"]
    assert "no such kernel" in text
