"""Samples to learn from: images and questions whose right answer, or whose objects, are known."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmfix.errors import DataError

Mentions = Callable[[str], Sequence[tuple[str, str]]]
"""Finds the objects a caption names: (word as it stands in the caption, name) pairs, in the order of the caption."""


@dataclass(frozen=True, eq=False)
class CalibrationSample:
    """An image and a question, with what is needed to judge the answer.

    Attributes:
        image: A picture the processor takes, or the path of an image file.
        question: What a user would type; the prompt is made from it.
        answer: The right answer of a yes/no question.
        objects: Names of objects in the image. For captions all of them; for a yes/no question at least the object
            asked for, if it is there.
        absent: Names of objects that are not. For captions ``None`` means every name that is not in ``objects``; for a
            yes/no question the object asked for, if it is not there.
        image_id: Identifies the image in the provenance; its place in the data by default.
        cells: Which of the image's tokens (0-based, in the order of the prompt) show an object, by its name; from
            segmentation masks. ``None`` or an object that is not listed: the whole image.
    """

    image: Any
    question: str
    answer: bool | None = None
    objects: Collection[str] | None = None
    absent: Collection[str] | None = None
    image_id: int | str | None = None
    cells: Mapping[str, Sequence[int]] | None = None

    def load(self) -> Any:
        """Return the picture.

        Raises:
            DataError: The file is missing or is not an image.
        """
        if not isinstance(self.image, (str, Path)):
            return self.image
        from PIL import Image

        try:
            with Image.open(self.image) as picture:
                return picture.convert("RGB")
        except (OSError, ValueError) as error:
            raise DataError(f"Cannot read the image {self.image}: {error}. Leave it out of the data.") from error

    def shows(self, name: str) -> bool | None:
        """Whether an object is in the image; ``None`` if that is not known."""
        if name in (self.objects or ()):
            return True
        if self.absent is None:
            return None if self.objects is None else False
        return False if name in self.absent else None


def choose(data: Iterable[CalibrationSample], limit: int | None, seed: int) -> list[CalibrationSample]:
    """Return the samples of a calibration: all, or ``limit`` of them drawn by ``seed``, in their order.

    Raises:
        DataError: There are none, or one is not a ``CalibrationSample``.
    """
    samples = list(data)
    for sample in samples:
        if not isinstance(sample, CalibrationSample):
            raise DataError(
                f"Expected samples like vlmfix.CalibrationSample(image, question, ...), got {type(sample).__name__}."
            )
    if not samples:
        raise DataError("No samples to calibrate on: data is empty. Give some vlmfix.CalibrationSample(image, ...).")
    if limit is None or limit >= len(samples):
        return samples
    if limit < 1:
        raise DataError(f"limit must be at least 1, got {limit}.")
    return [samples[index] for index in sorted(random.Random(seed).sample(range(len(samples)), limit))]
