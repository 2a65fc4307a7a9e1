"""One file per method: its formula, naive and slow, for ``naive.reference.Reference``.

A file may list ``CASES``: the method's parameters (by keyword) and the naive object that must agree with it on models
of four layers; a decoding method's are its ``DECODING_CASES``, with a ``NaiveBranches`` each.
``tests/plugin/methods/test_reference_methods.py`` finds and runs them.
"""

from __future__ import annotations

import pkgutil
from importlib import import_module
from typing import Any


def names() -> list[str]:
    """The methods with a formula here."""
    return sorted(
        module.name
        for module in pkgutil.iter_modules(__path__)
        if module.name != "reference" and not module.name.startswith("_")
    )


def cases(table: str = "CASES") -> dict[str, tuple[str, dict[str, Any], Any]]:
    """All ``CASES``: a label, the method's name, its parameters, and its naive object."""
    found = {}
    for name in names():
        for number, (parameters, naive) in enumerate(getattr(import_module(f"naive.{name}"), table, [])):
            found[f"{name} {number}"] = (name, parameters, naive)
    return found
