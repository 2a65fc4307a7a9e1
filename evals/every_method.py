"""``--method all``: every method that a model takes as it comes, and why it does not take the others."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import vlmfix
from vlmfix.errors import MethodError, UnsupportedFeatureError, UnsupportedModelError

ALL = "all"


def expand_all(
    names: Sequence[str], config: Any, known: Mapping[str, Mapping[str, Any]]
) -> tuple[tuple[str, ...], dict[str, str]]:
    """Replace ``"all"`` among the names of methods by what it stands for.

    Args:
        names: As typed.
        config: The model's configuration.
        known: Parameters of methods that do not run at their defaults, by name.

    Returns:
        The names, and name -> reason of every method left out (not of those that are named beside ``"all"``).
    """
    if ALL not in names:
        return tuple(names), {}
    takes, refused = every_method(config, known)
    expanded = [each for name in names for each in (takes if name == ALL else [name])]
    return tuple(dict.fromkeys(expanded)), {name: why for name, why in refused.items() if name not in expanded}


def every_method(config: Any, known: Mapping[str, Mapping[str, Any]]) -> tuple[list[str], dict[str, str]]:
    """Which methods a model takes with no calibration file and no flag.

    The model is built without weights and patched with each. A method that only fails for want of weights (it would
    look at them when patching) is taken.

    Args:
        config: The model's configuration.
        known: Parameters of methods that do not run at their defaults, by name.

    Returns:
        The names of those that it takes, and name -> reason of the others.
    """
    import torch
    from transformers import AutoModelForImageTextToText

    from vlmfix.recipes import method_class, method_from_dict, method_names

    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(copy.deepcopy(config))
    takes: list[str] = []
    refused: dict[str, str] = {}
    for name in method_names():
        if name == "none":
            continue
        if method_class(name).searches:
            refused[name] = "it searches beams, and the answers of a run are greedy"
            continue
        try:
            with vlmfix.patched(model, method_from_dict({**known.get(name, {}), "method": name})):
                pass
        except (MethodError, UnsupportedModelError, UnsupportedFeatureError) as error:
            refused[name] = str(error)
            continue
        except (RuntimeError, NotImplementedError):  # tensors without data
            pass
        takes.append(name)
    return takes, refused


def skipped_notes(skipped: Mapping[str, str]) -> list[str]:
    """What the report says about methods left out."""
    return [
        f"left out: {reason if reason.startswith(name) else f'{name}: {reason}'}" for name, reason in skipped.items()
    ]
