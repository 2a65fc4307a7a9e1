"""What deep copies of a model begin without, and when one has become out of date."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import PretrainedConfig

K = TypeVar("K")
V = TypeVar("V")


class Uncopied(dict[K, V]):
    """What belongs to running threads, or to one model alone: a deep copy begins without it.

    Threads may go on writing to it while another one copies the model.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> Uncopied[K, V]:
        return type(self)()


_OF_EVERY_CALL = frozenset({"generation_config"})
"""Attributes that a copy is given anew with every call."""


def standing(model: nn.Module) -> tuple[Any, ...]:
    """Describe how a model stands, so that a copy that shares its tensors can tell whether it still does.

    Adapters that are switched, merged or disabled, hooks, other kernels, other modules and other tensors show in it.
    What a tensor holds does not, because a copy shares it; nor do tensors that are no parameters or buffers, which
    models remember between forwards.
    """
    described: dict[int, Any] = {}
    return tuple(
        (name, _described(value, described, are_shared=name in ("_parameters", "_buffers")))
        for module in model.modules()
        for name, value in [("__class__", type(module)), *vars(module).items()]
        if name not in _OF_EVERY_CALL
    )


_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
"""What torch keeps on every module: parameters, children, hooks; none of it a name or number that an adapter sets."""


def weights_of(model: nn.Module) -> tuple[Any, ...]:
    """Describe what a model computes with, whatever hangs on it: what was read with other weights does not fit it.

    Parameters that were exchanged or written to show in it, and adapters that were switched, merged, disabled or scaled
    (which are names and numbers on their modules). Offloaded parameters have no identity and are left out.
    """
    found: list[Any] = []
    for place, module in enumerate(model.modules()):
        for each in module._parameters.values():
            if each is not None and each.device.type != "meta":
                found.append((id(each), 0 if each.is_inference() else each._version))
        found += [
            (place, name, str(value))
            for name, value in list(vars(module).items())
            if name not in _OF_EVERY_MODULE and _is_plain(value)
        ]
    return tuple(found)


_PLAIN = (bool, int, float, str)


def _is_plain(value: Any) -> bool:
    """Whether a value is a name or number, or a list or dictionary of these (hooks lie in ordered dictionaries)."""
    if isinstance(value, _PLAIN):
        return True
    if type(value) not in (dict, list, tuple):
        return False
    values = list(value.values()) if type(value) is dict else value
    return bool(values) and all(isinstance(each, _PLAIN) for each in values)


def _described(value: Any, known: dict[int, Any], *, are_shared: bool = False) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, torch.Tensor):
        return id(value) if are_shared else "tensor"
    if isinstance(value, Mapping):
        return tuple((key, _described(each, known, are_shared=are_shared)) for key, each in list(value.items()))
    if isinstance(value, (list, tuple, set, frozenset)):
        return tuple(_described(each, known) for each in list(value))
    if isinstance(value, PretrainedConfig):
        if id(value) not in known:
            known[id(value)] = _described(vars(value), known)
        return known[id(value)]
    return id(value)
