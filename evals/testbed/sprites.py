"""The sprite atlas: RGBA pictures of the 80 categories, read from the shipped ``atlas.png``."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path

from PIL import Image

from vlmfix.errors import DataError

__all__ = ["ATLAS_PATH", "load_sprites"]


ATLAS_PATH = Path(__file__).parent / "atlas.png"
"""The atlas picture; ``atlas.json`` beside it says where each sprite lies."""


@lru_cache(maxsize=1)
def load_sprites() -> dict[str, tuple[Image.Image, ...]]:
    """Category name to its one to three RGBA sprites, longer side 64 px.

    The result is cached: treat the images as read-only.

    Raises:
        DataError: If the atlas is missing or unreadable.
    """
    try:
        index = json.loads(ATLAS_PATH.with_suffix(".json").read_text(encoding="utf-8"))
        with Image.open(ATLAS_PATH) as opened:
            sheet = opened.convert("RGBA")
    except (OSError, ValueError) as error:
        raise DataError(
            f"expected the testbed's sprite atlas at {ATLAS_PATH} and its index beside it, found: {error}. "
            "Reinstall the package, or rebuild the atlas: python scripts/testbed_atlas.py"
        ) from error
    return {name: tuple(sheet.crop((x, y, x + w, y + h)) for x, y, w, h in boxes) for name, boxes in index.items()}
