"""The options of ``vlmfix inspect``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..flags import IMAGES, MODEL, OUTPUT, option
from ..options import TESTBED_SPLITS, Options


@dataclass(frozen=True, kw_only=True)
class InspectOptions(Options):
    """The options of ``vlmfix inspect``."""

    image: Path | None = option("picture (default: a scene of the testbed)", group=IMAGES, metavar="FILE")
    scene: int | None = option("scene of the testbed, from 0 (default: 350)", group=IMAGES, metavar="N", at_least=0)
    split: str = option(
        "split of the testbed that the scene is from", group=IMAGES, default="heldout", choices=TESTBED_SPLITS
    )
    objects: tuple[str, ...] | None = option(
        "COCO objects that are in the picture, if you know them", group=IMAGES, metavar="NAME"
    )
    methods: tuple[str, ...] = option(
        "compare with a method or recipe file", group=MODEL, name="--method", default=(), metavar="NAME"
    )
    out: Path = option("the page", group=OUTPUT, default=Path("inspect.html"), metavar="FILE")
