"""What an evaluation run is: the user's options, the methods with their controls, and the settings that identify it."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import vlmfix
from vlmfix.errors import DataError, MethodError, UnsupportedFeatureError, UnsupportedModelError
from vlmfix.files import read_json

from ..options import EvalOptions


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
        """The method object for ``vlmfix.patch``."""
        from vlmfix.recipes import method_from_dict

        return method_from_dict(dict(self.params))

    def describe(self) -> str:
        """The label with the parameters that differ from the method's defaults."""
        from vlmfix.recipes import method_class

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


def plan_methods(options: EvalOptions, recipe: Mapping[str, Any] | None) -> list[MethodSpec]:
    """The methods of a run: ``none`` first, then those asked for, each followed by its own controls.

    Args:
        options: ``methods`` (names, or recipe files of one method, labelled by the file's stem), ``settings``
            (``key=value`` or ``label.key=value``) and ``controls`` are read.
        recipe: The testbed's recipe (``{"methods": [{"method": ..., ...}]}``), or None for the methods' defaults.

    Raises:
        MethodError: Unknown method or parameter, or a value out of range; the message lists what exists.
    """
    names = list(dict.fromkeys(options.methods or ("vhr", "var")))
    if "none" in names:
        names.remove("none")
    known = recipe_entries(recipe)
    wanted: dict[str, dict[str, Any]] = {}
    for name in names:
        label, params = _from_file(name) if name.endswith(".json") else (name, {**known.get(name, {}), "method": name})
        if label in wanted:
            raise MethodError(f"--method: two of them are called {label!r}. Rename a recipe file.")
        wanted[label] = params
    _apply_settings(wanted, options.settings)
    for label, params in wanted.items():
        _check_decoding(label, params)
    specs = [MethodSpec("none", _full({"method": "none"}), "baseline")]
    for name in wanted:
        spec = MethodSpec(name, _full(wanted[name]), "method")
        specs.append(spec)
        # VHR claims that its choice of heads matters: run it with every head, and with the heads it did not choose.
        if options.controls and spec.params.get("select") == "divergent":
            for select in ("all", "unselected"):
                params = _full({**spec.params, "select": select})
                specs.append(MethodSpec(f"{name}/{select}", params, "control", name))
    return specs


def _check_decoding(label: str, params: Mapping[str, Any]) -> None:
    """Refuse a method that is a search of its own: the answers of a run are greedy, in batches."""
    from vlmfix.recipes import method_class

    if method_class(params["method"]).searches:
        raise MethodError(
            f"--method {label}: it searches beams, one prompt at a time, and the answers of a run are greedy. Generate "
            "with it yourself and score the captions: vlmfix score chair."
        )


def recipe_entries(recipe: Mapping[str, Any] | None) -> dict[str, dict[str, Any]]:
    """The testbed recipe's parameters by method; empty without a recipe."""
    return {entry["method"]: dict(entry) for entry in (recipe or {}).get("methods", [])}


def _from_file(path: str) -> tuple[str, dict[str, Any]]:
    from vlmfix.recipes import load_recipe

    found = load_recipe(path)
    if len(found) != 1:
        raise MethodError(f"--method {path}: a row of the table is one method, the recipe holds {len(found)}.")
    return Path(path).stem, found[0].to_dict()


def method_specs(methods: Mapping[str, Any]) -> list[MethodSpec]:
    """Rows for a run of given method objects: ``none``, then each under its label.

    Args:
        methods: Label to method object, such as ``{"vhr 1.1": VHR(alpha=1.1), "vhr 1.2": VHR(alpha=1.2)}``.
    """
    rows = [MethodSpec(label, _full(method.to_dict()), "method") for label, method in methods.items()]
    return [MethodSpec("none", _full({"method": "none"}), "baseline"), *rows]


def _full(params: Mapping[str, Any]) -> dict[str, Any]:
    """The complete, validated dictionary of a method, as JSON gives it back."""
    from vlmfix.recipes import method_from_dict

    return dict(json.loads(json.dumps(method_from_dict({**params, **_measured(params)}).to_dict())))


def _measured(params: Mapping[str, Any]) -> dict[str, Any]:
    """What a method reads from files, by parameter: it decides the answers, and a file's name does not say what it is.

    Raises:
        DataError: There is no such file, or it is no JSON.
    """
    from vlmfix.recipes import method_class

    given = [f.name for f in fields(method_class(params["method"])) if "Mapping[" in str(f.type)]
    paths = {name: Path(params[name]) for name in given if isinstance(params.get(name), str)}
    remedy = f"type: vlmfix calibrate {params['method']}"
    return {name: read_json(path, what=f"file of {name}", remedy=remedy) for name, path in paths.items()}


def _apply_settings(wanted: dict[str, dict[str, Any]], settings: Iterable[str]) -> None:
    parameters = {name: _parameters(str(params["method"])) for name, params in wanted.items()}
    for setting in settings:
        key, separator, text = setting.partition("=")
        if not separator or not key:
            raise MethodError(f"--set expects key=value or method.key=value, got {setting!r}")
        owner, dot, parameter = key.rpartition(".")
        targets = [owner] if dot else [name for name in wanted if parameter in parameters[name]]
        if dot and owner not in wanted:
            raise MethodError(f"--set {setting}: method {owner!r} is not in this run ({', '.join(wanted) or 'none'})")
        if not targets or parameter not in parameters[targets[0]]:
            offered = "; ".join(f"{name}: {', '.join(parameters[name])}" for name in (targets or wanted))
            raise MethodError(f"--set {setting}: no parameter {parameter!r}; parameters are {offered or 'none'}")
        for name in targets:
            wanted[name][parameter] = parse_value(text)


def _parameters(name: str) -> tuple[str, ...]:
    from vlmfix.recipes import method_class

    return tuple(field.name for field in fields(method_class(name)))


def parse_settings(settings: Iterable[str]) -> dict[str, Any]:
    """``key=value`` texts as a dictionary; values are JSON, or text.

    Raises:
        MethodError: One is no ``key=value``.
    """
    pairs = [setting.partition("=") for setting in settings]
    for key, separator, text in pairs:
        if not separator or not key:
            raise MethodError(f"--set expects key=value, got {key + text!r}")
    return {key: parse_value(text) for key, _, text in pairs}


def parse_value(text: str) -> Any:
    """A value as typed: JSON, or else text."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def load_recipe(path: Path) -> dict[str, Any] | None:
    """The testbed's method strengths, or None when there is no recipe file.

    Raises:
        DataError: The file is there but is not a recipe.
    """
    if not path.is_file():
        return None
    recipe = read_json(path, what="recipe file", remedy="write it again")
    try:
        _ = [entry["method"] for entry in recipe["methods"]]
    except (TypeError, KeyError) as error:
        raise DataError(f'{path} is not a recipe: expected {{"methods": [{{"method": ...}}]}} ({error})') from error
    return dict(recipe)


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
