"""The rows of a run's table: the methods asked for, their parameters, and the controls that belong to them."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

import vlmfix
from vlmfix.errors import MethodError, UnsupportedFeatureError, UnsupportedModelError
from vlmfix.files import read_json
from vlmfix.methods.registry import list_methods, method_class, method_from_dict
from vlmfix.recipes import parse_value, split_setting

from ..options import EvalOptions
from ..testbed import RECIPES

ALL = "all"
"""Among the names of methods: every method that the model takes as it comes."""

DEFAULT_METHODS = ("vhr", "var")
Strengths = Mapping[str, Mapping[str, Any]]
"""Parameters of the methods that do not run at their defaults, by name."""


@dataclass(frozen=True)
class MethodSpec:
    """One row of the result table.

    Attributes:
        label: Unique short name (``"none"``, ``"vhr"``, ``"vhr/all"``).
        params: The method as ``method.to_dict()`` writes it; part of every answer's key.
        role: ``"baseline"``, ``"method"`` or ``"control"``.
        parent: Label of the method a control belongs to.
    """

    label: str
    params: Mapping[str, Any]
    role: str
    parent: str | None = None

    def build(self) -> Any:
        """Return the method object for ``vlmfix.patch``."""
        return method_from_dict(dict(self.params))

    def describe(self) -> str:
        """Return the method's name with the parameters that differ from its defaults."""
        name = str(self.params["method"])
        default = {field.name: field.default for field in fields(method_class(name))}
        changed = [f"{k}={_short(v)}" for k, v in self.params.items() if k in default and default[k] != v]
        return " ".join([name, *changed])


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, Mapping) or (isinstance(value, Sequence) and not isinstance(value, str) and len(value) > 4):
        return f"<{len(value)} entries>"
    return str(value).replace(" ", "")


def plan_methods(options: EvalOptions, strengths: Strengths = MappingProxyType({})) -> list[MethodSpec]:
    """Return the methods of a run: ``none`` first, then those asked for, each followed by its own controls.

    Args:
        options: ``methods`` (names, or recipe files of one method, labelled by the file's stem), ``settings``
            (``key=value`` or ``label.key=value``) and ``controls`` are read.
        strengths: See :func:`strengths_on`.

    Raises:
        MethodError: Unknown method or parameter, or a value out of range; the message lists what exists.
    """
    wanted: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(options.methods or DEFAULT_METHODS):
        if name == "none":
            continue
        from_file = name.endswith(".json")
        label = Path(name).stem if from_file else name
        params = recipe_of_one(name) if from_file else {**strengths.get(name, {}), "method": name}
        if label in wanted:
            raise MethodError(f"--method: two of them are called {label!r}. Rename a recipe file.")
        wanted[label] = params
    _apply_settings(wanted, options.settings)
    specs = [_baseline()]
    for label, params in wanted.items():
        if method_class(params["method"]).searches:
            raise MethodError(
                f"--method {label}: it searches beams, one prompt at a time, and the answers of a run are greedy. "
                "Generate with it yourself and score the captions: vlmfix score chair."
            )
        spec = MethodSpec(label, _full(params), "method")
        specs.append(spec)
        # VHR claims that its choice of heads matters: run it with every head, and with the heads it did not choose.
        if options.controls and spec.params.get("select") == "divergent":
            for select in ("all", "unselected"):
                params = _full({**spec.params, "select": select})
                specs.append(MethodSpec(f"{label}/{select}", params, "control", label))
    return specs


def method_specs(methods: Mapping[str, Any]) -> list[MethodSpec]:
    """Return rows for a run of given method objects: ``none``, then each under its label.

    Args:
        methods: Label to method object, such as ``{"vhr 1.1": VHR(alpha=1.1), "vhr 1.2": VHR(alpha=1.2)}``.
    """
    return [_baseline(), *(MethodSpec(label, _full(each.to_dict()), "method") for label, each in methods.items())]


def _baseline() -> MethodSpec:
    return MethodSpec("none", _full({"method": "none"}), "baseline")


def recipe_of_one(path: str) -> dict[str, Any]:
    """Read a recipe file of one method: its parameters.

    Raises:
        MethodError: It holds several.
    """
    found = vlmfix.load_recipe(path)
    if len(found) != 1:
        raise MethodError(f"--method {path}: one method is taken at a time, and the recipe holds {len(found)}.")
    return found[0].to_dict()


