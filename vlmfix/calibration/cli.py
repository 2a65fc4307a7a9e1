"""The ``vlmfix calibrate`` verb. Nothing heavy is imported before it runs."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

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
    parser.add_argument("--model", metavar="PATH_OR_ID", help="model folder or hub id (default: the embedded testbed)")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="option of the search or the method"
    )
    data = parser.add_argument_group("data")
    data.add_argument(
        "--data", type=Path, metavar="DIR", help="COCO folder (default: scenes of the testbed's calibration split)"
    )
    data.add_argument("--ids", type=Path, metavar="FILE", help="image ids to use: one per line, or a JSON list")
    data.add_argument(
        "--exclude", type=Path, nargs="+", default=[], metavar="FILE", help="refuse to run if one of these ids is used"
    )
    data.add_argument(
        "--limit", type=int, metavar="N", help="number of images, drawn by seed (default: 500; on the testbed 40)"
    )
    data.add_argument("--seed", type=int, default=0, help="choice of images and questions (default: 0)")
    data.add_argument("--prompt", metavar="TEXT", help="captioning prompt, as of 'vlmfix eval'")
    data.add_argument("--pope-prompt", metavar="TEXT", help="prompt of questions with {question}, as of 'vlmfix eval'")
    data.add_argument("--chat-template", action=argparse.BooleanOptionalAction, default=True, help="default: on")
    data.add_argument("--max-new-tokens", type=int, metavar="N", help="limit of captions (default: 128 testbed, 512)")
    machine = parser.add_argument_group("machine")
    machine.add_argument("--batch-size", type=int, metavar="N", help="default: 32 testbed, else 8")
    machine.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), help="as of 'vlmfix eval'")
    machine.add_argument("--device", metavar="DEVICE", help="cpu, cuda, cuda:1, or auto (default: cuda if there)")
    machine.add_argument("--attn-implementation", metavar="NAME", help="attention of transformers")
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
