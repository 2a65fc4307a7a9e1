"""``vlmfix inspect``: the verb that writes the page."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from vlmfix.errors import DataError

from ..flags import add_verb
from .options import InspectOptions

_ABOUT = """\
Write a page that shows what an answer about a picture rests on, before and after a patch.

  vlmfix inspect                                   a scene of the embedded model whose caption invents an object
  vlmfix inspect --scene 356 --method vhr          before and after a patch
  vlmfix inspect --model llava-hf/llava-1.5-7b-hf --image dog.jpg --prompt 'Describe the image.' --objects dog car

The page is one HTML file that needs no other: where every word looks, what it rests on, which objects are likely
invented, sinks, and the heads that depend on the image.
"""


def add_inspect(verbs: Any) -> argparse.ArgumentParser:
    """Add the verb to a command line's subparsers; import nothing heavy."""
    return add_verb(
        verbs,
        "inspect",
        InspectOptions,
        about=_ABOUT,
        help_of={
            "settings": "parameters of the method",
            "prompt": "what to ask (default: Please describe this image in detail.)",
            "max_new_tokens": "longest answer, in tokens (default: 64 testbed, else 256)",
        },
    )


def run(arguments: argparse.Namespace, *, show: Callable[[str], None]) -> None:
    """Inspect as asked and write the page."""
    # Imported here, so that the verb's --help does not wait for torch.
    from .load import inspect_command
    from .page import inspection_page, summary

    options = InspectOptions.from_arguments(arguments)
    if not options.out.parent.is_dir():
        raise DataError(f"--out {options.out}: there is no folder {options.out.parent}; make it first")
    found = inspect_command(options)
    options.out.write_text(inspection_page(found), encoding="utf-8")
    for version in found.versions:
        show(f"{version.label}: {version.caption}")
    for line in summary(found):
        show(line)
    show(f"written: {options.out}")
