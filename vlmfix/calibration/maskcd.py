"""Heads for MaskCD: those that look at the image."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from vlmfix.calibration.session import Found, Session
from vlmfix.calibration.vaf import image_mass
from vlmfix.decoding.maskcd import MaskCD
from vlmfix.errors import DataError, MethodError
from vlmfix.observe.samples import CalibrationSample

LEARNED = ("heads",)


def search(session: Session, samples: Sequence[CalibrationSample], method: MaskCD, *, threshold: float = 0.5) -> Found:
    """Find image heads: those with more than a share of their attention on the image, in the prompt's last row.

    The share is the mean over the samples. Costs one prefill per sample.

    Args:
        session: The model.
        samples: Any.
        method: Parameters of MaskCD.
        threshold: The share, in (0, 1). The default is ours.

    Raises:
        DataError: No sample with finite attention, or no head above the threshold.
        MethodError: The threshold is out of range.
    """
    if not 0 < threshold < 1:
        raise MethodError(f"threshold must lie between 0 and 1, got {threshold!r}.")
    mean, counts = image_mass(session, samples, "maskcd")
    layers = session.layers()
    heads = tuple((layers[layer], head) for layer, head in (mean > threshold).nonzero().tolist())
    if not heads:
        raise DataError(
            f"No head has more than {threshold:g} of its attention on the image; the largest share is "
            f"{float(mean.max()):.2g}. Choose a lower threshold."
        )
    options = {"threshold": threshold}
    return Found(dataclasses.replace(method, heads=heads), counts, {"image_mass": mean}, layers, options)
