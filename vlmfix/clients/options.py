"""How a method is named to a client: on the command line, or among the arguments of an evaluator's model."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from vlmfix.errors import MethodError

if TYPE_CHECKING:
    from vlmfix.methods.base import Method


DEFAULT = "default"
"""In the place of a method's name: the default recipe of the model's family."""


PREFIX = "method."
"""What stands before a method's parameters among the arguments of an evaluator's model: ``method.alpha=2``."""


def verb_with_method(verbs: Any, name: str, usage: str, about: str) -> argparse.ArgumentParser:
    """Add a verb that takes a method and its settings; import nothing heavy."""
    parser: argparse.ArgumentParser = verbs.add_parser(
        name,
        usage=f"vlmfix {name} METHOD [--set KEY=VALUE ...] {usage}",
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "method", metavar="METHOD", help=f"a method's name, a recipe file, or '{DEFAULT}' for that of the model family"
    )
    parser.add_argument(
        *("--set", "-s"),
        dest="settings",
        action="extend",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="parameters of the method",
    )
    return parser


def add_program(parser: argparse.ArgumentParser, name: str, help: str) -> None:
    """Add what stands behind ``--``, see :func:`words_behind_dashes`."""
    parser.add_argument(name, nargs="+", metavar=name.upper(), help=help)


def words_behind_dashes(options: argparse.Namespace) -> list[str]:
    """Return the words behind the first ``--``, with their own options.

    Raises:
        MethodError: There is no ``--``, or nothing behind it.
    """
    before, _, behind = (list(part) for part in _partition(options.command, "--"))
    if not behind:
        raise MethodError(f"expected -- and what to run behind it: vlmfix {' '.join(before)} -- ...")
    return behind


def _partition(words: Iterable[str], separator: str) -> tuple[list[str], list[str], list[str]]:
    every = list(words)
    place = every.index(separator) if separator in every else len(every)
    return every[:place], every[place : place + 1], every[place + 1 :]


def chosen_methods(name: str, settings: Mapping[str, Any]) -> tuple[Method, ...] | None:
    """Return the methods that are named, for ``vlmfix.patch``; ``None`` for the default of the model's family.

    Raises:
        MethodError: Unknown method or parameter, a recipe that cannot be read, or settings without a method's name.
    """
    from vlmfix.methods.registry import make_method
    from vlmfix.recipes import load_recipe

    is_name = name != DEFAULT and not name.endswith(".json")
    if settings and not is_name:
        raise MethodError(f"Settings ({', '.join(settings)}) go with a method's name; {name!r} has its own.")
    if is_name:
        return (make_method(name, settings),)
    return None if name == DEFAULT else load_recipe(name)


def methods_of(options: argparse.Namespace) -> tuple[Method, ...] | None:
    """Return the methods that were typed, see :func:`chosen_methods`."""
    from vlmfix.recipes import parse_settings

    return chosen_methods(options.method, parse_settings(options.settings))


def methods_among(arguments: Mapping[str, Any]) -> tuple[tuple[Method, ...] | None, dict[str, Any]]:
    """Take ``method`` and ``method.KEY`` out of the arguments of an evaluator's model.

    Returns:
        The methods, see :func:`chosen_methods`, and the other arguments.

    Raises:
        MethodError: No method is named.
    """
    if "method" not in arguments:
        raise MethodError(f"Name a method among the model's arguments: method=vhr,{PREFIX}alpha=2 (or {DEFAULT}).")
    settings = {key[len(PREFIX) :]: value for key, value in arguments.items() if key.startswith(PREFIX)}
    rest = {key: value for key, value in arguments.items() if key != "method" and not key.startswith(PREFIX)}
    return chosen_methods(str(arguments["method"]), settings), rest
