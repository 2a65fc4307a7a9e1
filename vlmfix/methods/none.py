"""The identity: baseline of every evaluation and bitwise test of the machinery."""

from __future__ import annotations

from dataclasses import dataclass

from vlmfix.methods.base import Method


@dataclass(frozen=True)
class NoMethod(Method):
    """Attach to every text attention layer and edit nothing."""

    name = "none"
    summary = "the identity: baseline of every evaluation"
    is_identity = True
    needs_cache = False
