"""Images made useless in a controlled way: by noise, or by their mean colour."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from vlmfix.decoding.other_image import each_image, image_noise, is_image_argument, mean_image, replace_images
from vlmfix.errors import DataError, MethodError, UnsupportedFeatureError
from vlmfix.observe.ask import look_at, stock_logits
from vlmfix.probes.component_runs import probability_of

SIGMAS = (0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
"""Standard deviations tried in turn, in units of the normalised image."""


@dataclass(frozen=True)
class Corruption:
    """How images are corrupted.

    Attributes:
        kind: ``"noise"``: Gaussian noise is added to the normalised image. ``"mean"``: every image (or tile) becomes
            its own mean colour, flattened patches their mean patch; nothing is drawn.
        sigma: Standard deviation of the noise, >= 0.
        seed: Seed of the noise. Each image has noise of its own, which depends on the seed and the image alone:
            batches do not matter.
    """

    kind: Literal["noise", "mean"] = "noise"
    sigma: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise ``MethodError`` for a value out of range."""
        if self.kind not in ("noise", "mean"):
            raise MethodError(f"A corruption is 'noise' or 'mean', got {self.kind!r}.")
        if not isinstance(self.sigma, (int, float)) or not 0 <= self.sigma < math.inf:
            raise MethodError(f"sigma must be a finite number >= 0, got {self.sigma!r}.")

    def __call__(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Return a model's inputs with corrupted images; sizes and grids stay.

        Raises:
            UnsupportedFeatureError: There are no images as the processor gives them.
        """
        if not any(is_image_argument(name, value) for name, value in inputs.items()):
            raise UnsupportedFeatureError(
                f"No pixel_values to corrupt in {', '.join(inputs)}. Pass what the processor gave for a prompt with an "
                "image."
            )
        return replace_images(inputs, self._corrupted)

    def _corrupted(self, name: str, images: torch.Tensor, per_image: Sequence[int] | None) -> torch.Tensor:
        return each_image(images, per_image, mean_image if self.kind == "mean" else self._noised)

    def _noised(self, image: torch.Tensor) -> torch.Tensor:
        content = zlib.crc32(image.detach().float().cpu().contiguous().numpy().tobytes())
        return (image.float() + self.sigma * image_noise(image, self.seed + content)).to(image.dtype)


@torch.no_grad()
def choose_sigma(
    model: object,
    batches: Callable[[], Iterable[Mapping[str, Any]]],
    answer: Sequence[int],
    *,
    sigmas: Sequence[float] = SIGMAS,
    seed: int = 0,
) -> float:
    """Return the smallest noise under which the answer's mean probability is at most half of that on the images.

    Args:
        model: The model.
        batches: Returns the batches of prompts, each time anew.
        answer: See ``causal_trace``.
        sigmas: Standard deviations to try, in this order.
        seed: Seed of the noise.

    Raises:
        DataError: None of them is enough.
    """
    means: list[float] = []
    for sigma in (None, *sigmas):
        sums, count = 0.0, 0
        for batch in batches():
            seen = batch if sigma is None else Corruption("noise", sigma, seed)(batch)
            subject = look_at(model, "causal_trace", batch)
            sums += float(probability_of(answer, stock_logits(subject.model, seen)[:, -1]).sum())
            count += len(batch["input_ids"])
        if not count:
            raise DataError("No prompts to choose a noise level on.")
        means.append(sums / count)
        if sigma is not None and means[-1] <= means[0] / 2:
            return sigma
    raise DataError(
        f"The answer's mean probability is {means[0]:.3f} on the images and still {min(means[1:]):.3f} under noise up "
        f"to sigma {max(sigmas)}: more than half. Give prompts whose answer needs the image, or corrupt otherwise: "
        "corruption='mean'."
    )
