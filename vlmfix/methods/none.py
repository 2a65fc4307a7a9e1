"""The identity: baseline of every evaluation and bitwise test of the machinery."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vlmfix.methods.base import Method


@dataclass(frozen=True)
class NoMethod(Method):
    """Attach to every text attention layer and edit nothing."""

    name: ClassVar[str] = "none"
    summary: ClassVar[str] = "the identity: baseline of every evaluation"

    @property
    def is_identity(self) -> bool:
        """Always true."""
        return True