def _full(params: Mapping[str, Any]) -> dict[str, Any]:
    """Return the complete, validated dictionary of a method, as JSON gives it back."""
    return dict(json.loads(json.dumps(method_from_dict({**params, **_measured(params)}).to_dict())))


def _measured(params: Mapping[str, Any]) -> dict[str, Any]:
    """Read what a method takes from files: the content decides the answers, and a file's name does not tell it.

    Raises:
        DataError: There is no such file, or it is no JSON.
    """
    given = [f.name for f in fields(method_class(params["method"])) if "Mapping[" in str(f.type)]
    paths = {name: Path(params[name]) for name in given if isinstance(params.get(name), str)}
    remedy = f"type: vlmfix calibrate {params['method']}"
    return {name: read_json(path, what=f"file of {name}", remedy=remedy) for name, path in paths.items()}


def _apply_settings(wanted: dict[str, dict[str, Any]], settings: Iterable[str]) -> None:
    """Write ``key=value`` and ``label.key=value`` into the parameters of the methods that have such a key."""
    parameters = {
        label: [field.name for field in fields(method_class(str(params["method"])))] for label, params in wanted.items()
    }
    for setting in settings:
        key, text = split_setting(setting, "key=value or method.key=value")
        owner, dot, parameter = key.rpartition(".")
        if dot and owner not in wanted:
            raise MethodError(f"--set {setting}: method {owner!r} is not in this run ({', '.join(wanted) or 'none'})")
        targets = [owner] if dot else [label for label in wanted if parameter in parameters[label]]
        if not targets or parameter not in parameters[targets[0]]:
            offered = "; ".join(f"{label}: {', '.join(parameters[label])}" for label in (targets or wanted))
            raise MethodError(f"--set {setting}: no parameter {parameter!r}; parameters are {offered or 'none'}")
        for label in targets:
            wanted[label][parameter] = parse_value(text)


def strengths_on(model: str | None) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Return what methods run at on a model unless a parameter is set, and what the reader must know about it.

    Args:
        model: As typed. Strengths of the embedded models were chosen on scenes of their calibration split.

    Returns:
        Parameters by the method's name; empty where all run at their defaults. And notes.
    """
    if model not in RECIPES:
        return {}, []
    recipe = read_json(RECIPES[model], what="recipe file", remedy="write it again: python scripts/calibrate_testbed.py")
    note = f"method strengths are {model or 'the testbed'}'s recipe, chosen on {recipe['chosen_on']}"
    return {entry["method"]: entry for entry in recipe["methods"]}, [note, *recipe.get("notes", [])]


def expand_all(names: Sequence[str], config: Any, strengths: Strengths) -> tuple[tuple[str, ...], list[str]]:
    """Replace ``"all"`` among the names of methods by what it stands for.

    Args:
        names: As typed.
        config: The model's configuration.
        strengths: See :func:`strengths_on`.

    Returns:
        The names, and a note on every method left out (not of those that are named beside ``"all"``).
    """
    if ALL not in names:
        return tuple(names), []
    takes, refused = every_method(config, strengths)
    expanded = tuple(dict.fromkeys(each for name in names for each in (takes if name == ALL else [name])))
    left_out = {name: why for name, why in refused.items() if name not in expanded}
    return expanded, [
        f"left out: {why if why.startswith(name) else f'{name}: {why}'}" for name, why in left_out.items()
    ]


def every_method(config: Any, strengths: Strengths) -> tuple[list[str], dict[str, str]]:
    """Find which methods a model takes with no calibration file and no flag.

    The model is built without weights and patched with each. A method that only fails for want of weights (it would
    look at them when patching) is taken.

    Args:
        config: The model's configuration.
        strengths: See :func:`strengths_on`.

    Returns:
        The names of those that it takes, and name -> reason of the others.
    """
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(copy.deepcopy(config))
    takes: list[str] = []
    refused: dict[str, str] = {}
    for name, method in list_methods().items():  # a broken package's method is left out with a warning
        if name == "none":
            continue
        if method.searches:
            refused[name] = "it searches beams, and the answers of a run are greedy"
            continue
        try:
            with vlmfix.patched(model, method_from_dict({**strengths.get(name, {}), "method": name})):
                pass
        except (MethodError, UnsupportedModelError, UnsupportedFeatureError) as error:
            refused[name] = str(error)
            continue
        except (RuntimeError, NotImplementedError):  # tensors without data
            pass
        takes.append(name)
    return takes, refused
