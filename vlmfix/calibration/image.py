"""What is learned from prompts alone: image-centric heads (VAF) and sink dimensions (VAR)."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence

import torch

from vlmfix.calibration.search import Contrast, Found
from vlmfix.calibration.session import Session
from vlmfix.errors import DataError
from vlmfix.methods.vaf import VAF
from vlmfix.methods.var import VAR
from vlmfix.model.sink_dims import find_sink_dims
from vlmfix.observe.samples import CalibrationSample
from vlmfix.observe.tokens import prompt_tokens
from vlmfix.probes.image_attention import attention_to_image

logger = logging.getLogger("vlmfix")


def search_vaf(session: Session, samples: Sequence[CalibrationSample], method: VAF) -> Found:
    """Find image-centric heads: per layer of the method, the half that looks most at the image.

    A head's score is its attention to the image in the prompt's last row, in the mean over the samples. Costs one
    prefill per sample.

    Raises:
        DataError: No sample with finite attention.
    """
    masses = Contrast()
    for _, inputs in session.batches(samples):
        with session.acting():
            looks = attention_to_image(session.model, inputs)
        for mass in looks.mass[:, 0]:
            masses.add(mass, positive=True)
        logger.info("vaf: %d of %d prompts", masses.counts[True], len(samples))
    if not masses.counts[True]:
        raise DataError(f"No finite attention in {len(samples)} samples. Load the model with another dtype.")
    mean = masses.mean(True)
    layers = [layer for layer in method.bind(session.anatomy).layer_indices if layer in session.layers()]
    half = max(session.anatomy.num_heads // 2, 1)
    best = {at: mean[session.layers().index(at)].argsort(descending=True, stable=True)[:half].tolist() for at in layers}
    heads = tuple((layer, head) for layer in layers for head in sorted(best[layer]))
    counts = {"prompts": masses.counts[True], "dropped": masses.dropped}
    return Found(dataclasses.replace(method, heads=heads), counts, {"image_mass": mean}, session.layers())


def search_var(session: Session, samples: Sequence[CalibrationSample], method: VAR) -> Found:
    """Find the hidden dimensions that mark sinks, on the samples' prompts (see ``vlmfix.find_sink_dims``).

    Images are left out of the prompts and all are cut to the length of the shortest: what is looked at is the first
    token, which sees nothing else. Costs one text prefill per sample.
    """
    rows = []
    for _, inputs in session.batches(samples):
        tokens = prompt_tokens(session.anatomy, inputs)
        rows += [ids[keep] for ids, keep in zip(inputs["input_ids"], tokens.valid & ~tokens.image, strict=True)]
    length = min(len(row) for row in rows)
    if not length:
        raise DataError("A prompt holds nothing but the image. Pass prompt=... to make one with text.")
    dims = find_sink_dims(session.model, torch.stack([row[:length] for row in rows]))
    if not dims:
        logger.warning("var: no dimension marks sinks in this model; the recipe changes nothing.")
    found = dataclasses.replace(method, sink_dims=dims)
    return Found(found, {"prompts": len(rows), "tokens_of_each": length}, {}, session.layers())
