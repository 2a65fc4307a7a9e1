"""VCD: Visual Contrastive Decoding (Leng et al., CVPR 2024, arXiv 2311.16922)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from vlmfix.decoding.base import Contrast
from vlmfix.decoding.other_image import each_image
from vlmfix.methods.selection import Choice, Range, Space

STEPS = 1000
"""Steps of the diffusion process whose noise is used."""


@dataclass(frozen=True)
class VCD(Contrast):
    """Contrast the answer with that to a noised image: ``(1 + alpha) l(v) - alpha l(v')``.

    ``v' = sqrt(a) v + sqrt(1 - a) eps`` on the normalised image, with ``a`` the product of ``1 - b_t`` up to
    ``t = noise_step``, ``b_t = 1e-5 + (0.005 - 1e-5) sigmoid(s_t)``, ``s_t`` from -6 (``t = 0``) to 6 (``t = 999``).
    Only tokens with ``l(v) >= max l(v) + ln(beta)`` may be chosen. The noise of an image depends on ``seed`` and the
    image's size alone: images of one size get the same, in whatever batch they come. Logits processors, sampling and
    beams come after the contrast.

    Published gains over sampling largely vanish against greedy decoding; compare with that.

    Attributes:
        alpha: Strength of the contrast, >= 0. Default: the value of the released POPE script (0.5 in its sampler).
        beta: Plausibility cut, in [0, 1]. Default: that script's (0.1 in its sampler).
        noise_step: Step of the noise, 1 to 999; 0 adds none: the answer stays what it is. Default: that script's.
        seed: Seed of the noise.
    """

    name: ClassVar[str] = "vcd"
    paper: ClassVar[str] = "arXiv 2311.16922"
    summary: ClassVar[str] = "contrasts the answer with that to a noised image"
    search_space: ClassVar[Space] = {
        "alpha": Range(0.05, 2.0),
        "beta": Range(0.02, 0.9),
        "noise_step": Choice((500, 300, 700, 900)),
    }
    changes_image: ClassVar[bool] = True

    beta: float = 0.2
    noise_step: int = 500
    seed: int = 0

    def validate(self) -> None:
        """Raise ``MethodError`` for a parameter out of range."""
        super().validate()
        is_whole = isinstance(self.noise_step, int) and not isinstance(self.noise_step, bool)
        self.require(
            is_whole and 0 <= self.noise_step < STEPS, "noise_step", f"a whole number between 0 and {STEPS - 1}"
        )
        self.require(isinstance(self.seed, int) and not isinstance(self.seed, bool), "seed", "a whole number")

    def other_images(self, name: str, images: torch.Tensor, per_image: Sequence[int] | None) -> torch.Tensor:
        """Add the noise of step ``noise_step`` to every image."""
        kept = signal_left(self.noise_step)

        def noised(image: torch.Tensor) -> torch.Tensor:
            generator = torch.Generator().manual_seed(self.seed)
            noise = torch.randn(image.shape, generator=generator, dtype=torch.float32).to(image.device)
            return (math.sqrt(kept) * image.float() + math.sqrt(1 - kept) * noise).to(image.dtype)

        return images.clone() if self.noise_step == 0 else each_image(images, per_image, noised)


def signal_left(noise_step: int) -> float:
    """Return ``prod (1 - b_t)`` up to step ``noise_step``; 1 for step 0, which adds no noise."""
    if noise_step == 0:
        return 1.0
    schedule = torch.linspace(-6, 6, STEPS, dtype=torch.float64).sigmoid() * (0.5e-2 - 1e-5) + 1e-5
    return float((1 - schedule[: noise_step + 1]).prod())
