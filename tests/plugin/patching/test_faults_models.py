"""What people do to a model around a patch: the value is that of the plain model, or it is refused with the reason."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from families.tiny_llava import RAGGED, collate, forward, sample, tiny_llava
from method_parameters import parameters_of
from transformers.models.llama.modeling_llama import LlamaAttention

import vlmfix

ONE = collate([RAGGED[0]])


class OwnAttention(LlamaAttention):
    """A user's own class."""


def test_an_attention_class_of_the_user_s_own_under_eager(build: Any) -> None:
    model = build(attn="eager")
    for layer in model.model.language_model.layers:
        layer.self_attn.__class__ = OwnAttention
    stock = forward(model, ONE).logits
    vlmfix.patch(model, "none")
    assert torch.equal(forward(model, ONE).logits, stock)
    vlmfix.patch(model, "pai", layers=":")
    assert (forward(model, ONE).logits - stock).abs().max() > 1e-3


@pytest.fixture
def one_process() -> Iterator[Any]:
    if not dist.is_available():
        pytest.skip("this torch is built without torch.distributed")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.device_mesh.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("order", ["patch first", "shard first"])
@pytest.mark.parametrize("name", ["vhr", "pai", "vcd"])
def test_fully_sharded_models_in_either_order(tiny: Any, one_process: Any, name: str, order: str) -> None:
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    if not hasattr(fsdp, "fully_shard"):
        pytest.skip("this torch has no fully_shard")
    options = {} if name == "vcd" else {"layers": ":"}
    with vlmfix.patched(copy.deepcopy(tiny), name, **options) as plain:
        expected = forward(plain, ONE).logits
    steps = [lambda: vlmfix.patch(tiny, name, **options), lambda: fsdp.fully_shard(tiny, mesh=one_process)]
    for step in steps if order == "patch first" else reversed(steps):
        step()
    torch.testing.assert_close(forward(tiny, ONE).logits, expected, atol=1e-5, rtol=1e-5)


def test_an_attention_class_of_another_name_is_one_by_its_bases(tiny: Any) -> None:
    """As transformers' mapping of patched classes, or a user, puts them in some layers."""
    vlmfix.patch(tiny, "pai", layers=":")
    expected = forward(tiny, ONE).logits
    vlmfix.unpatch(tiny)
    tiny.model.language_model.layers[1].self_attn.__class__ = type("Fused", (LlamaAttention,), {})
    vlmfix.patch(tiny, "pai", layers=":")
    assert torch.equal(forward(tiny, ONE).logits, expected)


def test_cleared_hooks_are_told_and_healed(tiny: Any) -> None:
    stock = forward(tiny, ONE).logits
    vlmfix.patch(tiny, "vhr", alpha=1.2)
    assert not vlmfix.status(tiny).notes
    for module in (tiny, tiny.model, *tiny.model.language_model.modules()):
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    with pytest.raises(vlmfix.UnsupportedFeatureError, match="unpatch"):
        forward(tiny, ONE)
    assert "removed hooks" in str(vlmfix.status(tiny))
    vlmfix.unpatch(tiny)
    assert vlmfix.status(tiny) is None
    assert torch.equal(forward(tiny, ONE).logits, stock)
    vlmfix.patch(tiny, "pai", layers=":")
    assert (forward(tiny, ONE).logits - stock).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["deco", "dola", "iri", "memvr", "pai", "var", "vcd", "vista", "vti"])
@pytest.mark.parametrize("where", ["everything", "the language model", "its layers", "the vision tower"])
def test_hooks_of_a_patch_that_are_removed_in_part_are_never_taken_for_a_patch(
    tiny: Any, name: str, where: str
) -> None:
    vlmfix.patch(tiny, name, **parameters_of(name, tiny))
    right = forward(tiny, ONE).logits
    language_model = tiny.model.language_model
    parts = {"everything": tiny, "the language model": language_model, "its layers": language_model.layers}
    for module in parts.get(where, tiny.model.vision_tower).modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key in [key for key, hook in hooks.items() if "vlmfix" in repr(hook)]:  # transformers has its own
                del hooks[key]
    try:
        assert torch.equal(forward(tiny, ONE).logits, right)
    except vlmfix.UnsupportedFeatureError as error:
        assert "vlmfix.unpatch(model)" in str(error)
        assert "removed hooks" in str(vlmfix.status(tiny))


