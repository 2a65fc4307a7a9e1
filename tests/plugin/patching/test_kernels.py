"""Kernels and classes in the place of a model's own: what the model computes with them, or a refusal that says so."""

from __future__ import annotations

import copy
import inspect
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from families import available
from families.tiny_llava import RAGGED, collate, forward, generate
from method_parameters import parameters_of
from torch import nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask
from transformers.models.llama.modeling_llama import LlamaAttention, apply_rotary_pos_emb, repeat_kv

import vlmfix

ONE = collate([RAGGED[0]])
IN_ATTENTION = ("pai", "vhr", "act", "mma", "sid")


def projected(self: Any, hidden_states: torch.Tensor, position_embeddings: Any) -> tuple[torch.Tensor, ...]:
    shape = (*hidden_states.shape[:-1], -1, self.head_dim)
    states = [each(hidden_states).view(shape).transpose(1, 2) for each in (self.q_proj, self.k_proj, self.v_proj)]
    return (*apply_rotary_pos_emb(*states[:2], *position_embeddings), states[2])


class ByItself:
    """Attention as a fused kernel computes it: everything inside, past transformers' interface."""

    def forward(
        self: Any, hidden_states: Any, position_embeddings: Any, attention_mask: Any, past_key_values: Any, **_: Any
    ) -> tuple[torch.Tensor, None]:
        query, key, value = projected(self, hidden_states, position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        key, value = (repeat_kv(each, self.num_key_value_groups) for each in (key, value))
        is_causal = attention_mask is None and query.shape[2] > 1
        out = F.scaled_dot_product_attention(query, key, value, attention_mask, is_causal=is_causal)
        return self.o_proj(out.transpose(1, 2).flatten(2)), None


class Layer:
    """A decoder layer in one piece: it calls none of its blocks."""

    def forward(self: Any, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        entered = self.input_layernorm(hidden_states)
        states = hidden_states + self.self_attn.forward(hidden_states=entered, **kwargs)[0]
        return states + self.mlp.forward(self.post_attention_layernorm(states))


class Mixer(nn.Module):
    """Attention under another name, which goes through transformers' interface."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__()
        stock = LlamaAttention(config, layer_idx)
        vars(self).update({name: value for name, value in vars(stock).items() if name != "training"})

    def forward(
        self, hidden_states: Any, position_embeddings: Any, attention_mask: Any, past_key_values: Any, **kwargs: Any
    ) -> Any:
        query, key, value = projected(self, hidden_states, position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend = AttentionInterface()[self.config._attn_implementation]
        out, weights = attend(self, query, key, value, attention_mask, scaling=self.scaling, dropout=0.0, **kwargs)
        return self.o_proj(out.flatten(2)), weights


def kernelize(model: nn.Module, kernel: type[Any], path: str | tuple[str, ...]) -> None:
    """Do to some modules what ``kernels.kernelize`` does."""
    for name, module in model.named_modules():
        if name.startswith("model.language_model.layers") and name.endswith(path):
            module.forward = types.MethodType(kernel.forward, module)


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("name", IN_ATTENTION)
def test_an_attention_kernel_that_hides_attention_is_refused(tiny: Any, name: str, order: str) -> None:
    options = parameters_of(name, tiny)
    if order == "after":
        vlmfix.patch(tiny, name, **options)
    kernelize(tiny, ByItself, "self_attn")
    if order == "before":
        vlmfix.patch(tiny, name, **options)
    for call in (forward, lambda model, inputs: generate(model, inputs, 3)):
        with pytest.raises(vlmfix.UnsupportedFeatureError, match=r"passed by .*self_attn.*use_kernels=False.*unpatch"):
            call(tiny, ONE)


def test_one_layer_with_a_kernel_is_enough(tiny: Any) -> None:
    kernelize(tiny, ByItself, "1.self_attn")
    vlmfix.patch(tiny, "pai", layers="2:")
    forward(tiny, ONE)  # the method does not act there
    vlmfix.patch(tiny, "pai", layers=":")
    with pytest.raises(vlmfix.UnsupportedFeatureError, match=r"passed by the attention of \S*layers.1.self_attn,"):
        forward(tiny, ONE)
    assert torch.isfinite(forward(tiny, collate([RAGGED[2]])).logits).all()  # without an image


def test_methods_that_need_no_attention_module_act_beside_such_a_kernel(tiny: Any) -> None:
    for name in ("vcd", "vista", "deco"):
        with vlmfix.patched(copy.deepcopy(tiny), name) as plain:
            expected = generate(plain, ONE, 3)[1]
        model = copy.deepcopy(tiny)
        kernelize(model, ByItself, "self_attn")
        vlmfix.patch(model, name)
        torch.testing.assert_close(generate(model, ONE, 3)[1], expected, atol=1e-4, rtol=1e-4)


def test_opera_needs_the_attention_of_one_layer(tiny: Any) -> None:
    vlmfix.patch(tiny, "opera", num_beams=2)
    kernelize(tiny, ByItself, "self_attn")
    said = "passed by the attention whose weights opera reads|opera reads a prompt in one|opera looks ahead on a cache"
    with pytest.raises(vlmfix.UnsupportedFeatureError, match=said):
        tiny.generate(**ONE, max_new_tokens=3)


@pytest.mark.parametrize("name", ["vista", "iri", "vti", "memvr", "pai", "var"])
def test_a_layer_in_one_piece_is_refused_or_right(tiny: Any, name: str) -> None:
    options = parameters_of(name, tiny)
    with vlmfix.patched(copy.deepcopy(tiny), name, **options) as plain:
        expected = forward(plain, ONE).logits
    kernelize(tiny, Layer, ("layers.0", "layers.1", "layers.2", "layers.3"))
    vlmfix.patch(tiny, name, **options)
    if name in ("pai", "var"):  # its attention still goes through the interface
        torch.testing.assert_close(forward(tiny, ONE).logits, expected, atol=1e-5, rtol=1e-5)
    else:
        with pytest.raises(vlmfix.UnsupportedFeatureError, match=r"passed by .* block of layer \d"):
            forward(tiny, ONE)


def test_a_layer_of_the_vision_tower_in_one_piece_is_refused(tiny: Any) -> None:
    class Whole:
        def forward(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            output = hidden_states + self.mlp.forward(self.layer_norm2(hidden_states))
            return (output,) if returns_tuple else output

    layer = next(module for module in tiny.model.vision_tower.modules() if type(module).__name__ == "CLIPEncoderLayer")
    returns_tuple = "tuple" in str(inspect.signature(layer.forward).return_annotation).lower()
    vlmfix.patch(tiny, "vti", **parameters_of("vti", tiny))
    layer.forward = types.MethodType(Whole.forward, layer)
    with pytest.raises(vlmfix.UnsupportedFeatureError, match="passed by the mlp of layer 0 of the vision tower"):
        forward(tiny, ONE)
    forward(tiny, ONE, vlmfix=None)


def test_layers_left_out_on_purpose_are_not_missed(tiny: Any) -> None:
    """As early exit and layer dropping do."""
    vlmfix.patch(tiny, "pai", layers=":")
    tiny.train()
    kernelize(tiny, ByItself, "3.self_attn")
    forward(tiny, ONE)
    tiny.eval()
    tiny.config.text_config.num_hidden_layers = 3
    forward(tiny, ONE)


# Kernels of norms, activations and functions change nothing for a patch.


class Norm(nn.Module):
    """A kernel of a norm."""

    variance_epsilon: float
    weight: torch.Tensor

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)


@pytest.mark.parametrize("name", ["vhr", "deco"])
def test_kernels_of_norms_are_right_before_and_after(tiny: Any, name: str) -> None:
    with vlmfix.patched(copy.deepcopy(tiny), name) as plain:
        expected = generate(plain, ONE, 3)[1]
    for order in ("before", "after"):
        model = copy.deepcopy(tiny)
        if order == "after":
            vlmfix.patch(model, name)
        kernelize(model, Norm, "norm")
        if order == "before":
            vlmfix.patch(model, name)
        torch.testing.assert_close(generate(model, ONE, 3)[1], expected, atol=1e-3, rtol=1e-3)
        assert vlmfix.status(model).moved[0] > 1e-4


def test_the_kernels_package_itself(tiny: Any) -> None:
    kernels = pytest.importorskip("kernels", reason="the kernels package is not installed")

    class Repository:
        layer_name = "Attention"

        def __init__(self, kernel: type) -> None:
            self.kernel = type("Attention", (nn.Module,), {"forward": kernel.forward})

        def load(self) -> type:
            return self.kernel

    kernels.replace_kernel_forward_from_hub(LlamaAttention, "Attention")
    try:
        vlmfix.patch(tiny, "pai", layers=":")
        expected = forward(tiny, ONE).logits
        for kernel in (Mixer, ByItself):
            with kernels.use_kernel_mapping({"Attention": {"cpu": Repository(kernel)}}, inherit_mapping=False):
                kernels.kernelize(tiny, mode=kernels.Mode.INFERENCE, device="cpu")
            if kernel is Mixer:
                torch.testing.assert_close(forward(tiny, ONE).logits, expected)
        with pytest.raises(vlmfix.UnsupportedFeatureError, match="use_kernels=False"):
            forward(tiny, ONE)
    finally:
        del LlamaAttention.kernel_layer_name


# Attention functions of the hub, as transformers registers them.


def hub_attention(module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: Any = None, **_: Any) -> Any:
    """Flash attention by hand: queries are the last of the keys, the mask is 2-D, and the config names the kernel."""
    assert module.config._attn_implementation == "someone/attention"
    q_len, keys = query.shape[2], key.shape[2]
    key, value = (repeat_kv(each, module.num_key_value_groups) for each in (key, value))
    allowed = torch.ones(q_len, keys, dtype=torch.bool).tril(keys - q_len)[None, None]
    if mask is not None:
        allowed = allowed & mask[:, None, None, -keys:].bool()
    out = F.scaled_dot_product_attention(query, key, value, allowed | ~allowed.any(-1, keepdim=True), scale=scaling)
    return out.transpose(1, 2), None


@pytest.fixture
def hub_kernel() -> Iterator[str]:
    name = "someone/attention"
    AttentionInterface.register(name, hub_attention)
    AttentionMaskInterface.register(name, flash_attention_mask)
    yield name
    del AttentionInterface._global_mapping[name], AttentionMaskInterface._global_mapping[name]


def lead_to(model: Any, name: str) -> None:
    """Without asking the hub for it."""
    model.config.text_config._attn_implementation_internal = name


@pytest.mark.parametrize(
    ("name", "order"), [("pai", "before"), ("vhr", "after"), ("var", "before"), ("act", "after"), ("vcd", "before")]
)
def test_attention_functions_of_the_hub(tiny: Any, hub_kernel: str, name: str, order: str) -> None:
    inputs, options = collate(RAGGED), parameters_of(name, tiny)

    def answers(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
        first = generate(model, inputs, 3)[1]
        cache = forward(model, ONE, use_cache=True).past_key_values  # a further turn has more keys than queries
        for ids in (torch.tensor([[5]]), torch.arange(6, 12)[None]):
            mask = torch.ones(1, cache.get_seq_length() + ids.shape[1], dtype=torch.long)
            last = model(input_ids=ids, attention_mask=mask, past_key_values=cache)
        return first, last.logits

    with vlmfix.patched(copy.deepcopy(tiny), name, **options) as plain:
        expected = answers(plain)
    if order == "after":
        vlmfix.patch(tiny, name, **options)
    lead_to(tiny, hub_kernel)
    if order == "before":
        vlmfix.patch(tiny, name, **options)
    for found, right in zip(answers(tiny), expected, strict=True):
        torch.testing.assert_close(found, right, atol=1e-3, rtol=1e-3)


# Classes that transformers puts in the place of a model's own while it builds it.


def exchanged(model: Any, kind: type) -> Any:
    """The same model with another class for its attention."""
    patching = pytest.importorskip("transformers.monkey_patching", reason="this transformers exchanges no classes")
    # transformers writes into the classes of models which modules show their attention maps, and leaves that there.
    kinds = {type(module) for module in model.modules()}
    recording = {each: copy.deepcopy(found) for each in kinds if (found := getattr(each, "_can_record_outputs", None))}
    patching.register_patch_mapping({"LlamaAttention": kind})
    try:
        with patching.apply_patches():
            made = type(model)(copy.deepcopy(model.config)).eval()
    finally:
        patching.clear_patch_mapping()
        for each, recorders in recording.items():
            each._can_record_outputs.clear()
            each._can_record_outputs.update(recorders)
    made.load_state_dict(model.state_dict())
    assert type(made.model.language_model.layers[0].self_attn) is kind
    return made


@pytest.mark.parametrize("kind", [Mixer, type("Fast", (LlamaAttention,), {})])
def test_an_exchanged_class_that_goes_through_the_interface(tiny: Any, kind: type) -> None:
    model = exchanged(tiny, kind)
    for name in ("pai", "vhr", "var", "vista"):
        options = parameters_of(name, tiny)
        with vlmfix.patched(tiny, name, **options), vlmfix.patched(model, name, **options):
            found, expected = (generate(each, ONE, 3)[1] for each in (model, tiny))
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_an_exchanged_class_that_hides_attention(tiny: Any) -> None:
    model = exchanged(tiny, type("Fused", (ByItself, LlamaAttention), {}))
    vlmfix.patch(model, "vhr")
    with pytest.raises(vlmfix.UnsupportedFeatureError, match="register_patch_mapping"):
        generate(model, ONE, 3)


def test_a_norm_and_an_mlp_fused_into_one(tiny: Any) -> None:
    """As ``kernel_config`` fuses children of a module: the first becomes the kernel, the others ``nn.Identity``."""

    class Both(nn.Module):
        def __init__(self, *children: nn.Module) -> None:
            super().__init__()
            self.inside = nn.Sequential(*children)

        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return self.inside(hidden_states)

    with vlmfix.patched(copy.deepcopy(tiny), "pai") as plain:
        expected = forward(plain, ONE).logits
    for layer in tiny.model.language_model.layers:
        layer.post_attention_layernorm = Both(layer.post_attention_layernorm, layer.mlp)
        layer.mlp = nn.Identity()
    with pytest.raises(vlmfix.UnsupportedModelError, match="one MLP"):
        vlmfix.patch(tiny, "vista")
    vlmfix.patch(tiny, "pai")
    assert torch.equal(forward(tiny, ONE).logits, expected)


def test_patch_embeddings_fused_as_the_config_asks() -> None:
    fusion = pytest.importorskip("transformers.fusion_mapping", reason="this transformers fuses no modules")
    from transformers import conversion_mapping, monkey_patching

    family = available("qwen2_vl")
    model, inputs = family.build(), family.collate([family.single()])
    before = copy.copy(conversion_mapping._checkpoint_conversion_mapping_cache)
    try:
        fusion.register_fusion_patches(type(model), model.config, {"patch_embeddings": True})
        with monkey_patching.apply_patches():
            fused = type(model)(copy.deepcopy(model.config)).eval()
        fused.load_state_dict(model.state_dict(), strict=False)
        fused.generation_config = model.generation_config  # which bans words
        weight = fused.get_submodule("model.visual.patch_embed.linear_proj").weight.data
        weight.copy_(model.get_submodule("model.visual.patch_embed.proj").weight.flatten(1))
        for name in ("pai", "vcd"):
            with vlmfix.patched(model, name), vlmfix.patched(fused, name):
                found, expected = (generate(each, inputs, 2)[1] for each in (fused, model))
                torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    finally:
        monkey_patching.clear_patch_mapping()
        conversion_mapping._checkpoint_conversion_mapping_cache = before
