"""The methods, one file each.

``vlmfix.methods()`` lists them: importing a submodule binds this package to the name ``vlmfix.methods``, so the package
itself is what a user calls.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vlmfix.methods.base import Method


class _CallablePackage(ModuleType):
    def __call__(self) -> dict[str, type[Method]]:
        """Return every method class by its short name."""
        from vlmfix.recipes import all_methods

        return all_methods()


sys.modules[__name__].__class__ = _CallablePackage
