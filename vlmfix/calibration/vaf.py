"""Heads for VAF: in every layer, the half that looks most at the image."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence

import torch

from vlmfix.calibration.session import Contrast, Found, Session
from vlmfix.errors import DataError
from vlmfix.methods.vaf import VAF
from vlmfix.observe.samples import CalibrationSample
from vlmfix.probes.image_attention import attention_to_image

logger = logging.getLogger("vlmfix")


LEARNED = ("heads",)


def search(session: Session, samples: Sequence[CalibrationSample], method: VAF) -> Found:
    """Find image-centric heads: per layer of the method, the half that looks most at the image.

    A head's score is its attention to the image in the prompt's last row, averaged over the samples. This costs
    one prefill per sample.

    Raises:
        DataError: No sample with finite attention.
    """
    mean, counts = image_mass(session, samples, "vaf")
    half = max(session.anatomy.num_heads // 2, 1)
    heads = tuple(
        (layer, head)
        for layer in session.layers(method.bind(session.anatomy).layer_indices)
        for head in sorted(mean[session.layers().index(layer)].argsort(descending=True, stable=True)[:half].tolist())
    )
    return Found(dataclasses.replace(method, heads=heads), counts, {"image_mass": mean}, session.layers())


def image_mass(
    session: Session, samples: Sequence[CalibrationSample], name: str
) -> tuple[torch.Tensor, dict[str, int]]:
    """Return every head's attention to the image in the prompt's last row, in the mean over the samples.

    Args:
        session: The model.
        samples: Any.
        name: The method that asks, for the log.

    Returns:
        ``[layers, num_heads]``, and what it rests on.

    Raises:
        DataError: No sample with finite attention.
    """
    masses = Contrast()
    for _, inputs in session.batches(samples):
        with session.acting():
            looks = attention_to_image(session.model, inputs)
        for mass in looks.mass[:, 0]:
            masses.add(mass, positive=True)
        logger.info("%s: %d of %d prompts", name, masses.counts[True], len(samples))
    if not masses.counts[True]:
        raise DataError(f"No finite attention in {len(samples)} samples. Load the model with another dtype.")
    return masses.mean(True), {"prompts": masses.counts[True], "dropped": masses.dropped}
