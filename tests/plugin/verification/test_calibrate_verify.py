"""Weights of self-verification: fits of made-up evidence, and the search on the embedded model."""

from __future__ import annotations

import math
import random

import pytest
from PIL import Image

import vlmfix
from vlmfix.calibration.verify import false_share, fit
from vlmfix.errors import DataError
from vlmfix.evals.benchmarks.coco_objects import ChairMatcher
from vlmfix.evals.testbed import load
from vlmfix.evals.testbed.scenes import image_id, make_scene


def samples(count: int) -> list[vlmfix.CalibrationSample]:
    scenes = [make_scene(image_id("calibration", index)) for index in range(count)]
    return [
        vlmfix.CalibrationSample(
            Image.fromarray(each.pixels), "Please describe this image in detail.", objects=set(each.counts())
        )
        for each in scenes
    ]


def test_the_fit_finds_the_weights_that_made_the_labels() -> None:
    rng, rows = random.Random(0), ([], [])
    for _ in range(6000):
        features = (rng.gauss(0, 2), rng.gauss(0, 2))
        odds = 0.8 * features[0] + 0.3 * features[1] - 0.5
        rows[rng.random() < 1 / (1 + math.exp(-odds))].append(features)
    found = fit(rows[True], rows[False])
    for weight, expected in zip(found, (0.8, 0.3, -0.5), strict=True):
        assert abs(weight - expected) < 0.1


def test_the_share_of_false_words_is_that_of_the_mixture() -> None:
    rng = random.Random(0)
    other = [rng.gauss(-4, 1) for _ in range(3000)]
    own = [rng.gauss(-4, 1) if rng.random() < 0.2 else rng.gauss(4, 1) for _ in range(3000)]
    assert abs(false_share(own, other) - 0.2) < 0.03


def test_the_embedded_model_is_calibrated_with_and_without_labels() -> None:
    model, processor = load("tiny")
    options = {"processor": processor, "mentions": ChairMatcher("original").as_written, "batch_size": 32}
    found = vlmfix.calibrate(model, "verify", samples(64), **options)
    counts = found.provenance["counts"]
    assert counts["true"] > 4 * counts["false"] > 0
    assert 0.2 < found.method.asked_weight < 1.5 and found.method.said_weight > 0
    by_itself = vlmfix.calibrate(model, "verify", samples(64), labels=False, **options)
    assert by_itself.method.asked_weight == 1 and by_itself.method.said_weight == 0
    assert abs(by_itself.method.bias) < 4
    with pytest.raises(DataError, match="at least 8 of each"):
        vlmfix.calibrate(model, "verify", samples(1), **options)
    vlmfix.patch(model, found)
    assert vlmfix.status(model).methods[0].bias == found.method.bias
