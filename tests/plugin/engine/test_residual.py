"""Edits of the residual stream: the modules they hang on in every family, and what ``generate`` does with them."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
import transformers
from families import FAMILIES, available
from families.test_families import BROKEN
from families.tiny_llava import (
    RAGGED,
    collate,
    forward,
    generate,
    snapshot,
)
from invariants import close
from naive.iri import RANKING

import vlmfix
from vlmfix.methods.base import Method
from vlmfix.model.anatomy import analyse
from vlmfix.model.blocks import BlockKind, find_blocks

IRI = vlmfix.IRI(2.0, 2.0, k1=2, k2=4, ranking=RANKING)
VISTA = vlmfix.VISTA(lam=0.8)
STEERING = vlmfix.VISTA(lam=0.8, sla_alpha=0.0)
MIXING = vlmfix.VISTA(lam=0.0, sla_alpha=0.6, sla_layers=[0, 2])
METHODS = pytest.mark.parametrize(
    "method", [IRI, VISTA, STEERING, MIXING], ids=["iri", "vista", "vista steering", "vista mixing"]
)
ONE = collate([RAGGED[1]])
NOT_ADDITIVE = {
    *("blip2_t5", "florence2", "gemma3n", "glm5_next", "granite4_vision", "granite_docling", "hyperclovax_vision_v2"),
    *("inkling", "inkling2", "lfm3_vl", "mllama", "muse_spark", "nemotron_h_omni", "qwen4_exp"),
}
"""Encoder-decoders, several streams, gated cross-attention."""


def first(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


@dataclass(frozen=True)
class Times(Method):
    """Multiplies what one kind of block adds, in all rows."""

    name: ClassVar[str] = "times"
    edits_blocks: ClassVar[tuple[BlockKind, ...]] = ("attention", "mlp")

    factor: float = 1.5
    kind: str = "mlp"

    @property
    def prompt_rows(self) -> Any:
        return "all"

    def edit_block(self, states: torch.Tensor, block: Any) -> torch.Tensor:
        return self.factor * states if block.kind == self.kind else states


# Which modules.


@pytest.fixture(params=[pytest.param(family.name, marks=pytest.mark.families) for family in FAMILIES])
def family(request: pytest.FixtureRequest) -> Any:
    found = available(request.param)
    return found


def test_blocks_add_up_to_the_residual_stream(family: Any) -> None:
    """What leaves a layer is what entered it plus the outputs of the two modules found, in every family."""
    for (name, version), reason in BROKEN.items():
        if name == family.name and transformers.__version__.startswith(version):
            pytest.skip(f"upstream: {reason}")
    model = family.build()
    anatomy = analyse(model)
    if family.name in NOT_ADDITIVE:
        with pytest.raises(vlmfix.UnsupportedModelError, match="residual stream"):
            find_blocks(anatomy)
        return
    seen: dict[tuple[str, int], torch.Tensor] = {}
    handles = []
    for blocks in find_blocks(anatomy):
        layer, at = blocks.decoder_layer, blocks.layer_idx

        def entering(module: Any, args: Any, kwargs: Any, at: int = at) -> None:
            seen["in", at] = (args[0] if args else kwargs["hidden_states"]).clone()

        def leaving(module: Any, args: Any, output: Any, at: int = at) -> None:
            seen["out", at] = first(output).clone()

        def recorder(kind: str, at: int = at) -> Any:
            return lambda module, args, output: seen.__setitem__((kind, at), first(output).clone())

        handles += [
            layer.register_forward_pre_hook(entering, with_kwargs=True),
            blocks.attention.register_forward_hook(recorder("a")),
            blocks.mlp.register_forward_hook(recorder("m")),
        ]
        gate = getattr(layer, "per_layer_input_gate", None)
        if gate is None:
            handles.append(layer.register_forward_hook(leaving))
        else:  # Gemma 4: a third term and a factor come behind the two
            handles.append(gate.register_forward_pre_hook(lambda m, x, at=at: seen.__setitem__(("out", at), x[0])))
    try:
        family.forward(model, family.collate(family.ragged()))
    finally:
        for handle in handles:
            handle.remove()
    assert {at for _, at in seen} == set(range(anatomy.num_layers))
    for at in range(anatomy.num_layers):
        before = seen["in", at]
        added = seen["a", at].view(before.shape), seen["m", at].view(before.shape)
        close(before + added[0] + added[1], seen["out", at])
        assert all(float(each.abs().mean()) > 1e-3 for each in added)


@dataclass(frozen=True)
class TimesImage(Method):
    """Multiplies the image's tokens where they enter the first layer."""

    name: ClassVar[str] = "times_image"
    edits_blocks: ClassVar[tuple[BlockKind, ...]] = ("embedding",)

    factor: float = 1.5

    def edit_block(self, states: torch.Tensor, block: Any) -> torch.Tensor:
        assert (block.kind, block.layer_idx) == ("embedding", 0)
        return self.factor * states


