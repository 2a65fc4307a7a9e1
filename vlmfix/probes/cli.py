"""The ``vlmfix inspect`` verb. Nothing heavy is imported before it runs."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vlmfix.evals.cli_options import add_machine, add_model

_EPILOG = """\
examples:
  vlmfix inspect                                   a scene of the embedded model whose caption invents an object
  vlmfix inspect --scene 356 --method vhr          before and after a patch
  vlmfix inspect --model llava-hf/llava-1.5-7b-hf --image dog.jpg --prompt 'Describe the image.' --objects dog car

One HTML file without any reference to another: where every word looks, what it rests on, which objects are likely
invented, sinks, and the heads that depend on the image.
"""


def add_inspect(verbs: Any) -> argparse.ArgumentParser:
    """Add the verb to a command line's subparsers; import nothing heavy."""
    parser: argparse.ArgumentParser = verbs.add_parser(
        "inspect",
        help="show where each word of an answer looks and what it rests on, as a page",
        description="Write a page that shows what an answer about a picture rests on, before and after a patch.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_model(parser)
    parser.add_argument("--image", type=Path, metavar="FILE", help="picture (default: a scene of the testbed)")
    parser.add_argument("--scene", type=int, metavar="N", help="scene of the testbed, from 0 (default: 350)")
    parser.add_argument(
        "--split", choices=("heldout", "heldout2", "calibration"), default="heldout", help="default: heldout"
    )
    parser.add_argument("--prompt", metavar="TEXT", help="default: Please describe this image in detail.")
    parser.add_argument(
        "--method", nargs="+", action="extend", default=[], metavar="NAME", help="compare with a method or recipe file"
    )
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="its parameters")
    parser.add_argument(
        "--objects", nargs="+", metavar="NAME", help="COCO objects that are in the picture, if you know them"
    )
    parser.add_argument("--chat-template", action=argparse.BooleanOptionalAction, default=True, help="default: on")
    parser.add_argument(
        "--max-new-tokens", type=int, metavar="N", help="limit of the answer (default: 64 testbed, 256)"
    )
    add_machine(parser, batch_size=None)
    parser.add_argument("--out", type=Path, default=Path("inspect.html"), metavar="FILE", help="default: inspect.html")
    return parser


def run(options: argparse.Namespace, *, show: Callable[[str], None]) -> None:
    """Inspect as asked and write the page."""
    from vlmfix.errors import DataError
    from vlmfix.evals.config import EvalOptions
    from vlmfix.evals.inspection_page import inspection_page
    from vlmfix.evals.inspection_run import InspectOptions, inspect_command
    from vlmfix.evals.inspection_words import summary

    if not options.out.parent.is_dir():
        raise DataError(f"--out {options.out}: there is no folder {options.out.parent}; make it first")
    machine = EvalOptions(
        dtype=options.dtype,
        device=options.device,
        attn_implementation=options.attn_implementation,
        max_new_tokens=options.max_new_tokens,
        chat_template=options.chat_template,
    )
    found = inspect_command(
        InspectOptions(
            model=options.model,
            image=options.image,
            scene=options.scene,
            split=options.split,
            prompt=options.prompt,
            methods=tuple(options.method),
            settings=tuple(options.set),
            objects=None if options.objects is None else tuple(options.objects),
            run=machine,
        )
    )
    options.out.write_text(inspection_page(found), encoding="utf-8")
    for version in found.versions:
        show(f"{version.label}: {version.caption}")
    for line in summary(found):
        show(line)
    show(f"written: {options.out}")
