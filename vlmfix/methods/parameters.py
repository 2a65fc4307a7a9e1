"""Parameters of a method: what they may be, what ``vlmfix tune`` searches and what they mean, beside their default."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin

from vlmfix.errors import MethodError

T = TypeVar("T")


@dataclass(frozen=True)
class Range:
    """Numbers between two bounds, both included.

    Attributes:
        low: The smallest; near where the method does nothing, so that a search can find out that less is better.
        high: The largest worth trying: beyond it, published runs break the text.
        log: Whether orders of magnitude matter rather than differences.
    """

    low: float
    high: float
    log: bool = False


@dataclass(frozen=True)
class Choice:
    """A few values.

    Attributes:
        values: JSON values, the default first.
    """

    values: tuple[Any, ...]


Space = Mapping[str, Range | Choice]
"""Parameters to search, by name."""


_NEVER = object()


@dataclass(frozen=True)
class Parameter:
    """What is known about a parameter beside its name, type and default; see :func:`parameter`."""

    help: str = ""
    low: float | None = None
    high: float | None = None
    above: float | None = None
    off: object = _NEVER
    search: Range | Choice | None = None
    expected: str = ""
    remark: str = ""


def described(help: str, **known: Any) -> dict[str, Parameter]:
    """Return the metadata of a field that :func:`parameter` cannot declare: without a default, or by name only."""
    return {"parameter": Parameter(help, **known)}


def parameter(
    default: T,
    *,
    help: str,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    off: object = _NEVER,
    search: Range | Choice | None = None,
    expected: str = "",
    remark: str = "",
) -> T:
    """Declare a parameter of a method, as the value of a field of its dataclass.

    The field's annotation is checked too: numbers must be finite, a ``Literal`` lists the choices, lists become tuples.

    Args:
        default: The default.
        help: What it means, and where its default comes from.
        low: The least number allowed.
        high: The largest number allowed.
        above: A number that must be exceeded.
        off: The value that switches the method off, whatever the others are: nothing is computed and outputs are
            bitwise those of the stock model. Where it takes several parameters, override ``Method.is_identity``.
        search: What ``vlmfix tune`` tries; ``None`` leaves the parameter alone.
        expected: What a value must be, for the error message; by default as the annotation and the range say.
        remark: What else the error message says about values ("1 changes nothing").

    Returns:
        A ``dataclasses.field``; typed as the default, so that a wrong default is found.
    """
    known = {"low": low, "high": high, "above": above, "off": off, "search": search}
    metadata = described(help, expected=expected, remark=remark, **known)
    field: T = dataclasses.field(default=default, metadata=metadata)
    return field


def parameter_of(field: dataclasses.Field[Any]) -> Parameter:
    """Return what is known about a field; nothing, if it is declared without :func:`parameter`."""
    return field.metadata.get("parameter", Parameter())  # type: ignore[no-any-return]


class _Other(Exception):
    """A value is of another kind."""


HeadPairs = Sequence[Sequence[int]]


def _read(value: Any, kind: Any, known: Parameter) -> Any:
    """Return a value as a method keeps it: lists as tuples, paths as texts, measured data made of their dict.

    Raises:
        _Other: It is of another type, or out of range.
    """
    origin = get_origin(kind)
    if origin in (Union, UnionType):
        for each in get_args(kind):
            try:
                return _read(value, each, known)
            except _Other:
                continue
        raise _Other
    if origin is Literal:
        return _checked(value, value in get_args(kind) and type(value) in map(type, get_args(kind)))
    if kind == HeadPairs:
        pairs = [_read(pair, Sequence[int], Parameter(low=0)) for pair in _items(value)]
        return _checked(tuple(pairs), all(len(pair) == 2 for pair in pairs))
    if origin in (Sequence, tuple):  # of any length
        return tuple(_read(each, get_args(kind)[0], known) for each in _items(value))
    if kind in (float, int):
        is_number = isinstance(value, (int, kind)) and not isinstance(value, bool)
        return _checked(value, is_number and abs(value) < math.inf and _is_in_range(value, known))
    if kind in (bool, str, type(None)):
        value = str(value) if kind is str and isinstance(value, Path) else value
        return _checked(value, isinstance(value, kind))
    if hasattr(kind, "from_dict"):
        return kind.from_dict(value) if isinstance(value, Mapping) else _checked(value, isinstance(value, kind))
    return _checked(value, isinstance(value, origin or kind) if isinstance(origin or kind, type) else True)


def _checked(value: T, holds: bool) -> T:
    if not holds:
        raise _Other
    return value


def _items(value: Any) -> Sequence[Any]:
    return _checked(value, isinstance(value, Sequence) and not isinstance(value, (str, bytes)))


def _is_in_range(value: float, known: Parameter) -> bool:
    return (
        (known.low is None or value >= known.low)
        and (known.above is None or value > known.above)
        and (known.high is None or value <= known.high)
    )


def _in_words(kind: Any, known: Parameter) -> list[str]:
    """Return the alternatives that a type leaves, such as ``["a whole number >= 1", "None"]``."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return [text for each in inner for text in _in_words(each, known)]
    if origin is Literal:
        return list(map(str, inner))
    if kind is bool:
        return ["true", "false"]
    if kind == HeadPairs:
        return ["a list of (layer, head) pairs"]
    if origin is Sequence:
        return [f"a list of whole numbers{_limits(known)}" if inner == (int,) else "a list"]
    if kind in (int, float):
        noun = "whole" if kind is int else "finite" if known.high is None else ""
        return [f"a {noun} number{_limits(known)}".replace("  ", " ")]
    return [{str: "a text", type(None): "None"}.get(kind, getattr(kind, "__name__", str(kind)))]


