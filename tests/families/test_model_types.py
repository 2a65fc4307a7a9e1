"""Every model type of transformers' own mapping is measured, refused with a reason, or said to be unbuilt."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

import vlmfix
from families.model_types import REFUSED, UNBUILT, mapped, measured, refusal, row, rows, shallow

MATRIX = Path(__file__).with_name("FAMILIES.md")


def test_every_model_type_of_transformers_has_a_row() -> None:
    unknown = [each for each in rows() if each.standing == "unknown"]
    assert not unknown, "\n".join(
        f"transformers {transformers.__version__} maps {each.model_type!r} to {each.architecture}: {each.says}"
        for each in unknown
    )


def test_a_type_that_transformers_adds_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    types = mapped() | {"new_vl": "NewVLForConditionalGeneration"}
    monkeypatch.setattr("families.model_types.mapped", lambda: types)
    assert row("new_vl").standing == "unknown"


def test_no_type_stands_twice() -> None:
    known = {model_type for model_type, _ in measured()}
    assert not known & set(REFUSED)
    assert not known & set(UNBUILT)
    assert not set(REFUSED) & set(UNBUILT)


@pytest.mark.parametrize("model_type", REFUSED)
def test_a_refused_type_is_refused(model_type: str) -> None:
    if model_type not in mapped():
        pytest.skip(f"transformers {transformers.__version__} does not map {model_type}")
    assert f"model_type {model_type!r}" in refusal(model_type)


@pytest.mark.parametrize(
    ("model_type", "architecture"),
    [
        ("ultravbert", "UltraVBertForMaskedLM"),
        ("ultravbert", "UltraVBertModel"),
        ("embedding_gemma2", "EmbeddingGemma2Model"),
        ("paligemma", "PaliGemmaModel"),
    ],
)
@pytest.mark.parametrize("method", ["none", "pai", "guidance"])
def test_models_that_read_in_both_directions_and_generate_nothing_are_refused(
    model_type: str, architecture: str, method: str
) -> None:
    if not hasattr(transformers, architecture):
        pytest.skip(f"transformers {transformers.__version__} has no {architecture}")
    with torch.device("meta"):
        model = getattr(transformers, architecture)(shallow(model_type)())
    with pytest.raises(vlmfix.UnsupportedModelError, match="AutoModelForImageTextToText"):
        vlmfix.patch(model, method)
    assert vlmfix.status(model) is None


def test_the_matrix_lists_every_type() -> None:
    text = MATRIX.read_text(encoding="utf-8")
    if f"transformers {transformers.__version__}" not in text:
        pytest.skip("the matrix is of another version of transformers")
    for each in rows():
        assert f"| {each.model_type} | {each.architecture} | {each.standing} | " in text
