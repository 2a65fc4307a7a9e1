"""``vlmfix methods``: the methods with their papers and parameters, or all there is to say about some of them."""

from __future__ import annotations

import argparse
import dataclasses
import textwrap
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlmfix.methods.base import Method


_ABOUT = """\
List the methods with their papers and parameters; with names, explain them.

  vlmfix methods                                   all of them, one after the other
  vlmfix methods vhr                               what VHR does, and what its parameters mean
  vlmfix methods pai var                           two of them
"""


def add_methods(verbs: Any) -> argparse.ArgumentParser:
    """Add the verb to a command line's subparsers; import nothing heavy."""
    parser: argparse.ArgumentParser = verbs.add_parser(
        "methods",
        usage="vlmfix methods [METHOD ...]",
        description=_ABOUT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("names", nargs="*", metavar="METHOD", help="methods to explain (default: list all)")
    return parser


def run(options: argparse.Namespace, *, show: Callable[[str], None]) -> None:
    """List the methods, or explain those named.

    Raises:
        MethodError: There is no such method.
    """
    from vlmfix.methods.registry import list_methods, method_class

    for name in options.names:
        show(explanation(method_class(name)))
    for name, method in ({} if options.names else list_methods()).items():
        show(f"{name}: {method.summary}" + (f" ({method.paper})" if method.paper else ""))
        for field in dataclasses.fields(method) if name != "none" else ():
            show(f"    {field.name} = {field.default!r}")


def explanation(method: type[Method]) -> str:
    """Return what a method does, then each parameter with its default, what it may be, what is searched and meaning."""
    from vlmfix.methods.parameters import Choice, may_be, parameter_of

    text, _, _ = (method.__doc__ or "").partition("\n\n    Attributes:")
    parts = [f"{method.name}: {textwrap.dedent('    ' + text.strip())}", f"paper: {method.paper or 'none'}"]
    for field in dataclasses.fields(method):
        search = method.search_space.get(field.name)
        lines = [f"{field.name} = {field.default!r}: {may_be(method, field)}"]
        if search is not None:
            tried = (
                ", ".join(map(repr, search.values)) if isinstance(search, Choice) else f"{search.low:g}:{search.high:g}"
            )
            lines.append(f"vlmfix tune searches {tried}")
        lines += textwrap.wrap(method.meaning_of(field.name, parameter_of(field)), 112)
        parts.append(textwrap.indent("\n".join(lines), "    ").removeprefix("    "))
    return "\n\n".join(parts) + "\n"
