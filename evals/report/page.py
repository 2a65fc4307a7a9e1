"""Pages of this package: HTML files without any reference to another, made from the templates beside this module."""

from __future__ import annotations

import base64
import io
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import Environment
    from PIL.Image import Image


@cache
def _templates() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    found = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.policies["json.dumps_kwargs"] = {"allow_nan": False}
    return found


def render(template: str, **values: Any) -> str:
    """Fill a template; text is escaped.

    Args:
        template: Name of a file in ``templates``.
        values: What it shows.
    """
    return _templates().get_template(template).render(values)


def data_uri(image: Image, *, quality: int) -> str:
    """A picture as the address of itself.

    Args:
        image: The picture.
        quality: Of its JPEG, up to 95.
    """
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, format="JPEG", quality=quality)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
