"""Every family of the zoo: the machinery is bitwise neutral, finds what it should, and edits what it should."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from method_parameters import PARAMETERS

import vlmfix
from families import FAMILIES, available, by_name, capability
from families.capability import Cell, Probe, Trial, difference, measure
from families.tiny_llava import generate

pytestmark = pytest.mark.families

_NO_DISPATCH = "T5 does not use the attention interface"
BROKEN = {
    ("llama4", "5.0."): "the unpatched model cannot read an image",
    ("florence2", "4."): "keyword arguments of the model do not reach its attention",
    ("blip2_t5", "4."): _NO_DISPATCH,
    ("blip2_t5", "5.0."): _NO_DISPATCH,
}
"""Families that some versions of transformers have, but cannot run or cannot let be patched."""
SLIDING = {
    *("llava_mistral", "llava_gemma2", "aya_vision", "cohere2_vision", "qwen2_5_vl_sliding", "paligemma2"),
    *("gemma3", "gemma3n", "gemma4", "llama4", "exaone4_5", "shieldgemma2", "dots3_note"),
    *("muse_glimmer", "muse_spark", "lfm3_vl", "gemma4_unified"),
    *("cohere_compass", "step3p7", "unlimited_ocr", "inkling"),
}
"""The families with layers that see a window (or a chunk) of keys."""


@cache
def _trial(name: str) -> Trial:
    return Trial(by_name(name))


@pytest.fixture(params=[family.name for family in FAMILIES])
def trial(request: pytest.FixtureRequest) -> Trial:
    """A family's tiny model; families this version of transformers lacks are skipped."""
    available(request.param)
    for (name, version), reason in BROKEN.items():
        if name == request.param and transformers.__version__.startswith(version):
            pytest.skip(f"upstream: {reason}")
    return _trial(request.param)


