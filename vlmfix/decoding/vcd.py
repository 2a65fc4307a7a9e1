"""VCD: Visual Contrastive Decoding (Leng et al., CVPR 2024, arXiv 2311.16922)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vlmfix.decoding.base import Contrast, plausibility, strength
from vlmfix.decoding.other_image import each_image, image_noise
from vlmfix.methods.parameters import Choice, parameter

STEPS = 1000
"""Steps of the diffusion process whose noise is used."""


@dataclass(frozen=True)
class VCD(Contrast):
    """Contrast the answer with that to a noised image: ``(1 + alpha) l(v) - alpha l(v')``.

    ``v' = sqrt(a) v + sqrt(1 - a) eps`` on the normalised image, with ``a`` the product of ``1 - b_t`` up to
    ``t = noise_step``, ``b_t = 1e-5 + (0.005 - 1e-5) sigmoid(s_t)``, ``s_t`` from -6 (``t = 0``) to 6 (``t = 999``).
    Only tokens with ``l(v) >= max l(v) + ln(beta)`` may be chosen. The noise of an image depends on ``seed`` and the
    image's size alone: images of one size get the same, in whatever batch they come (ours; the release draws noise anew
    for every image). Logits processors, sampling and beams come after the contrast. The release always samples.

    Published gains over sampling largely vanish against greedy decoding; compare with that.
    """

    name = "vcd"
    paper = "arXiv 2311.16922"
    summary = "contrasts the answer with that to a noised image"
    changes_image = True

    alpha: float = strength(1.0, "Default: the value of the released POPE script (0.5 in its sampler).")
    beta: float = plausibility(0.2, "Default: that script's (0.1 in its sampler).")
    noise_step: int = parameter(
        500,
        low=0,
        high=STEPS - 1,
        search=Choice((500, 300, 700, 900)),
        help="Step of the noise. 0 adds none, so that the answer stays what it is; the release's index 0 adds noise of "
        "standard deviation 0.005. Default: that script's.",
    )
    seed: int = parameter(0, help="Seed of the noise.")

    def other_images(self, name: str, images: torch.Tensor, per_image: Sequence[int] | None) -> torch.Tensor:
        """Add the noise of step ``noise_step`` to every image."""
        kept = signal_left(self.noise_step)

        def noised(image: torch.Tensor) -> torch.Tensor:
            noise = image_noise(image, self.seed)
            return (math.sqrt(kept) * image.float() + math.sqrt(1 - kept) * noise).to(image.dtype)

        return images.clone() if self.noise_step == 0 else each_image(images, per_image, noised)


def signal_left(noise_step: int) -> float:
    """Return ``prod (1 - b_t)`` up to step ``noise_step``; 1 for step 0, which adds no noise."""
    if noise_step == 0:
        return 1.0
    schedule = torch.linspace(-6, 6, STEPS, dtype=torch.float64).sigmoid() * (0.5e-2 - 1e-5) + 1e-5
    return float((1 - schedule[: noise_step + 1]).prod())
