"""What ``scripts/bench.py`` compares: the stock model, patched copies of it, and the same edits the released way."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from bench_models import BEFORE_IMAGE, SINK_DIM, clone
from bench_released import Released, bound
from transformers import PreTrainedModel

import vlmfix
from vlmfix.methods.base import Method

STOCK, EAGER, RELEASED = "unpatched", "eager", "released "
CORE = ("none", "vhr", "var", "pai", "fia", "act", "mma")
"""The methods with bars of their own; ``act`` with a tenth of the heads, as many as ``vlmfix.calibrate`` keeps."""
BY_RELEASE = ("released var", "released pai", "released vhr")


def _heads(model: PreTrainedModel) -> list[tuple[int, int]]:
    """Return a tenth of the heads of ACT's layers, at random."""
    layers, heads = _shape(model)
    pairs = [(layer, head) for layer in (range(2, layers - 1) or range(layers)) for head in range(heads)]
    return sorted(random.Random(0).sample(pairs, max(1, round(0.1 * len(pairs)))))


def _shape(model: PreTrainedModel) -> tuple[int, int]:
    text = model.config.get_text_config()
    return text.num_hidden_layers, text.num_attention_heads


def _var(model: PreTrainedModel) -> Method:
    # The sink that was planted fills one dimension: |x_d| / rms(x) is near the square root of the hidden size.
    threshold = min(20.0, 0.6 * model.config.get_text_config().hidden_size ** 0.5)
    return vlmfix.VAR(sink_dims=[SINK_DIM], sink_threshold=threshold, image_mass=0.0)


METHODS: dict[str, Callable[[PreTrainedModel], Any]] = {
    "none": lambda model: "none",
    "vhr": lambda model: vlmfix.VHR(alpha=1.3),
    "var": _var,
    "pai": lambda model: vlmfix.PAI(),
    "fia": lambda model: vlmfix.FIA(),
    "act": lambda model: vlmfix.ACT(heads=_heads(model)),
    "mma": lambda model: vlmfix.MMA(),
    "var + vhr": lambda model: [_var(model), vlmfix.VHR(alpha=1.3)],
    "act, all heads": lambda model: vlmfix.ACT(),
    "hgai": lambda model: vlmfix.HGAI(),
    "vaf": lambda model: vlmfix.VAF(),
    "adaptvis": lambda model: vlmfix.AdaptVis(),
    "iat": lambda model: vlmfix.IAT(),
    "spin": lambda model: vlmfix.SPIN(),
    "eah": lambda model: vlmfix.EAH(),
    "vista": lambda model: vlmfix.VISTA(),
    "vcd": lambda model: vlmfix.VCD(),
    "guidance": lambda model: vlmfix.Guidance(),
}


def names(model: PreTrainedModel, only: Sequence[str] | None) -> list[str]:
    """Return the variants to measure beside the stock model; those a model family has no use for are left out."""
    chosen = list(only) if only else [EAGER, *CORE, *BY_RELEASE]
    unknown = sorted({*chosen} - {EAGER, *METHODS, *BY_RELEASE, STOCK})
    if unknown:
        known = ", ".join([EAGER, *METHODS, *BY_RELEASE])
        raise SystemExit(f"Unknown variants: {', '.join(unknown)}. Known are: {known}.")
    left_out = {STOCK} | ({"fia", *BY_RELEASE} if model.config.model_type != "llava" else set())
    return [STOCK, *(name for name in chosen if name not in left_out)]


def make(model: PreTrainedModel, name: str, image_tokens: int) -> PreTrainedModel:
    """Return a copy of a model with a variant on it; all copies share their weights."""
    copy = clone(model)
    if name == EAGER:
        copy.set_attn_implementation({"text_config": "eager"})
    elif name.startswith(RELEASED):
        method = bound(copy, METHODS[name.removeprefix(RELEASED)](copy))
        Released(copy, method, BEFORE_IMAGE, BEFORE_IMAGE + image_tokens)
    elif name != STOCK:
        vlmfix.patch(copy, METHODS[name](copy))
    return copy


def edited(model: PreTrainedModel) -> int | None:
    """Return how many head rows the patch of a model edited so far: the proof that a variant acts."""
    status = vlmfix.status(model)
    return None if status is None else sum(status.edited)


def everywhere(model: PreTrainedModel, name: str) -> Any:
    """Return a method with all layers of a shallow model, to look at its memory."""
    method = METHODS[name](model)
    if isinstance(method, Method) and not isinstance(method, vlmfix.VHR):
        import dataclasses

        return dataclasses.replace(method, layers=":")
    return method


def dtype_of(device: str) -> torch.dtype:
    """Return fp32 on a CPU, bf16 on a GPU."""
    return torch.float32 if device == "cpu" else torch.bfloat16