@pytest.fixture(scope="module")
def script() -> Any:
    """``scripts/capabilities.py`` as a module."""
    path = Path(__file__).resolve().parents[2] / "scripts" / "capabilities.py"
    spec = importlib.util.spec_from_file_location("capabilities", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def written(script: Any) -> dict[str, dict[str, tuple[str, str]]]:
    """The matrix on file, by family and column; nothing with other versions than it was measured with."""
    text = script.OUTPUT.read_text(encoding="utf-8")
    return script.read(text) if script.is_of_these_versions(text) else {}


@pytest.fixture
def cell(trial: Trial, written: dict[str, dict[str, tuple[str, str]]]) -> Callable[[str], Cell]:
    """Measure a column, which must be what the matrix says.

    Refused methods and what upstream cannot do are skipped with the reason.
    """

    def look(column: str) -> Cell:
        found = measure(trial, column)
        assert vlmfix.status(trial.model) is None
        if written:
            assert found == Cell(*written[trial.family.name][column]), "python scripts/capabilities.py writes it anew"
        if found.mark in ("refused", "upstream"):
            pytest.skip(f"{found.mark}: {found.note}")
        return found

    return look


def test_families_have_different_names_and_titles() -> None:
    assert len(FAMILIES) >= 54
    assert len({family.name for family in FAMILIES}) == len({family.title for family in FAMILIES}) == len(FAMILIES)


def test_the_answer_depends_on_the_image(trial: Trial) -> None:
    """Negative control of everything else: a model blind to its image would pass."""
    sample = trial.family.single()
    other = dataclasses.replace(sample, pixels=trial.family.sample(seed=8).pixels)
    assert difference(trial.logits(trial.family.collate([other])), trial.stock) > 0.05


def test_building_again_gives_the_same_model_and_leaves_the_global_generator_alone(trial: Trial) -> None:
    before = torch.random.get_rng_state()
    again = trial.family.build()
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(generate(again, trial.single, capability.TOKENS)[1], trial.stock)


def test_every_family_is_patched(trial: Trial) -> None:
    assert trial.refusal is None
    before = trial.stock
    vlmfix.patch(trial.model, "none")
    vlmfix.unpatch(trial.model)
    assert torch.equal(trial.logits(trial.single), before)


def test_every_text_attention_module_reaches_the_patch(trial: Trial, cell: Any) -> None:
    assert cell("sites") == Cell(f"{trial.family.attention}/{trial.family.attention}")


@pytest.mark.parametrize("column", ["strength 0", "generate", "pipeline", "batch", "cache", "static", "beams"])
def test_what_every_family_does(cell: Callable[[str], Cell], column: str) -> None:
    """See ``capability.MACHINERY`` for what each column measures."""
    found = cell(column)
    assert found.mark == "yes"
    assert not found.note or column == "batch", "a batch may round otherwise"


def test_the_image_mask_is_where_visual_features_stand(trial: Trial, cell: Any) -> None:
    assert cell("image mask").mark == ("yes" if trial.family.visual_ids else "-")


def test_a_prompt_without_an_image_is_answered_by_the_stock_model(trial: Trial, cell: Any) -> None:
    assert cell("text only").mark == ("yes" if trial.family.text_only else "-")


def test_a_sliding_cache_agrees_beyond_its_window(trial: Trial, cell: Any) -> None:
    assert cell("sliding") == Cell("yes" if trial.family.name in SLIDING else "-")


def test_vhr_acts_is_counted_and_is_the_same_in_a_batch(cell: Any) -> None:
    assert cell("vhr") == Cell("active")


# The measuring itself.


def _llava() -> Trial:
    return Trial(by_name("llava"))


def test_what_fails_without_a_patch_too_is_upstream(monkeypatch: pytest.MonkeyPatch) -> None:
    trial = _llava()
    assert trial.refusal is None

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("broken anyway")

    monkeypatch.setattr(trial.model, "generate", broken)
    assert measure(trial, "vhr") == Cell("upstream", "the unpatched model fails: RuntimeError: broken anyway")


def test_what_fails_only_under_a_patch_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    trial = _llava()

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("at 0x7f12ab")

    monkeypatch.setattr(Probe, "edit_weights", broken)
    assert measure(trial, "generate") == Cell("error", "RuntimeError: at 0x...")
    assert vlmfix.status(trial.model) is None


def test_a_method_that_edits_nothing_is_no_op_and_refusals_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    trial = _llava()
    monkeypatch.setitem(PARAMETERS, "vhr", lambda anatomy: {"alpha": 1.0})
    assert measure(trial, "vhr") == Cell("no-op", "nothing is edited")
    monkeypatch.setitem(PARAMETERS, "vhr", lambda anatomy: {"alpha": -1.0})
    refused = measure(trial, "vhr")
    assert refused.mark == "refused"
    assert "alpha" in refused.note


def test_a_wrong_image_mask_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    trial = _llava()
    ids = trial.family.collate(trial.family.ragged())["input_ids"]
    monkeypatch.setattr(trial, "family", dataclasses.replace(trial.family, visual_ids=(3, int(ids[0, -1]))))
    assert measure(trial, "image mask") == Cell("no")


def test_a_module_that_does_not_dispatch_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    trial = _llava()
    monkeypatch.setattr(trial, "family", dataclasses.replace(trial.family, attention=5))
    assert measure(trial, "sites") == Cell("4/5")


# The script that writes the matrix.


def test_the_matrix_shows_every_cell_and_shares_notes(script: Any) -> None:
    columns = (*capability.MACHINERY, *capability.method_columns())
    rows = {name: dict.fromkeys(columns, ("yes", "")) for name in ("llava", "gemma3")}
    rows["llava"]["cache"] = rows["gemma3"]["beams"] = ("upstream", "why | <so>")
    text = script.render(rows)
    machinery = next(line.count("|") for line in text.splitlines() if line.startswith("| "))
    assert machinery == len(capability.MACHINERY) + 2
    assert text.count("upstream [1]") == 2
    assert "1. why \\| \\<so>" in text
    assert set(script.LEGEND) == set(capability.MACHINERY)
    for method in capability.method_columns():
        assert f" {method} |" in text


def test_a_check_ignores_versions_and_nothing_else(script: Any) -> None:
    committed = "# Families\nMeasured with torch 1.\n| a | yes |\n"
    assert script.difference(committed, committed.replace("torch 1", "torch 2")) == []
    assert "-| a | yes |" in script.difference(committed, committed.replace("yes", "no"))
