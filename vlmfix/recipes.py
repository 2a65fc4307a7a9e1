"""Methods as data: names, dictionaries, JSON files, and the default recipe of a model family."""

from __future__ import annotations

import dataclasses
import json
import pkgutil
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmfix.calibration.result import Calibration
from vlmfix.errors import DataError, MethodError
from vlmfix.methods.base import Method
from vlmfix.textfiles import read_json

if TYPE_CHECKING:
    from vlmfix.anatomy import Anatomy


PACKAGES = ("methods", "decoding")
"""The packages that hold one method per file; files that hold none are ``base``, ``engine`` and those with a ``_``."""


def method_names() -> tuple[str, ...]:
    """Return the short names of all methods: those of the files in ``vlmfix/methods`` and ``vlmfix/decoding``."""
    return tuple(sorted(_packages()))


def _packages() -> dict[str, str]:
    """Return the package of every method by its name."""
    return {
        module.name: package
        for package in PACKAGES
        for module in pkgutil.iter_modules([str(Path(__file__).parent / package)])
        if module.name not in ("base", "engine") and not module.name.startswith("_")
    }


def all_methods() -> dict[str, type[Method]]:
    """Return every method class by its short name."""
    return {name: method_class(name) for name in method_names()}


def method_class(name: str) -> type[Method]:
    """Return a method's class.

    Raises:
        MethodError: There is no such method.
    """
    package = _packages().get(name)
    if package is None:
        raise MethodError(f"There is no method {name!r}. Choose one of: {', '.join(method_names())}.")
    for found in vars(import_module(f"vlmfix.{package}.{name}")).values():
        if isinstance(found, type) and issubclass(found, Method) and found.name == name:
            return found
    raise AssertionError(f"vlmfix/{package}/{name}.py defines no method named {name!r}")


def make_method(name: str, parameters: Mapping[str, Any]) -> Method:
    """Build a method from its name and parameters.

    Raises:
        MethodError: Unknown method or parameter, or a value of the wrong type or out of range.
    """
    cls = method_class(name)
    known = {field.name: field for field in dataclasses.fields(cls)}
    for parameter in parameters:
        if parameter not in known:
            raise MethodError(f"{name} has no parameter {parameter!r}. It has: {', '.join(known)}.")
    try:
        return cls(**parameters)
    except MethodError:
        raise
    except (TypeError, ValueError) as error:
        raise MethodError(f"Cannot build {name} with {dict(parameters)!r}: {error}.") from error


def method_from_dict(data: Mapping[str, Any]) -> Method:
    """Read back what ``Method.to_dict`` wrote.

    Raises:
        MethodError: No ``"method"`` key, unknown method or parameter.
    """
    if not isinstance(data, Mapping) or "method" not in data:
        raise MethodError(
            f"A recipe entry needs a 'method' key, for example {{'method': 'vhr', 'alpha': 2.0}}; got {data!r}."
        )
    return make_method(str(data["method"]), {key: value for key, value in data.items() if key != "method"})


def load_recipe(path: str | Path) -> tuple[Method, ...]:
    """Read a recipe file: one method's dict, a list of them, or ``{"methods": [...]}``.

    Raises:
        MethodError: The file is missing or is no recipe.
    """
    try:
        data = read_json(Path(path), what="recipe file", remedy="write it again, or give another")
    except DataError as error:
        raise MethodError(f"Cannot read the recipe {path}: {error}.") from error
    try:
        return _methods_of(data, str(path))
    except MethodError as error:
        raise MethodError(f"Cannot read the recipe {path}: {error}") from error


def _methods_of(data: Any, source: str) -> tuple[Method, ...]:
    entries = data.get("methods", [data]) if isinstance(data, Mapping) else data
    if not isinstance(entries, list) or not entries:
        raise MethodError(f'{source} holds no method. Write for example [{{"method": "vhr", "alpha": 2.0}}].')
    return tuple(method_from_dict(entry) for entry in entries)


def save_recipe(path: str | Path, chosen: Method | Calibration | Sequence[Method | Calibration]) -> None:
    """Write methods as a recipe file that ``patch`` and ``load_recipe`` read.

    Of what ``calibrate`` returned, only the method is written; ``Calibration.save`` keeps the provenance too.
    """
    given = [chosen] if isinstance(chosen, (Method, Calibration)) else list(chosen)
    entries = [each.method if isinstance(each, Calibration) else each for each in given]
    text = json.dumps({"methods": [method.to_dict() for method in entries]}, indent=2)
    Path(path).write_text(text + "\n", encoding="utf-8")


def resolve_methods(spec: Any, parameters: Mapping[str, Any], anatomy: Anatomy) -> tuple[Method, ...]:
    """Turn what a user hands to ``patch`` into methods, in the order of the path of attention.

    Raises:
        MethodError: Unknown or contradictory.
    """
    if isinstance(spec, Calibration):
        spec = spec.method
    if spec is None:
        from vlmfix.defaults import default_recipe

        chosen = default_recipe(anatomy)
    elif isinstance(spec, str) and spec in method_names():
        return (make_method(spec, parameters),)
    elif isinstance(spec, Path) or (isinstance(spec, str) and spec.endswith(".json")):
        chosen = load_recipe(spec)
    elif isinstance(spec, str):
        chosen = (make_method(spec, parameters),)
    elif isinstance(spec, Method):
        chosen = (spec,)
    elif isinstance(spec, Mapping):
        chosen = _methods_of(spec, "The recipe")
    elif isinstance(spec, Sequence):
        chosen = tuple(method for each in spec for method in resolve_methods(each, {}, anatomy))
    else:
        raise MethodError(f"Expected a method's name, a method, a list of them or a recipe file, got {spec!r}.")
    if parameters:
        raise MethodError(
            f"Parameters ({', '.join(parameters)}) go with a method's name: vlmfix.patch(model, 'vhr', alpha=2.0)."
        )
    if not chosen:
        raise MethodError("An empty list of methods. For the identity, use vlmfix.patch(model, 'none').")
    names = [method.name for method in chosen]
    repeated = {name for name in names if names.count(name) > 1}
    if repeated:
        raise MethodError(f"{', '.join(sorted(repeated))} is given twice. Each method can be applied once.")
    alone = [method.name for method in chosen if method.searches]
    if alone and len(chosen) > 1:
        raise MethodError(f"{alone[0]} is a search of its own, which reads unedited attention. Choose it alone.")
    decoding = [method.name for method in chosen if method.replaces_logits]
    if len(decoding) > 1:
        raise MethodError(
            f"{' and '.join(decoding)} both decide on the next token, each against a branch of its own, and no order "
            "of them is defined. Choose one; methods that edit attention can go with it."
        )
    return tuple(sorted(chosen, key=_place_on_path))


def _place_on_path(method: Method) -> int:
    attention = (method.opens_mask, method.edits_scores, method.edits_weights, method.edits_heads)
    places = (*attention, bool(method.edits_blocks), method.replaces_logits)
    return places.index(True) if True in places else len(places)
