"""Finding a model's parts by structure, wrappers, and refusals at patch time."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families import available
from families.tiny_llava import (
    IMAGE,
    RAGGED,
    attention_modules,
    collate,
    forward,
    generate,
)
from torch import nn

import vlmfix
from vlmfix.model.anatomy import analyse, unwrap


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "gemma2"])
def test_the_text_attention_modules_are_found_and_no_others(build: Any, kind: str) -> None:
    model = build(kind)
    anatomy = analyse(model)
    assert [site.module for site in anatomy.sites] == list(attention_modules(model))
    assert [site.layer_idx for site in anatomy.sites] == [0, 1, 2, 3]
    assert [site.decoder_layer for site in anatomy.sites] == list(model.model.language_model.layers)
    assert anatomy.decoder_layers == tuple(model.model.language_model.layers)
    assert anatomy.image_token_ids == (IMAGE,)
    assert anatomy.inner is model.model
    assert (anatomy.num_layers, anatomy.hidden_size) == (4, 32)


def test_a_patched_model_has_the_same_anatomy(tiny: Any) -> None:
    stock = analyse(tiny)
    vlmfix.patch(tiny, "vhr")
    assert [site.name for site in analyse(tiny).sites] == [site.name for site in stock.sites]


def test_wrappers_are_unwrapped(tiny: Any) -> None:
    peft = pytest.importorskip("peft")
    assert unwrap(tiny) is tiny
    assert unwrap(torch.compile(tiny, backend="eager")) is tiny
    assert unwrap(nn.DataParallel(tiny)) is tiny
    assert unwrap(SimpleNamespace(model=tiny)) is tiny
    config = peft.LoraConfig(target_modules=["q_proj"], r=2)
    wrapped = peft.get_peft_model(tiny, config)
    assert unwrap(wrapped) is tiny
    assert unwrap(SimpleNamespace(model=torch.compile(wrapped, backend="eager"))) is tiny
    assert len(analyse(wrapped).sites) == 4


def test_a_language_model_alone_is_refused() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    with pytest.raises(vlmfix.UnsupportedModelError, match="image token"):
        vlmfix.patch(LlamaForCausalLM(config))


def test_a_vision_model_alone_is_refused(tiny: Any) -> None:
    with pytest.raises(vlmfix.UnsupportedModelError):
        vlmfix.patch(tiny.model.vision_tower)


KINDS = {
    "blip2_opt": {"joint": [0, 1, 2, 3]},
    "blip2_t5": {"answer": [0, 1, 2], "encoder": [0, 1, 2]},
    "instructblip": {"joint": [0, 1, 2, 3]},
    "instructblipvideo": {"joint": [0, 1, 2, 3]},
    "idefics": {"text": [0, 1, 2, 3], "image": [0, 2]},
    "mllama": {"text": [0, 2, 4], "image": [1, 3]},
    "florence2": {"answer": [0, 1, 2], "encoder": [0, 1, 2]},
}
"""Layers by what their attention looks at."""


@pytest.mark.parametrize("name", KINDS)
def test_where_the_image_is_not_among_the_decoder_s_tokens(name: str) -> None:
    family = available(name)
    model = family.build()
    anatomy = analyse(model)
    found: dict[str, list[int]] = {}
    for site in anatomy.sites:
        found.setdefault(site.kind, []).append(site.layer_idx)
    assert found == KINDS[name]
    assert not any(part in site.name for site in anatomy.sites for part in ("vision", "qformer", "encoder.layers"))
    depth = {"mllama": 5, "blip2_t5": 3, "florence2": 3}.get(name, 4)
    assert anatomy.num_layers == len(anatomy.decoder_layers) == depth
    assert (anatomy.hidden_size, anatomy.num_heads) == (32, 4)
    inside = getattr(model, "language_model", None) if "blip" in name else model
    assert anatomy.language_model is inside
    assert (anatomy.encoder is None) == ("encoder" not in found)
    assert (anatomy.projector is None) == (name in ("idefics", "mllama"))


def test_a_text_model_with_an_encoder_is_refused_with_the_reason() -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    model = T5ForConditionalGeneration(
        T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
    )
    with pytest.raises(vlmfix.UnsupportedModelError, match="no image token"):
        vlmfix.patch(model)


def test_a_sparse_indexer_whose_selection_is_not_in_the_mask_is_refused(tiny: Any) -> None:
    tiny.model.language_model.layers[1].self_attn.indexer = nn.Identity()
    tiny.set_attn_implementation({"text_config": "flex_attention"})
    with pytest.raises(vlmfix.UnsupportedModelError, match="indexer"):
        vlmfix.patch(tiny)


def test_attention_outside_the_interface_is_refused(tiny: Any) -> None:
    for module in attention_modules(tiny):
        del module.config
    with pytest.raises(vlmfix.UnsupportedModelError, match="attention interface"):
        vlmfix.patch(tiny)


# Other families: the machinery is bitwise neutral, and both methods act.


@pytest.mark.families
@pytest.mark.parametrize("name", ["qwen2_5_vl", "gemma3", "smolvlm"])
def test_var_acts_in_other_families(name: str) -> None:
    family = available(name)
    model, inputs = family.build(), family.collate([family.single()])
    stock = generate(model, inputs, 4)[1]
    options = {"sink_dims": list(range(32)), "sink_threshold": 2.6, "layers": ":", "nonsink_ratio": 0.1}
    vlmfix.patch(model, "var", **options)
    edited = generate(model, inputs, 4)[1]
    assert vlmfix.status(model).edited[0] > 0 and vlmfix.status(model).prompts_without_image == 0
    assert (edited - stock).abs().max() > 0.01


def test_images_are_found_by_the_id_of_the_config(tiny: Any) -> None:
    """The id is read when the model is patched; a prompt without it is a text-only prompt."""
    vlmfix.patch(tiny, "vhr")
    forward(tiny, collate([RAGGED[2]]))
    assert vlmfix.status(tiny).prompts_without_image == 1


def test_tensor_parallelism_is_refused(tiny: Any) -> None:
    tiny._tp_size = 2
    with pytest.raises(vlmfix.UnsupportedModelError, match="tensor parallelism"):
        vlmfix.patch(tiny)


def test_a_forward_without_keywords_is_refused(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(self: Any, input_ids: Any, pixel_values: Any = None) -> None: ...

    monkeypatch.setattr(type(tiny.model), "forward", forward)
    with pytest.raises(vlmfix.UnsupportedModelError, match="keyword arguments"):
        vlmfix.patch(tiny)