@pytest.mark.parametrize("layers", [None, [2]])
@pytest.mark.parametrize("text", ["llama", "gemma2"])
def test_the_image_is_edited_where_it_enters_the_first_layer(build: Any, text: str, layers: Any) -> None:
    model = build(text)
    inputs = collate(RAGGED[:3])
    image = analyse(model).is_image(inputs["input_ids"])

    def scaled(module: Any, args: Any, kwargs: Any) -> Any:
        states = args[0] if args else kwargs["hidden_states"]
        new = torch.where(image[..., None], 1.5 * states, states) if states.shape[1] > 1 else states
        return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": new})

    _, stock = generate(model, inputs)
    handle = analyse(model).decoder_layers[0].register_forward_pre_hook(scaled, with_kwargs=True)
    expected_ids, expected = generate(model, inputs)
    handle.remove()
    vlmfix.patch(model, TimesImage(layers=layers))
    ids, logits = generate(model, inputs)
    assert torch.equal(ids, expected_ids)
    close(logits, expected)
    assert not torch.equal(logits[0], stock[0])
    assert torch.equal(logits[2], stock[2])  # without a picture
    status = vlmfix.status(model)
    assert status.edited == (int(image.sum()),)
    assert abs(status.moved[0] - 0.5) < 1e-5
    assert torch.equal(generate(model, inputs, vlmfix=None)[1], stock)


def test_a_layer_of_unknown_parts_is_refused(tiny: Any) -> None:
    tiny.model.language_model.layers[2].extra = torch.nn.Linear(2, 2)
    before = snapshot(tiny)
    with pytest.raises(vlmfix.UnsupportedModelError, match="extra"):
        vlmfix.patch(tiny, IRI)
    assert snapshot(tiny) == before
    vlmfix.patch(tiny, "vhr")  # nothing else needs them


@pytest.mark.parametrize("kind", ["attention", "mlp"])
@pytest.mark.parametrize("text", ["llama", "gemma2"])
def test_an_edit_equals_a_hook_by_hand(build: Any, kind: str, text: str) -> None:
    model = build(text)
    layer = model.model.language_model.layers[1]
    names = {"attention": "post_attention_layernorm", "mlp": "post_feedforward_layernorm"}
    module = (
        getattr(layer, names[kind]) if text == "gemma2" else (layer.self_attn if kind == "attention" else layer.mlp)
    )

    def double(module: Any, args: Any, output: Any) -> Any:
        return (2 * output[0], *output[1:]) if isinstance(output, tuple) else 2 * output

    handle = module.register_forward_hook(double)
    expected = generate(model, ONE, 4)[1]
    handle.remove()
    stock = generate(model, ONE, 4)[1]
    vlmfix.patch(model, Times(2.0, kind, layers=[1]))
    close(generate(model, ONE, 4)[1], expected)
    assert (expected - stock).abs().max() > 0.05
    rows = int(ONE["attention_mask"].sum()) + 3
    assert vlmfix.status(model).edited == (rows,)


