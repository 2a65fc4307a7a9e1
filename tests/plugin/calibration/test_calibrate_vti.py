"""``vlmfix.calibrate(model, "vti", ...)``: directions against a plain computation, one sample at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from families.saved_llava import build_tiny_llava
from test_calibrate import PROMPT, encode, picture

import vlmfix
from vlmfix import CalibrationSample, DataError, MethodError
from vlmfix.calibration.vti import made_pairs, masked_image, principal

OBJECTS = [{"dog", "cat"}, {"dog", "person"}, {"cat", "car", "person"}]
SAMPLES = [CalibrationSample(picture(seed), PROMPT, objects=names) for seed, names in enumerate(OBJECTS)]
TRIALS, MASKED = 3, 0.6


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    folder = build_tiny_llava(tmp_path_factory.mktemp("llava"), layers=3, hidden_size=32, kv_heads=2, seed=3)
    return AutoModelForImageTextToText.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)


def calibrated(loaded: tuple[Any, Any], **options: Any) -> Any:
    model, processor = loaded
    options = {"trials": TRIALS, "masked": MASKED, "mask_seed": 4, "batch_size": 2, **options}
    return vlmfix.calibrate(model, "vti", SAMPLES, processor=processor, **options).method.directions


def main_direction(rows: list[np.ndarray]) -> np.ndarray:
    """The mean and the eigenvector of the covariance, whose sign is that of the largest score."""
    table = np.stack(rows).reshape(len(rows), -1)
    mean = table.mean(0)
    component = np.linalg.eigh((table - mean).T @ (table - mean))[1][:, -1]
    scores = (table - mean) @ component
    sign = np.sign(scores[np.abs(scores).argmax()])
    return (mean + sign * component).reshape(rows[0].shape)


def close(found: Any, expected: np.ndarray) -> None:
    np.testing.assert_allclose(np.array(found), expected, atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_directions_of_the_decoder(loaded: tuple[Any, Any]) -> None:
    model, processor = loaded
    rows = []
    for sample, pair in zip(SAMPLES, made_pairs(SAMPLES, 0.5), strict=True):
        states = []
        for caption in pair:
            text = f"USER: <image>\n{PROMPT} ASSISTANT: {caption}"
            inputs = processor(images=[sample.image], text=[text], return_tensors="pt")
            hidden = model(**inputs, output_hidden_states=True).hidden_states
            states.append(np.stack([each[0, -1].double().numpy() for each in hidden]))
        rows.append(states[0] - states[1])
    close(calibrated(loaded, alpha_image=0.0).text, main_direction(rows)[1:])


@torch.no_grad()
@pytest.mark.parametrize("vision_tokens", ["mean", "each"])
def test_directions_of_the_vision_tower(loaded: tuple[Any, Any], vision_tokens: str) -> None:
    model, processor = loaded
    rows = []
    for number, sample in enumerate(SAMPLES):
        pixels = encode(processor, sample)["pixel_values"]
        total: Any = 0
        for trial in range(TRIALS):
            generator = torch.Generator().manual_seed(4 + number * TRIALS + trial)
            total = total + tower(model, masked_image(pixels[0], patch(model), MASKED, generator)[None])
        rows.append(total / TRIALS - tower(model, pixels))
    found = np.array(calibrated(loaded, vision_tokens=vision_tokens).vision)
    if vision_tokens == "mean":
        close(found[:, 0], main_direction([each.mean(1) for each in rows])[1:])
    else:
        for token in range(rows[0].shape[1]):
            close(found[:, token], main_direction([each[:, token] for each in rows])[1:])


def tower(model: Any, pixels: torch.Tensor) -> np.ndarray:
    """All states of all tokens, the embedding's too."""
    hidden = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
    return np.stack([each[0].double().numpy() for each in hidden])


def patch(model: Any) -> int:
    size: int = model.config.vision_config.patch_size
    return size


def test_a_masked_picture_has_its_mean_colour_in_so_many_patches() -> None:
    image = torch.arange(3 * 8 * 8, dtype=torch.float32).view(3, 8, 8)
    masked = masked_image(image, 4, 0.75, torch.Generator().manual_seed(0))
    is_mean = (masked == image.mean((1, 2), keepdim=True)).all(0)
    assert [bool(part.all()) for row in is_mean.split(4) for part in row.split(4, 1)].count(True) == 3
    assert torch.equal(masked[:, ~is_mean], image[:, ~is_mean])
    flat = masked_image(image.reshape(12, 16), 4, 0.5, torch.Generator().manual_seed(0))
    assert int((flat == image.reshape(12, 16).mean(0)).all(1).sum()) == 6


def test_captions_list_what_is_there_and_swap_for_what_goes_together() -> None:
    pairs = made_pairs(SAMPLES, 0.5)
    assert pairs[0] == ("The image shows a cat and a dog.", "The image shows a cat and a car.")
    assert pairs[2] == ("The image shows a car, a cat and a person.", "The image shows a car and a dog.")


def test_the_aligned_component_points_along_the_mean() -> None:
    rows = torch.tensor([[1.0, 3.0], [1.0, -1.0], [1.0, 2.0]])
    released, aligned = principal(rows), principal(rows, "aligned")
    mean = rows.double().mean(0)
    assert (aligned - mean) @ mean > 0 > (released - mean) @ mean
    torch.testing.assert_close((released - mean).abs(), torch.tensor([0.0, 1.0]).double())


def test_a_calibrated_recipe_acts_and_belongs_to_its_checkpoint(loaded: tuple[Any, Any]) -> None:
    model, processor = loaded
    found = vlmfix.calibrate(model, "vti", SAMPLES, processor=processor, trials=1)
    assert found.method == vlmfix.calibrate(model, "vti", SAMPLES, processor=processor, trials=1).method
    inputs = encode(processor, SAMPLES[0])
    stock = model(**inputs).logits
    with vlmfix.patched(model, found):
        assert not torch.equal(model(**inputs).logits, stock)
    name, model.config._name_or_path = model.config._name_or_path, "another/model"
    try:
        with pytest.raises(MethodError, match="Directions do not carry over"):
            vlmfix.patch(model, found)
    finally:
        model.config._name_or_path = name
    assert torch.equal(model(**inputs).logits, stock)


@pytest.mark.parametrize(
    ("samples", "options", "error", "said"),
    [
        (SAMPLES[:1], {}, DataError, "two or more"),
        ([CalibrationSample(picture(seed), PROMPT) for seed in range(2)], {}, DataError, "names none"),
        ([CalibrationSample(picture(0), PROMPT, objects={"dog"})] * 2, {}, DataError, "can be invented"),
        (SAMPLES, {"trials": 0}, MethodError, "trials"),
        (SAMPLES, {"masked": 0.0}, MethodError, "masked"),
        (SAMPLES, {"swapped": 1.5}, MethodError, "swapped"),
        (SAMPLES, {"sign": "other"}, MethodError, "aligned"),
        (SAMPLES, {"directions": "a.json"}, MethodError, "what calibrate finds"),
    ],
)
def test_refusals(loaded: tuple[Any, Any], samples: Any, options: Any, error: Any, said: str) -> None:
    model, processor = loaded
    with pytest.raises(error, match=said):
        vlmfix.calibrate(model, "vti", samples, processor=processor, **options)
