"""vlmfix: make vision-language models hallucinate less at inference time, without training.

>>> import vlmfix
>>> vlmfix.__version__
'0.1.0'

The public names are those of ``__init__.pyi``. Most of them need torch, so that each is imported on first use:
``import vlmfix`` and the command line start at once.
"""

import re
from importlib import import_module
from pathlib import Path
from typing import Any

__version__ = "0.1.0"

_MODULES: dict[str, str] = {
    name: module
    for module, name in re.findall(
        r"^from ([\w.]+) import (\w+) as \w+$",
        Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8"),
        re.MULTILINE,
    )
}


__all__ = ["__version__", *_MODULES]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'vlmfix' has no attribute {name!r}")
    module = _MODULES[name]
    value = import_module(f"vlmfix.{name}") if module == "vlmfix" else getattr(import_module(module), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Also the names that nobody has used yet."""
    return sorted({*globals(), *__all__})
