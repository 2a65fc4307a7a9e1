"""The errors of vlmfix. Each message says what was expected, what was found and what to type next."""

from __future__ import annotations


def how_to_install(extra: str) -> str:
    """What to type for the packages of an extra of ``pyproject.toml``, wherever vlmfix came from."""
    return f"pip install 'vlmfix[{extra}]' (in a checkout: pip install -e '.[{extra}]')"


class VlmfixError(Exception):
    """Base class of every error vlmfix raises on purpose."""


class UnsupportedModelError(VlmfixError, ValueError):
    """The model (or object) handed in cannot be patched."""


class UnsupportedFeatureError(VlmfixError, NotImplementedError):
    """The model is supported, but not together with what was asked of it."""


class MethodError(VlmfixError, ValueError):
    """An unknown method, an unknown parameter, or a value out of range."""


class DataError(VlmfixError, ValueError):
    """A file of the evaluation is missing, corrupt or contradicts another one."""