def test_a_patched_attention_module_s_config_can_be_printed(tiny: Any) -> None:
    vlmfix.patch(tiny, "vhr")
    config = tiny.model.language_model.layers[1].self_attn.config
    assert str(config) == str(tiny.config.text_config)
    assert "vlmfix" not in config.to_json_string()


@pytest.mark.skipif(not hasattr(torch.compiler, "is_exporting"), reason="this torch does not say that it exports")
def test_export_is_refused_with_the_reason(tiny: Any) -> None:
    vlmfix.patch(tiny, "vhr")
    with pytest.raises(vlmfix.UnsupportedFeatureError, match=r"Export the stock model: vlmfix.unpatch"):
        torch.export.export(tiny, (), kwargs={**ONE, "use_cache": False}, strict=False)


def test_attributes_of_others_survive(tiny: Any) -> None:
    def own(*args: Any, **kwargs: Any) -> str:
        return "own"

    tiny.init_continuous_batching = own
    vlmfix.patch(tiny, "vhr")
    with pytest.raises(vlmfix.UnsupportedFeatureError, match="Continuous batching"):
        tiny.init_continuous_batching()
    vlmfix.unpatch(tiny)
    assert tiny.init_continuous_batching is own


def test_a_model_whose_images_cannot_be_found_is_refused() -> None:
    """Kosmos-2 puts them in the place of embeddings by a mask of its own."""
    model = transformers.Kosmos2ForConditionalGeneration(
        transformers.Kosmos2Config(
            text_config={"vocab_size": 99, "embed_dim": 32, "layers": 2, "ffn_dim": 64, "attention_heads": 2},
            vision_config={
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "image_size": 28,
                "patch_size": 14,
            },
            latent_query_num=4,
        )
    )
    with pytest.raises(vlmfix.UnsupportedModelError, match="no image token"):
        vlmfix.patch(model, "vhr")


def biased(value: float) -> Any:
    """A model whose queries and keys have large biases in a few dimensions."""
    model = tiny_llava("qwen2", hidden=256, heads=2, kv_heads=1)
    with torch.no_grad():
        for layer in model.model.language_model.layers:
            for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
                projection.bias.zero_()
                projection.bias.view(-1, 128)[:, 60:64] = value
    return model


@pytest.mark.parametrize("name", ["pai", "vaf", "hgai"])
def test_autocast_to_half_precision_does_not_overflow(name: str) -> None:
    """Unscaled scores of about 67,600, scaled 6,000: beyond fp16 and within, as with Qwen2's biases."""
    model = biased(130.0)
    stock = forward(model, ONE).logits
    vlmfix.patch(model, name, layers=":")
    exact = forward(model, ONE).logits
    with torch.autocast("cpu", dtype=torch.float16):
        half = forward(model, ONE).logits.float()
        vlmfix.unpatch(model)
        error = (forward(model, ONE).logits.float() - stock).abs().max()
    assert half.isfinite().all()
    assert (half - exact).abs().max() < 4 * error + 0.05


def test_written_out_rows_in_bf16_are_no_farther_off_than_eager_attention() -> None:
    """With key biases such as Qwen2's, where scores lose their last digits in bf16; the edit is next to nothing."""
    model = biased(40.0)
    inputs = collate([sample(3, 1, 6, seed=seed) for seed in range(6)])
    exact = forward(model, inputs).logits[:, -1]
    low = model.to(torch.bfloat16)
    inputs["pixel_values"] = inputs["pixel_values"].to(torch.bfloat16)

    def error() -> float:
        return float((forward(low, inputs).logits[:, -1].float() - exact).abs().mean())

    vlmfix.patch(low, "pai", alpha=1e-9, layers=":")
    written_out = error()
    vlmfix.unpatch(low)
    low.set_attn_implementation({"text_config": "eager"})
    assert written_out < error()


