"""Options that are fields of a dataclass: flag, type, default, help text and bounds stand on the field, once.

    @dataclass(frozen=True, kw_only=True)
    class TuneOptions(BenchmarkOptions):
        budget: int = option("how many settings to try", group=SEARCH, default=20, metavar="N", at_least=2)

:func:`add_verb` gives a verb of the command line a flag per field, ``TuneOptions.from_arguments`` makes the object from
what was typed, and whoever makes it (from Python too) gets the same checks.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from itertools import groupby
from types import MappingProxyType
from typing import Any, get_args, get_origin, get_type_hints

from vlmfix.errors import VlmfixError

MODEL, IMAGES, ASKING, SCORING, MACHINE, OUTPUT = GROUPS = (
    "model and method",
    "benchmarks and images",
    "prompts and decoding",
    "scoring",
    "machine",
    "output",
)
"""The headings of ``--help``, in their order."""


@dataclass(frozen=True)
class Flag:
    """How an option is typed on the command line.

    Attributes:
        help: Its help text.
        group: Heading under which ``--help`` lists it.
        name: The flag; a word without dashes is a positional argument; None stands for ``--name-of-the-field``.
        metavar: What stands for the value in ``--help``.
        choices: The values it takes; None for any.
        at_least: Its smallest number; None for no bound.
        word: A word that it takes beside numbers.
    """

    help: str
    group: str
    name: str | None = None
    metavar: str | None = None
    choices: tuple[str, ...] | None = None
    at_least: float | None = None
    word: str | None = None


def option(help: str, *, default: Any = None, **flag: Any) -> Any:
    """A dataclass field that is an option of a verb; see :class:`Flag`. The default ``MISSING`` makes it required."""
    return field(default=default, metadata={"flag": Flag(help, **flag)})


def check_options(options: Any) -> None:
    """Refuse values that an option never takes.

    Raises:
        VlmfixError: A number is too small, or a word is not among an option's choices.
    """
    for each, flag in _flags(type(options)):
        value = getattr(options, each.name)
        if value is None:
            continue
        if flag.at_least is not None and isinstance(value, str):
            if value != flag.word:
                raise VlmfixError(f"{_flag_name(each)} must be a number{f' or {flag.word}' if flag.word else ''}")
        elif flag.at_least is not None and not value >= flag.at_least:
            raise VlmfixError(f"{_flag_name(each)} must be at least {flag.at_least:g}, got {value}")
        if flag.choices is not None and value not in flag.choices:
            raise VlmfixError(f"{_flag_name(each)} must be one of {', '.join(flag.choices)}, got {value!r}")


def add_verb(
    verbs: Any,
    name: str,
    options: Any,
    *,
    about: str,
    help_of: Mapping[str, str] = MappingProxyType({}),
    choices: Mapping[str, Sequence[str]] = MappingProxyType({}),
) -> argparse.ArgumentParser:
    """Add a verb with a flag for every option of a class.

    What is not typed does not appear among the parsed arguments: the defaults stand on the fields.

    Args:
        verbs: Subparsers of the command line.
        name: The verb.
        options: The class of its options.
        about: What stands above the flags in its own ``--help``: examples first.
        help_of: Field to help text, where this verb has more to say than the field.
        choices: Field to the values it takes, where the class cannot know them.
    """
    parser = verb_parser(verbs, name, about)
    types = get_type_hints(options)
    for heading, members in groupby(sorted(_flags(options), key=_place), lambda each: each[1].group):
        group = parser.add_argument_group(heading)
        for each, flag in members:
            words = _parsed_as(types[each.name], each.default)
            if flag.word is not None:
                words["type"] = _NumberOr(flag.word)
            words["help"] = _with_default(help_of.get(each.name, flag.help), each.default)
            if (values := choices.get(each.name, flag.choices)) is not None:
                words["choices"] = values
            if flag.metavar is not None:
                words["metavar"] = flag.metavar
            if _flag_name(each).startswith("-"):
                words |= {"dest": each.name, "required": each.default is MISSING}
            # Set afterwards, because `BooleanOptionalAction` writes a default that it is given into the help text.
            group.add_argument(_flag_name(each), **words).default = argparse.SUPPRESS
    return parser


def verb_parser(verbs: Any, name: str, about: str, arguments: str = "[OPTIONS]") -> argparse.ArgumentParser:
    """Add a verb without flags, whose ``--help`` begins with what it does and examples.

    Args:
        verbs: Subparsers of the command line.
        name: The verb.
        about: What it does, then examples.
        arguments: What follows the verb.
    """
    parser: argparse.ArgumentParser = verbs.add_parser(
        name,
        usage=f"vlmfix {name} {arguments}",
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    return parser


def typed_values(options: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    """The options of a class that were typed, by field."""
    typed = [each.name for each, _ in _flags(options) if each.name in vars(arguments)]
    values = {name: getattr(arguments, name) for name in typed}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def _flags(options: Any) -> Iterator[tuple[Field[Any], Flag]]:
    return ((each, each.metadata["flag"]) for each in fields(options) if "flag" in each.metadata)


def _place(member: tuple[Field[Any], Flag]) -> int:
    return GROUPS.index(member[1].group)


def _flag_name(option: Field[Any]) -> str:
    return option.metadata["flag"].name or f"--{option.name.replace('_', '-')}"


def _parsed_as(type_: Any, default: Any) -> dict[str, Any]:
    """How argparse reads values of a field's type: ``bool``, ``T``, ``T | None`` or ``tuple[T, ...]``."""
    if type_ is bool:
        return {"action": argparse.BooleanOptionalAction if default else "store_true"}
    (value_type, *_) = [part for part in get_args(type_) if part not in (type(None), ...)] or [type_]
    several = get_origin(type_) is tuple or any(get_origin(part) is tuple for part in get_args(type_))
    if several and get_origin(value_type) is tuple:  # tuple[T, ...] | None
        value_type = get_args(value_type)[0]
    return {"type": value_type, **({"nargs": "+", "action": "extend"} if several else {})}


@dataclass(frozen=True)
class _NumberOr:
    """Reads a whole number or one word."""

    word: str

    def __call__(self, text: str) -> int | str:
        return text if text == self.word else int(text)

    def __repr__(self) -> str:
        return f"number or {self.word}"


def _with_default(text: str, default: Any) -> str:
    """A help text and the default, where that is a value and the text does not name it."""
    if default is not False and default not in (None, MISSING, ()) and "(default:" not in text:
        shown = "on" if default is True else " ".join(default) if isinstance(default, tuple) else str(default)
        text = f"{text} (default: {shown})"
    return text.replace("%", "%%")
