"""Methods by name: one file each in the rooms of ``PACKAGES``, and those of other packages.

Another package offers a method by an entry point of the group ``vlmfix.methods``, in its ``pyproject.toml``::

    [project.entry-points."vlmfix.methods"]
    their_name = "their_package.their_module:TheirMethod"

Names are listed without importing a method, so that the command line starts at once.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
import sys
import warnings
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from vlmfix.errors import MethodError

if TYPE_CHECKING:
    from vlmfix.methods.base import Method


PACKAGES = ("vlmfix.methods", "vlmfix.decoding", "vlmfix.verification")
"""The packages that hold one method per file, beside what several share."""


GROUP = "vlmfix.methods"
"""The entry points by which other packages offer methods."""


def method_names() -> tuple[str, ...]:
    """Return the short names of all methods, in alphabetical order."""
    return tuple(sorted({*_own_modules(), *_offered()}))


def list_methods() -> dict[str, type[Method]]:
    """Return every method class by its short name, in alphabetical order.

    What another package offers and cannot be used is left out with a warning that names the package.
    """
    found, offered = {}, _offered()
    for name in sorted({*_own_modules(), *offered}):
        try:
            found[name] = _class_of(name, offered.get(name, []))
        except MethodError as error:
            warnings.warn(f"{error}", stacklevel=2)
    return found


def method_class(name: str) -> type[Method]:
    """Return a method's class.

    Raises:
        MethodError: There is no such method, several packages offer one of that name, or it cannot be used.
    """
    return _class_of(name, _offered().get(name, []))


def _class_of(name: str, offered: Sequence[EntryPoint]) -> type[Method]:
    """Return a method's class: ours, or the one that another package offers."""
    module = _own_modules().get(name)
    packages = " and ".join(sorted(_package(each) for each in offered))
    if module is not None:
        if offered:
            warnings.warn(
                f"A method named {name!r} comes with {packages} too. That of vlmfix is used.",
                stacklevel=4,
            )
        return _class_in(module, name)
    if not offered:
        raise MethodError(f"There is no method {name!r}. Choose one of: {', '.join(method_names())}.")
    if len(offered) > 1:
        raise MethodError(f"A method named {name!r} comes with {packages}. Uninstall all of them but one.")
    return _loaded(offered[0])


@functools.cache
def _own_modules() -> dict[str, str]:
    """Return the module of each method of this package by its name.

    A file holds a method if it gives a class the file's own name: ``name = "vhr"`` in ``vhr.py``.
    """
    found = {}
    for package in PACKAGES:
        for file in files(package).iterdir():
            name = file.name.removesuffix(".py")
            declared = re.compile(rf'^    name(: ClassVar\[str\])? = "{name}"$', re.MULTILINE)
            if name != file.name and declared.search(file.read_text(encoding="utf-8")):
                found[name] = f"{package}.{name}"
    return found


def _offered() -> dict[str, list[EntryPoint]]:
    """Return the entry points of other packages by the method's name."""
    found: dict[str, list[EntryPoint]] = {}
    for entry in entries_of(GROUP):
        found.setdefault(entry.name, []).append(entry)
    return found


def entries_of(group: str) -> tuple[EntryPoint, ...]:
    """Return the entry points that installed packages have in a group.

    All packages are read for them, which takes milliseconds; again only once a folder that Python imports from changed.
    """
    return _entries_in(group, tuple(_last_change(folder) for folder in sys.path))


def _last_change(folder: str) -> tuple[int, int, int] | None:
    try:
        found = os.stat(folder or ".")
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_mtime_ns


@functools.lru_cache(maxsize=8)
def _entries_in(group: str, folders: tuple[tuple[int, int, int] | None, ...]) -> tuple[EntryPoint, ...]:
    """Return the entry points of a group while the folders are as they were."""
    return tuple(entry_points(group=group))


def _package(entry: EntryPoint) -> str:
    return f"the package {entry.dist.name} {entry.dist.version}" if entry.dist else f"the package of {entry.value}"


def _class_in(module: str, name: str) -> type[Method]:
    from vlmfix.methods.base import Method

    for found in vars(import_module(module)).values():
        if isinstance(found, type) and issubclass(found, Method) and found.name == name:
            return found
    raise AssertionError(f"{module} defines no method named {name!r}")


def _loaded(entry: EntryPoint) -> type[Method]:
    """Return the class that another package offers.

    Raises:
        MethodError: It cannot be imported, or is no method of that name.
    """
    from vlmfix.methods.base import Method

    what = f"The method {entry.name!r} of {_package(entry)} cannot be used"
    try:
        found = entry.load()
    except Exception as error:  # whatever a foreign module does when it is imported
        raise MethodError(f"{what}: importing {entry.value} raised {type(error).__name__}: {error}.") from error
    if not (isinstance(found, type) and issubclass(found, Method)):
        raise MethodError(f"{what}: {entry.value} is no subclass of vlmfix.Method.")
    if found.name != entry.name:
        raise MethodError(f"{what}: {entry.value} calls itself {found.name!r}. The two names must be the same.")
    return found


def make_method(name: str, parameters: Mapping[str, Any]) -> Method:
    """Build a method from its name and parameters.

    Raises:
        MethodError: Unknown method or parameter, or a value of the wrong type or out of range.
    """
    cls = method_class(name)
    known = {field.name: field for field in dataclasses.fields(cls)}
    for parameter, (value, reason) in cls.removed_parameters.items():
        if parameters.get(parameter, value) != value:
            raise MethodError(f"{name} no longer has the parameter {parameter!r}. {reason}")
    parameters = {key: value for key, value in parameters.items() if key not in cls.removed_parameters}
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


def recipe_entry(method: Method) -> dict[str, Any]:
    """Return a method as a recipe file holds it, once it is sure that it can be read back.

    Raises:
        MethodError: It cannot be read back: its class has no registered name, or a parameter has no JSON form.
    """
    try:
        entry: dict[str, Any] = json.loads(json.dumps(method.to_dict(), allow_nan=False))
        found = method_from_dict(entry)
    except (MethodError, TypeError, ValueError) as error:
        raise MethodError(f"A recipe with {method!r} could not be read again: {error}") from error
    if found != method:
        raise MethodError(
            f"A recipe with {method!r} would be read as {found!r}. Its class must be found by its name: one file in "
            f"vlmfix/methods, or an entry point of the group {GROUP!r}."
        )
    return entry
