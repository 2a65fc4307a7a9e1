"""``scripts/before_after.py``: what is invented is marked in the picture."""

from __future__ import annotations

import before_after
import numpy as np
from PIL import Image

RED = np.asarray([0xC6, 0x28, 0x28])


def red(page: Image.Image) -> int:
    return int((np.asarray(page) == RED).all(-1).sum())


def test_invented_objects_are_marked() -> None:
    image, (before, after) = before_after.captions("tiny", "heldout", 350, "verify", "Describe the image.")
    assert any(part.kind == "present" for part in before.parts) and set(after.invented) <= set(before.invented)
    matcher = before_after.ChairMatcher("original")
    one, none = (before_after.mark_objects(matcher, {"dog"}, text) for text in ("A dog and a cup.", "A dog."))
    pages = [before_after.draw(image, ("before", "after"), texts) for texts in ((one, one), (one, none), (none, none))]
    assert pages[0].size == (before_after.WIDTH, before_after.SIZE + 2 * before_after.MARGIN)
    assert red(pages[0]) > red(pages[1]) > red(pages[2]) == 0
