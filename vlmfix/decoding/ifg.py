"""IFG: image-free guidance, the contrast of LACING (Zhao et al., EMNLP 2025, arXiv 2411.14279) without its training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

from vlmfix.decoding.base import Contrast, strength
from vlmfix.decoding.other_image import each_image, mean_image
from vlmfix.errors import UnsupportedFeatureError
from vlmfix.methods.parameters import parameter

NEXT_TO_ZERO = 1e-6
"""Zeros themselves are what some models take for padding."""


@dataclass(frozen=True)
class IFG(Contrast):
    """Contrast the answer with that to a stand-in for the image: ``(1 + alpha) l - alpha l'``.

    The same as ``l' + s (l - l')`` with ``s = 1 + alpha``, apart from the cut: only tokens with
    ``l >= max l + ln(beta)`` may be chosen. LACING learns a "soft image" to contrast with; a stand-in of the same size,
    with the same number of image tokens at the same positions, takes its place here, which no publication measures.

    The defaults are ours. The released sampler falls back to alpha 0.5 and beta 0.1, but its scripts run s = 1 to 3
    without a cut: ``IFG(alpha=1, beta=0)`` is their s = 2.
    """

    name = "ifg"
    paper = "arXiv 2411.14279"
    summary = "contrasts the answer with that to a stand-in for the image"
    changes_image = True

    alpha: float = strength(0.5)
    stand_in: Literal["mean", "blank", "blurred"] = parameter(
        "mean",
        help='``"mean"``: the image\'s own mean colour (of flattened patches: its mean patch). ``"blank"``: zeros, '
        'which is the processor\'s mean colour. ``"blurred"``: the image without detail, averaged over ``blur`` of its '
        "side and interpolated.",
    )
    blur: float = parameter(0.25, above=0, high=1, help="Width of the blur as a fraction of the image's shorter side.")

    def other_images(self, name: str, images: torch.Tensor, per_image: Sequence[int] | None) -> torch.Tensor:
        """Replace every image.

        Raises:
            UnsupportedFeatureError: Flattened patches cannot be blurred.
        """
        if self.stand_in == "blank":
            return each_image(images, per_image, lambda image: torch.full_like(image, NEXT_TO_ZERO))
        if self.stand_in == "mean":
            return each_image(images, per_image, mean_image)
        if images.dim() < 4:
            raise UnsupportedFeatureError(
                f"ifg can blur pictures, and this model's {name} are flattened patches, {tuple(images.shape)}. Choose "
                "stand_in='mean'."
            )
        return each_image(images, None, self._blurred)

    def _blurred(self, image: torch.Tensor) -> torch.Tensor:
        """Average ``[channels, height, width]`` over blocks and interpolate between their centres."""
        height, width = image.shape[-2:]
        block = max(1, round(self.blur * min(height, width)))
        size = (max(1, round(height / block)), max(1, round(width / block)))
        coarse = F.adaptive_avg_pool2d(image.float()[None], size)
        return F.interpolate(coarse, (height, width), mode="bilinear", align_corners=False)[0].to(image.dtype)