def _limits(known: Parameter) -> str:
    low, high, above = known.low, known.high, known.above
    if high is not None:
        return f" above {above:g} and at most {high:g}" if above is not None else f" between {low:g} and {high:g}"
    return f" >= {low:g}" if low is not None else f" > {above:g}" if above is not None else ""


@functools.cache
def _kinds(cls: type) -> dict[str, Any]:
    """Return the types of a dataclass's fields by name; ``None`` for one that only type checkers can resolve."""
    kinds = {}
    for field in dataclasses.fields(cls):
        owner = next(each for each in cls.__mro__ if field.name in inspect.get_annotations(each))
        kind = inspect.get_annotations(owner)[field.name]
        if isinstance(kind, str):
            try:
                kind = eval(kind, vars(sys.modules[owner.__module__]))
            except NameError as error:
                if "parameter" in field.metadata:
                    raise TypeError(
                        f"{owner.__name__}.{field.name}: the annotation {kind!r} must be known when the program runs, "
                        f"not only to a type checker ({error})"
                    ) from error
                kind = object
        kinds[field.name] = kind
    return kinds


class Parametrised:
    """Base of frozen dataclasses whose fields are checked when an object is made, and explained in the docstring."""

    if TYPE_CHECKING:
        __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]

    def __init_subclass__(cls) -> None:
        """Append the fields declared with :func:`parameter` to the docstring."""
        super().__init_subclass__()
        fields: dict[str, Any] = {**getattr(cls, "__dataclass_fields__", {}), **vars(cls)}
        lines = []
        for name, field in fields.items():
            if isinstance(field, dataclasses.Field) and (text := cls.meaning_of(name, parameter_of(field))):
                lines += textwrap.wrap(f"{name}: {text}", 116, initial_indent=" " * 8, subsequent_indent=" " * 12)
        section = ["", "", "    Attributes:", *lines, "    "] if lines else []
        cls.__doc__ = (cls.__doc__ or cls.__name__).rstrip() + "\n".join(section)

    @classmethod
    def meaning_of(cls, name: str, known: Parameter) -> str:
        """Return what a parameter means, in this class."""
        return known.help

    def __post_init__(self) -> None:
        """Check every parameter, and normalise what JSON and the command line deliver."""
        cls: type = type(self)
        for field in dataclasses.fields(self):
            try:
                value = _read(getattr(self, field.name), _kinds(cls)[field.name], parameter_of(field))
            except _Other:
                self.require(False, field.name, may_be(cls, field))
            object.__setattr__(self, field.name, value)
        self.validate()

    def validate(self) -> None:
        """Raise ``MethodError`` for what the fields cannot say: parameters that contradict one another."""

    def require(self, condition: bool, parameter: str, expected: str) -> None:
        """Raise ``MethodError`` naming the parameter, its value and what is expected, unless ``condition``."""
        if not condition:
            value = getattr(self, parameter)
            raise MethodError(f"{type(self).__name__}({parameter}={value!r}): {parameter} must be {expected}.")

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON has them."""
        return {field.name: _as_json(getattr(self, field.name)) for field in dataclasses.fields(self)}


def _as_json(value: Any) -> Any:
    if isinstance(value, Parametrised):
        return value.to_dict()
    return [_as_json(each) for each in value] if isinstance(value, tuple) else value


class SearchSpace:
    """``Method.search_space``: read off the fields of the class at hand, and its ``search_layers``."""

    def __get__(self, method: object, cls: Any) -> Space:
        declared = {field.name: parameter_of(field).search for field in dataclasses.fields(cls)}
        space = {name: search for name, search in declared.items() if search is not None}
        return space | ({"layers": Choice(cls.search_layers)} if cls.search_layers else {})


def is_off(method: Parametrised) -> bool:
    """Whether any parameter has the value that switches the method off."""
    known = {field.name: parameter_of(field).off for field in dataclasses.fields(method)}
    return any(off is not _NEVER and getattr(method, name) == off for name, off in known.items())


def may_be(cls: type, field: dataclasses.Field[Any]) -> str:
    """Say what a parameter may be, such as ``"between 0 and 1 (1 switches the method off)"``."""
    known = parameter_of(field)
    *first, last = _in_words(_kinds(cls)[field.name], known)
    text = known.expected or (f"{', '.join(first)} or {last}" if first else last)
    remark = known.remark
    if not remark and isinstance(known.off, (int, float)):
        remark = f"{known.off:g} switches the method off"
    return f"{text} ({remark})" if remark else text
