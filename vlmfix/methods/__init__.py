"""The methods, one file each.

``vlmfix.list_methods()`` lists them. Calling this package, ``vlmfix.methods()``, does the same and is deprecated.
"""

from __future__ import annotations

import sys
import warnings
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vlmfix.methods.base import Method


class _CallablePackage(ModuleType):
    def __call__(self) -> dict[str, type[Method]]:
        """Return every method class by its short name."""
        from vlmfix.methods.registry import list_methods

        warnings.warn("vlmfix.methods() is deprecated; call vlmfix.list_methods()", DeprecationWarning, stacklevel=2)
        return list_methods()


sys.modules[__name__].__class__ = _CallablePackage
