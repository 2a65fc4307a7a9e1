"""Sink dimensions for VAR, and a threshold that the image's sinks reach."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Sequence

import torch

from vlmfix.calibration.session import Found, Session
from vlmfix.errors import DataError, MethodError
from vlmfix.methods.var import VAR
from vlmfix.model.sink_dims import find_sink_dims
from vlmfix.observe.samples import CalibrationSample
from vlmfix.observe.words import prompt_tokens
from vlmfix.probes.sinks import prompt_states

logger = logging.getLogger("vlmfix")


LEARNED = ("sink_dims",)


def search(
    session: Session,
    samples: Sequence[CalibrationSample],
    method: VAR,
    *,
    sink_threshold: float | None = None,
    sink_share: float = 0.05,
) -> Found:
    """Find the hidden dimensions that mark sinks, and a threshold that the image's sinks reach.

    The dimensions are those of ``vlmfix.find_sink_dims`` on the samples' prompts. Images are left out of them and all
    are cut to the length of the shortest, because only the first token is looked at, which sees nothing else.

    Then the prompts are read with their images. VAR acts in layers where ``phi = max_d |x_d| / rms(x)`` of an image
    token reaches the threshold. Phi never exceeds the square root of the model's width, so a threshold made for large
    models may be out of reach. If no image token reaches it, the recipe gets the one that is reached in ``sink_share``
    of all image tokens and layers (ours); the log and the result say so. Costs a text prefill and a prefill per sample.

    Args:
        session: The model.
        samples: Any.
        method: Parameters of VAR.
        sink_threshold: Keep this one, whether it is reached or not. Default: the method's, as long as it is reached.
        sink_share: Share of image tokens and layers that are sinks where the threshold follows from it, in (0, 1).

    Raises:
        DataError: A prompt holds nothing but the image.
        MethodError: ``sink_share`` or ``sink_threshold`` out of range.
    """
    if not 0 < sink_share < 1:
        raise MethodError(f"sink_share must lie between 0 and 1, got {sink_share!r}.")
    if sink_threshold is not None:
        method = dataclasses.replace(method, sink_threshold=sink_threshold)
    dims, length = _find_dims(session, samples)
    counts = {"prompts": len(samples), "tokens_of_each": length}
    found = dataclasses.replace(method, sink_dims=dims)
    if not dims:
        logger.warning("var: no dimension marks sinks in this model; the recipe changes nothing.")
        return Found(found, counts, {}, session.layers())
    layers = session.layers(found.bind(session.anatomy).layer_indices)
    values = _image_values(session, samples, dims, layers)
    source = "method" if sink_threshold is None else "caller"
    if float(values.max()) < found.sink_threshold:
        told = "The recipe changes nothing."
        if sink_threshold is None:
            falling = values.flatten().sort(descending=True).values
            source, least = "image tokens", falling[int(sink_share * len(falling))]
            found = dataclasses.replace(found, sink_threshold=math.floor(100 * float(least)) / 100)
            told = f"The recipe has {found.sink_threshold:g}, reached in {100 * sink_share:g} % of tokens and layers."
        logger.warning(
            "var: no image token of these %d prompts reaches sink_threshold=%g: the largest phi is %.1f, and the "
            "model's width allows %.1f. %s",
            len(samples),
            method.sink_threshold,
            float(values.max()),
            session.anatomy.hidden_size**0.5,
            told,
        )
    is_sink = values >= found.sink_threshold
    counts |= {"image_tokens": values.shape[1], "sinks_in_some_layer": int(is_sink.any(0).sum())}
    options = {
        "sink_threshold": found.sink_threshold,
        "threshold_from": source,
        "sink_share": sink_share,
        "largest_phi": float(values.max()),
    }
    return Found(found, counts, {}, session.layers(), options)


def _find_dims(session: Session, samples: Sequence[CalibrationSample]) -> tuple[tuple[int, ...], int]:
    """Return the dimensions, and how many tokens of every prompt were looked at."""
    rows = []
    for _, inputs in session.batches(samples):
        tokens = prompt_tokens(session.anatomy, inputs)
        rows += [ids[keep] for ids, keep in zip(inputs["input_ids"], tokens.valid & ~tokens.image, strict=True)]
    length = min(map(len, rows))
    if not length:
        raise DataError("A prompt holds nothing but the image. Pass prompt=... to make one with text.")
    return find_sink_dims(session.model, torch.stack([row[:length] for row in rows])), length


def _image_values(
    session: Session, samples: Sequence[CalibrationSample], dims: Sequence[int], layers: Sequence[int]
) -> torch.Tensor:
    """Return phi of all image tokens: fp32 ``[layers, image tokens]``."""
    found = []
    for _, inputs in session.batches(samples):
        values = prompt_states(session, inputs, dims, layers)[0].transpose(0, 1)
        found.append(values[:, prompt_tokens(session.anatomy, inputs).image.cpu()])
    return torch.cat(found, dim=1)
