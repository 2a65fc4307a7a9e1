"""The testbed's models by name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, get_args

from vlmfix.errors import DataError

__all__ = ["CAPTION_TOKENS", "MODELS", "OF_SMOL", "ModelName", "load", "model_folder"]

ModelName = Literal["tiny", "smol", "smol-seed1"]

MODELS: tuple[ModelName, ...] = get_args(ModelName)
"""``tiny``: 2 M parameters, in the package. ``smol``: SmolLM2-135M-Instruct inside, assembled at first use.
``smol-seed1``: the same, trained with another seed."""

OF_SMOL: tuple[ModelName, ...] = ("smol", "smol-seed1")
"""Those with SmolLM2 inside."""


CAPTION_TOKENS: Mapping[str | None, int] = MappingProxyType({None: 128} | dict.fromkeys(OF_SMOL, 160))
"""Limit of a caption by name (None: the default model). Sound captions are shorter; broken text shows as truncated."""


def model_folder(name: ModelName, *, yes: bool = False) -> Path:
    """The folder of a model for ``AutoModelForImageTextToText.from_pretrained`` and ``AutoProcessor.from_pretrained``.

    Args:
        name: Which model.
        yes: Whether what it needs may be downloaded without a question.

    Raises:
        DataError: No such model, or one with SmolLM2 inside cannot be assembled; the message says what to do.
    """
    if name == "tiny":
        from . import MODEL_DIR

        return MODEL_DIR
    if name in OF_SMOL:
        from .smol.assemble import assembled

        return assembled(yes=yes, name=name)
    raise DataError(f"expected one of the models {', '.join(MODELS)}, found {name!r}")


def load(name: ModelName = "tiny", *, yes: bool = False) -> tuple[Any, Any]:
    """A model in evaluation mode, in the type of its weights but float32 for ``tiny``, and its processor.

    Args:
        name: Which model.
        yes: As for :func:`model_folder`.

    Raises:
        DataError: As :func:`model_folder`.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    folder = model_folder(name, yes=yes)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype="float32" if name == "tiny" else "auto")
    return model.eval(), AutoProcessor.from_pretrained(folder)
