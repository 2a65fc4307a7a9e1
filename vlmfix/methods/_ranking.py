"""How much of an answer each layer's blocks restore, measured once per checkpoint by causal tracing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from vlmfix.anatomy import Anatomy
from vlmfix.errors import MethodError
from vlmfix.methods._measured import Measured


@dataclass(frozen=True, repr=False)
class LayerRanking(Measured):
    """Recovery rates of the blocks of every layer, see ``vlmfix.probes.causal_trace``.

    Attributes:
        model: Name of the checkpoint they were measured on (the last part of its path or hub id counts).
        rr_attn: Recovery rates of the attention blocks, one per decoder layer; may be negative.
        rr_mlp: Those of the MLP blocks.
        token: The group of tokens that was patched.
    """

    noun: ClassVar[str] = "ranking"

    model: str
    rr_attn: tuple[float, ...]
    rr_mlp: tuple[float, ...]
    token: str = "last"

    def __post_init__(self) -> None:
        """Normalise what JSON delivers, then check it."""
        for name in ("rr_attn", "rr_mlp"):
            object.__setattr__(self, name, _rates(getattr(self, name), name))
        if len(self.rr_attn) != len(self.rr_mlp):
            raise MethodError(
                f"Ranking: 'rr_attn' has {len(self.rr_attn)} layers and 'rr_mlp' {len(self.rr_mlp)}; expected one rate "
                "per decoder layer in both."
            )
        for name in ("model", "token"):
            if not isinstance(getattr(self, name), str):
                raise MethodError(f"Ranking: {name!r} must be a text, got {getattr(self, name)!r}.")

    def __repr__(self) -> str:
        """Without the numbers: they are many."""
        return f"LayerRanking(model={self.model!r}, {len(self.rr_attn)} layers, token={self.token!r})"

    def check(self, anatomy: Anatomy) -> None:
        """Refuse a model other than the one measured.

        Raises:
            MethodError: Another depth or another checkpoint.
        """
        if len(self.rr_attn) != anatomy.num_layers:
            raise MethodError(
                f"iri: the ranking is of {self.model!r} with {len(self.rr_attn)} layers, and this model has "
                f"{anatomy.num_layers}. Rankings do not carry over. {how_to_rank(anatomy)}"
            )
        found = checkpoint_name(anatomy)
        if Path(self.model).name != found:
            raise MethodError(
                f"iri: the ranking is of the checkpoint {self.model!r}, and this model is {found!r}. Rankings do not "
                f"carry over. {how_to_rank(anatomy)} If it is the same checkpoint under another name, write that name "
                "into the ranking."
            )


def checkpoint_name(anatomy: Anatomy) -> str:
    """Return the last part of a model's path or hub id; empty for a model that was not loaded from one."""
    return Path(str(anatomy.model.config._name_or_path or "")).name


def how_to_rank(anatomy: Anatomy) -> str:
    """Return the line to type."""
    name = str(anatomy.model.config._name_or_path or "MODEL")
    return (
        f"Measure one: vlmfix calibrate iri --model {name} --data COCO_DIR --limit 50 --out iri.json, then "
        "vlmfix.patch(model, 'iri.json')."
    )


def _rates(value: Any, name: str) -> tuple[float, ...]:
    is_list = isinstance(value, Sequence) and not isinstance(value, str) and len(value) > 0
    if not is_list or not all(_is_rate(each) for each in value):
        raise MethodError(f"Ranking: {name!r} must be a list of finite numbers, one per decoder layer.")
    return tuple(float(each) for each in value)


def _is_rate(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
