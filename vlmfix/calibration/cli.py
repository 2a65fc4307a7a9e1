"""The ``vlmfix calibrate`` verb. Nothing heavy is imported before it runs."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from vlmfix.evals.cli_options import add_captioning, add_images, add_machine, add_model

_EPILOG = """\
examples:
  vlmfix calibrate adhh                            on the embedded testbed
  vlmfix calibrate allpath --set answers=yesno     heads for yes/no questions
  vlmfix calibrate act --model llava-hf/llava-1.5-7b-hf --data COCO_DIR --limit 100 --exclude ids.txt

act costs a prefill per question and head; adhh a decode step per named object and head; iri two prefills per question
and layer; the others a prefill or a caption per image. VLMFIX_LOG_LEVEL=INFO shows how far it is.
vlmfix.patch(model, "act.json") takes the file.
"""


def add_calibrate(verbs: Any) -> argparse.ArgumentParser:
    """Add the verb to a command line's subparsers; import nothing heavy."""
    parser: argparse.ArgumentParser = verbs.add_parser(
        "calibrate",
        help="learn what a method needs to know about a model, from a few images",
        description="Learn heads, statistics or dimensions of a method for one model, and write them as a recipe.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("method", metavar="METHOD", help="act, adhh, adaiat, allpath, iri, vaf or var")
    add_model(parser)
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="option of the search or the method"
    )
    data = add_images(
        parser,
        data="COCO folder (default: scenes of the testbed's calibration split)",
        limit="number of images, drawn by seed (default: 500; on the testbed 40)",
    )
    data.add_argument(
        "--exclude", type=Path, nargs="+", default=[], metavar="FILE", help="refuse to run if one of these ids is used"
    )
    add_captioning(parser, max_new_tokens="limit of captions (default: 128 testbed, else 512)")
    add_machine(parser, batch_size="samples per batch (default: 32 testbed, else 8)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="recipe to write (default: METHOD.json)")
    return parser


def run(options: argparse.Namespace, *, show: Callable[[str], None]) -> None:
    """Calibrate as asked."""
    from vlmfix.evals.calibration import CalibrateOptions, calibrate_command
    from vlmfix.evals.config import eval_options

    run = replace(eval_options(options), out=None)  # Here --out is the recipe.
    calibrate_command(
        CalibrateOptions(options.method, tuple(options.set), tuple(options.exclude), options.out, run), show
    )
