"""Families whose image is not among the decoder's tokens: what is refused, and what happens out of sight."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch

import vlmfix
from families import Family
from families.altered import ACTING, CROSS, EMBEDDED, ENCODED, EVERY, PAI, VHR, build, gap, logits
from vlmfix.model.anatomy import analyse
from vlmfix.model.images import first_looks

# Refusals.

REFUSED = [
    *(
        (name, method, {}, "all keys of its cross-attention are image keys")
        for name in CROSS
        for method in ("pai", "var")
    ),
    ("mllama", "mma", {}, "all keys of its cross-attention are image keys"),
    ("mllama", "act", {"recipients": "image"}, "no row weighs the image against text"),
    ("idefics", "spin", {"score": "mass"}, "no row weighs the image against text"),
    *((name, method, {}, "an encoder reads its prompt") for name in ENCODED for method in ("var", "mma", "iat", "eah")),
    ("florence2", "adaptvis", {}, "an encoder reads its prompt"),
    ("florence2", "vaf", {"heads": "visual"}, "an encoder reads its prompt"),
    ("mllama", "spin", {"layers": [0, 2]}, r"acts in is in layers \[1, 3\]"),
    ("mllama", "allpath", {"up_heads": [(0, 1), (1, 1)]}, r"heads are listed in layers \[1\] too"),
    ("mllama", "vhr", {"layers": [1]}, r"acts in is in layers \[0, 2, 4\]"),
]


@pytest.mark.parametrize(("name", "method", "parameters", "reason"), REFUSED, ids=lambda value: str(value)[:12])
def test_what_a_method_does_not_mean_is_refused_with_the_reason(
    name: str, method: str, parameters: dict[str, Any], reason: str
) -> None:
    _, model = build(name)
    with pytest.raises(vlmfix.MethodError, match=reason):
        vlmfix.patch(model, method, **parameters)
    assert vlmfix.status(model) is None
    assert not model._forward_pre_hooks


# Embeddings and encoders out of sight.


def _merged(family: Family, model: Any) -> dict[str, torch.Tensor]:
    """What ``generate`` of BLIP-2 calls its language model with."""
    caught: list[dict[str, torch.Tensor]] = []

    def hook(module: Any, args: Any, kwargs: Any) -> None:
        caught.append({"inputs_embeds": kwargs["inputs_embeds"].clone()})

    handle = model.language_model.register_forward_pre_hook(hook, with_kwargs=True)
    logits(model, family.collate([family.single()]), 1)
    handle.remove()
    return caught[0]


@pytest.mark.parametrize("name", EMBEDDED)
def test_embeddings_of_unseen_images_are_refused(name: str) -> None:
    family, model = build(name)
    inputs = family.collate([family.single()])
    merged = _merged(family, model)
    stock = logits(model, inputs, 1)
    vlmfix.patch(model, "pai", **PAI)
    with pytest.raises(vlmfix.UnsupportedFeatureError, match="pixel_values"), torch.no_grad():
        model.language_model(**merged)
    changed = logits(model, inputs, 1)
    with torch.no_grad():
        seen = model.language_model(**merged).logits[:, -1]  # the same features have left the projector since
    assert gap(seen, changed[:, 0]) < 1e-5 < 1e-3 < gap(changed, stock)
    failed: list[BaseException] = []

    def elsewhere() -> None:
        try:
            model.language_model(**merged)
        except vlmfix.UnsupportedFeatureError as error:
            failed.append(error)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert len(failed) == 1  # another thread's images are not this one's


@pytest.mark.parametrize("name", EMBEDDED)
def test_the_language_model_inside_answers_text_like_the_stock_model(name: str) -> None:
    _, model = build(name)
    ids = torch.tensor([[1, 20, 30, 40]])
    with torch.no_grad():
        embeds = model.language_model.get_input_embeddings()(ids)
        stock = model.language_model(input_ids=ids).logits
        vlmfix.patch(model, "vhr", **VHR)
        assert torch.equal(model.language_model(input_ids=ids).logits, stock)
        assert torch.equal(model.language_model(inputs_embeds=embeds).logits, stock)
    status = vlmfix.status(model)
    assert status is not None
    assert (status.prompts, status.prompts_without_image) == (2, 2)


@pytest.mark.parametrize("name", ENCODED)
def test_encoder_outputs_from_elsewhere_are_refused(name: str) -> None:
    family, model = build(name)
    inputs = family.collate([family.single()])
    language_model = getattr(model, "language_model", model)
    vlmfix.patch(model, "pai", **PAI)
    states = torch.randn(1, inputs["input_ids"].shape[1], 32)
    with pytest.raises(vlmfix.UnsupportedFeatureError, match="encoder_outputs"), torch.no_grad():
        language_model(encoder_outputs=(states,), decoder_input_ids=inputs["decoder_input_ids"])


def test_rows_at_which_images_come_into_view_stand_for_them() -> None:
    """Idefics names no placeholder. ``looks`` may also show an image to all tokens, padding included."""
    looks = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])[..., None]
    ids, valid = torch.zeros(2, 5, dtype=torch.long), torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    inputs = {"input_ids": ids, "image_attention_mask": looks, "attention_mask": valid}
    assert first_looks(inputs, 0).int().tolist() == [[0, 0, 1, 0, 0], [0, 0, 1, 0, 0]]
    second = torch.cat([looks, torch.tensor([[0, 0, 0, 0, 1], [0] * 5])[..., None]], dim=2)
    inputs["image_attention_mask"] = second
    assert first_looks(inputs, 0).int().tolist() == [[0, 0, 1, 0, 1], [0, 0, 1, 0, 0]]
    assert first_looks({**inputs, "attention_mask": torch.ones(2, 9)}, 4).int().tolist() == [[0, 0, 1, 0, 1], [0] * 5]
    assert not first_looks({"input_ids": ids}, 0).any()


@pytest.mark.parametrize("name", ENCODED)
def test_two_prompts_may_be_answered_in_turns(name: str) -> None:
    """A contrast keeps two encoded prompts alive; each has images of its own."""
    family, model = build(name)
    one, two = (family.collate([sample]) for sample in family.even()[:2])
    vlmfix.patch(model, "pai", **PAI)
    alone = [family.forward(model, inputs).logits for inputs in (one, two)]
    language_model = getattr(model, "language_model", model)
    kept: list[Any] = []
    handle = analyse(model).encoder.register_forward_hook(lambda module, args, output: kept.append(output))  # type: ignore[union-attr]
    for inputs in (one, two):
        family.forward(model, inputs)
    handle.remove()
    for inputs, outputs, expected in zip((one, two), kept, alone, strict=True):
        with torch.no_grad():
            again = language_model(
                encoder_outputs=outputs,
                attention_mask=inputs["attention_mask"],
                decoder_input_ids=inputs["decoder_input_ids"],
            )
        assert gap(again.logits, expected) < 1e-5


@pytest.mark.parametrize("name", EVERY)
def test_a_deep_copy_is_patched_and_independent(name: str) -> None:
    family, model = build(name)
    inputs = family.collate([family.single()])
    stock = logits(model, inputs)
    method, parameters = ACTING[name][0]
    vlmfix.patch(model, method, **parameters)
    changed = logits(model, inputs)
    other = copy.deepcopy(model)
    vlmfix.unpatch(model)
    assert torch.equal(logits(model, inputs), stock)
    assert torch.equal(logits(other, inputs), changed)
    vlmfix.unpatch(other)
    assert torch.equal(logits(other, inputs), stock)


# Continuous batching.


def test_continuous_batching_is_refused_to_the_caller(tiny: Any) -> None:
    if not hasattr(tiny, "generate_batch"):
        pytest.skip("this version of transformers has no continuous batching")
    ids = [[1, 20, 30, 40]]
    vlmfix.patch(tiny, "none")
    with pytest.raises(vlmfix.UnsupportedFeatureError, match="Continuous batching"):
        tiny.generate_batch(ids, max_new_tokens=2)
    with pytest.raises(vlmfix.UnsupportedFeatureError, match="Continuous batching"):
        tiny.generate(torch.tensor(ids), cache_implementation="paged", max_new_tokens=2)
    with pytest.raises(vlmfix.UnsupportedFeatureError), tiny.continuous_batching_context_manager():
        pass
    copied = copy.deepcopy(tiny)
    vlmfix.unpatch(tiny)
    for model in (tiny, vlmfix.unpatch(copied)):
        assert model.init_continuous_batching.__func__ is type(model).init_continuous_batching


def test_continuous_batching_of_the_language_model_inside_is_refused() -> None:
    family, model = build("blip2_opt")
    if not hasattr(model, "generate_batch"):
        pytest.skip("this version of transformers has no continuous batching")
    vlmfix.patch(model, "none")
    with pytest.raises(vlmfix.UnsupportedFeatureError, match="Continuous batching"):
        model.generate(**family.collate([family.single()]), cache_implementation="paged", max_new_tokens=2)