def test_rows_that_are_not_up_for_edits_stay(tiny: Any) -> None:
    """In a ragged batch, padding and the prompt without an image keep every bit of a block's output."""
    inputs = collate(RAGGED)
    seen: list[torch.Tensor] = []
    mlp = tiny.model.language_model.layers[0].mlp
    stock = mlp.register_forward_hook(lambda module, args, output: seen.append(output.clone()))
    vlmfix.patch(tiny, Times(3.0, layers=[0]))
    after = mlp.register_forward_hook(lambda module, args, output: seen.append(output.clone()))
    forward(tiny, inputs)
    stock.remove(), after.remove()
    before, edited = seen
    rows = inputs["attention_mask"].bool()
    rows[2] = False
    assert torch.equal(edited[~rows], before[~rows])
    assert torch.equal(edited[rows], 3 * before[rows])


# What is left behind.


def test_attention_modules_stay_as_they_are(tiny: Any) -> None:
    """Methods on blocks alone need no config copies: any kernel goes on as it was."""
    vlmfix.patch(tiny, [IRI, VISTA])
    assert all(layer.self_attn.config is tiny.config.text_config for layer in tiny.model.language_model.layers)


@METHODS
def test_an_exception_in_the_middle_leaves_nothing_behind(tiny: Any, method: Any) -> None:
    vlmfix.patch(tiny, method)
    expected = generate(tiny, ONE, 3)[1]

    def fail(module: Any, args: Any) -> None:
        raise RuntimeError("stop")

    handle = tiny.model.language_model.layers[2].mlp.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="stop"):
        generate(tiny, ONE, 3)
    handle.remove()
    hidden = torch.randn(1, 2, 32)
    mlp = tiny.model.language_model.layers[2].mlp
    vlmfix.unpatch(copied := copy.deepcopy(tiny))
    with torch.no_grad():  # a module called by itself is not taken for a part of the broken forward
        assert torch.equal(mlp(hidden), copied.model.language_model.layers[2].mlp(hidden))
    assert torch.equal(generate(tiny, ONE, 3)[1], expected)


# Generation.


@METHODS
def test_beside_a_contrast_only_the_own_branch_is_edited(tiny: Any, method: Any) -> None:
    """A contrast of almost no strength leaves what the method does alone, also in steps of both branches at once."""
    vlmfix.patch(tiny, method)
    alone = generate(tiny, collate(RAGGED), 4)[1]
    edited = vlmfix.status(tiny).edited
    weak = vlmfix.VCD(alpha=1e-6, beta=0.0)
    vlmfix.patch(tiny, [method, weak])
    torch.testing.assert_close(generate(tiny, collate(RAGGED), 4)[1], alone, atol=1e-4, rtol=1e-4)
    assert vlmfix.status(tiny).edited[0] == edited[0]
    strong = vlmfix.VCD(alpha=1.0, beta=0.0)
    vlmfix.patch(tiny, [method, strong])
    assert (generate(tiny, collate(RAGGED), 2)[1] - alone[:, :2]).abs().max() > 0.05


@METHODS
def test_two_models_taking_turns_do_not_meet(build: Any, method: Any) -> None:
    """One model's forward runs inside another's, in the same thread."""
    outer, inner = build(), build(seed=3)
    vlmfix.patch(inner, method)
    expected_inner = forward(inner, ONE).logits
    vlmfix.patch(outer, method)
    expected = forward(outer, ONE).logits
    found = []

    def visit(module: Any, args: Any) -> None:
        found.append(forward(inner, ONE).logits)

    outer.model.language_model.layers[1].mlp.register_forward_pre_hook(visit)
    assert torch.equal(forward(outer, ONE).logits, expected)
    assert torch.equal(found[0], expected_inner)


@METHODS
def test_a_prompt_alone_may_be_scored_without_a_cache(tiny: Any, method: Any) -> None:
    vlmfix.patch(tiny, method)
    one, two = forward(tiny, ONE).logits, forward(tiny, ONE, use_cache=False).logits
    assert torch.equal(one, two)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.gpu
@METHODS
def test_a_gpu_agrees_with_the_cpu(tiny: Any, method: Any) -> None:
    vlmfix.patch(tiny, method)
    expected = generate(tiny, collate(RAGGED), 4)[1]
    inputs = {name: value.cuda() for name, value in collate(RAGGED).items()}
    torch.testing.assert_close(generate(tiny.cuda(), inputs, 4)[1].cpu(), expected, atol=1e-3, rtol=1e-3)


# torch.compile.


# A conversation.
