"""Runs a model in double precision throughout: what still differs there is no rounding."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class NoSinglePrecision(TorchFunctionMode):
    """Takes double precision wherever a model asks for single: norms, routers and recurrent states do."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.float:
            return args[0].double()
        return func(*map(_doubled, args), **{name: _doubled(value) for name, value in (kwargs or {}).items()})


def _doubled(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


@contextmanager
def double_precision(model: Any) -> Iterator[None]:
    """Run a model of fp32 weights in fp64; fp32 again behind it, to the bit."""
    experts = getattr(model.config, "_experts_implementation", None)
    if experts not in (None, "eager"):
        model.set_experts_implementation("eager")  # grouped products know no double precision
    model.double()
    try:
        with NoSinglePrecision():
            yield
    finally:
        model.float()
        if experts not in (None, "eager"):
            model.set_experts_implementation(experts)
