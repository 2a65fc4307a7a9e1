"""Families whose sparse indexer selects the keys that a row sees: methods see them, and no others."""

from __future__ import annotations

import copy
import pickle
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from transformers import AttentionInterface

import vlmfix
from families import sparse
from families.altered import build, gap, logits
from vlmfix.engine.attention_function import ATTENTION_NAME, NameOfBoth
from vlmfix.methods.base import Method

pytestmark = pytest.mark.families
NAMES = ["mistral_large4", "minimax_m3_vl", "glm5_next", "dots3_note", "qwen4_exp"]
SELECTING = {"mistral_large4": (0, 1, 2, 3)}
"""The layers that select keys; the others' are 1 and 3."""


@dataclass(frozen=True)
class Counting(Method):
    """Counts the keys that each row weighs, and edits nothing."""

    name: ClassVar[str] = "counting"
    edits_weights: ClassVar[bool] = True
    needs_text_keys: ClassVar[bool] = False

    def edit_weights(self, attn_weights: torch.Tensor, layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Count."""
        COUNTED.append((layer.site.layer_idx, int((attn_weights > 0).sum(-1).max())))
        return attn_weights, attn_weights.new_zeros(attn_weights.shape[:3], dtype=torch.bool)


COUNTED: list[tuple[int, int]] = []


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_rows_weigh_the_selected_keys_alone(name: str, implementation: str) -> None:
    family, model = build(name)
    model.set_attn_implementation(implementation)
    inputs = family.collate([family.single()])
    assert inputs["input_ids"].shape[1] > sparse.TOPK + 1
    stock = logits(model, inputs)
    COUNTED.clear()
    vlmfix.patch(model, Counting())
    assert gap(logits(model, inputs), stock) < 1e-5
    most = {layer: max(count for each, count in COUNTED if each == layer) for layer, _ in COUNTED}
    selecting = SELECTING.get(name, (1, 3))
    assert set(selecting) <= set(most)
    # One more: the last, unfinished block of keys is always seen.
    assert all(most[layer] <= sparse.TOPK + 1 for layer in selecting)


def test_a_kernel_that_takes_selected_keys_beside_the_mask_is_refused_also_later(tiny: Any) -> None:
    ids = torch.tensor([[1, 20, 30, 40]])
    tiny.model.language_model.layers[1].self_attn.indexer = torch.nn.Identity()
    AttentionInterface.register("beside", AttentionInterface()["sdpa"])
    vlmfix.patch(tiny, "none")
    tiny(input_ids=ids)
    tiny.set_attn_implementation({"text_config": "beside"})
    with pytest.raises(vlmfix.UnsupportedFeatureError, match="'beside' outside the mask"):
        tiny(input_ids=ids)
    vlmfix.unpatch(tiny)
    with pytest.raises(vlmfix.UnsupportedModelError, match="set_attn_implementation"):
        vlmfix.patch(tiny, "none")


def test_a_deep_copy_is_patched_with_its_own_config() -> None:
    family, model = build("mistral_large4")
    inputs = family.collate([family.single()])
    stock = logits(model, inputs)
    vlmfix.patch(model, "pai", alpha=0.9, layers=":")
    changed = logits(model, inputs)
    other = copy.deepcopy(model)
    vlmfix.unpatch(model)
    assert torch.equal(logits(model, inputs), stock)
    assert torch.equal(logits(other, inputs), changed)
    name = other.model.language_model.layers[0].self_attn.config._attn_implementation
    assert name.config is other.config.get_text_config(decoder=True)
    vlmfix.unpatch(other)
    assert torch.equal(logits(other, inputs), stock)


def test_the_name_leads_to_vlmfix_and_equals_that_of_the_stock_kernel() -> None:
    _, model = build("minimax_m3_vl")
    config = model.config.get_text_config(decoder=True)
    name = NameOfBoth(config)
    assert name == ATTENTION_NAME
    assert name == config._attn_implementation
    assert name in ("eager", "sdpa")
    assert name != "flash_attention_2"
    assert {ATTENTION_NAME: 1}[name] == 1
    assert pickle.loads(pickle.dumps(name)) == ATTENTION_NAME