@pytest.mark.parametrize("name", ["vista", "dola", "deco", "memvr", "vcd"])
def test_a_head_that_is_replaced_behind_the_patch_is_the_one_that_is_read(tiny: Any, name: str) -> None:
    """As ``resize_token_embeddings`` and ``set_output_embeddings`` do."""
    inputs = collate(RAGGED)
    vlmfix.patch(tiny, name, **parameters_of(name, tiny))
    with torch.random.fork_rng():
        head = torch.nn.Linear(*reversed(tiny.get_output_embeddings().weight.shape), bias=False)
    tiny.set_output_embeddings(head)
    found = forward(tiny, inputs).logits
    vlmfix.patch(tiny, name, **parameters_of(name, tiny))
    torch.testing.assert_close(found, forward(tiny, inputs).logits)
    tiny.resize_token_embeddings(len(head.weight) + 8, mean_resizing=False)
    assert forward(tiny, inputs).logits.shape[-1] == len(head.weight) + 8


def test_a_loss_by_shifted_labels_is_that_of_mixed_logits(tiny: Any) -> None:
    vlmfix.patch(tiny, "vista", **parameters_of("vista", tiny))
    inputs = collate([RAGGED[0]])
    labels = inputs["input_ids"].clone()
    shifted = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
    with torch.no_grad():
        expected = tiny(**inputs, labels=labels).loss
        found = tiny(**inputs, labels=torch.full_like(labels, 1), shift_labels=shifted).loss
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", ["fia", "vhr", "vista", "deco", "memvr"])
def test_an_adapter_that_is_added_after_patching_counts(tiny: Any, name: str) -> None:
    """It takes the place of projections, in the vision tower too."""
    peft = pytest.importorskip("peft")
    where = r".*(q_proj|k_proj|v_proj|o_proj|up_proj|down_proj|fc1|fc2)$"

    def adapt(model: Any) -> None:
        torch.manual_seed(3)
        model.add_adapter(peft.LoraConfig(r=2, lora_alpha=64, init_lora_weights=False, target_modules=where))

    other, stock = copy.deepcopy(tiny), forward(tiny, ONE).logits
    adapt(other)
    vlmfix.patch(other, name, **parameters_of(name, other))
    vlmfix.patch(tiny, name, **parameters_of(name, tiny))
    adapt(tiny)
    found, expected = forward(tiny, ONE).logits, forward(other, ONE).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert (expected - stock).abs().max() > 0.1


@pytest.mark.parametrize("name", ["vhr", "act", "vti", "vcd"])
def test_a_model_that_is_halved_after_patching(tiny: Any, name: str) -> None:
    other = copy.deepcopy(tiny).to(torch.bfloat16)
    vlmfix.patch(other, name, **parameters_of(name, other))
    vlmfix.patch(tiny, name, **parameters_of(name, tiny))
    tiny.to(torch.bfloat16)
    assert torch.equal(forward(tiny, ONE).logits, forward(other, ONE).logits)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("name", ["pai", "deco"])
def test_a_forward_that_is_compiled_after_patching(tiny: Any, name: str) -> None:
    vlmfix.patch(tiny, name, **parameters_of(name, tiny))
    expected = forward(tiny, ONE).logits
    tiny.forward = torch.compile(tiny.forward, backend="eager")
    torch.testing.assert_close(forward(tiny, ONE).logits, expected, atol=1e-4, rtol=1e-4)
    vlmfix.unpatch(tiny)


def test_a_patched_model_that_is_deleted_is_gone(build: Any) -> None:
    """With its twin for single calls, and whatever it remembered of them."""
    model = build()
    vlmfix.patch(model, "vcd")
    model.generate(**ONE, max_new_tokens=2)
    model.generate(**ONE, max_new_tokens=2, vlmfix="vhr")
    gone = [weakref.ref(model), weakref.ref(next(model.parameters()))]
    del model
    gc.collect()
    assert [each() for each in gone] == [None, None]


def test_a_patched_model_can_be_pickled(tiny: Any) -> None:
    vlmfix.patch(tiny, "pai", layers=":")
    copied = pickle.loads(pickle.dumps(tiny))
    assert torch.equal(forward(copied, ONE).logits, forward(tiny, ONE).logits)
    assert vlmfix.status(copied).edited == vlmfix.status(tiny).edited
    vlmfix.unpatch(copied)
    assert vlmfix.status(copied) is None and vlmfix.status(tiny) is not None
