"""The ``vlmfix tune`` verb. Nothing heavy is imported before it runs."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..cli_options import add_data, add_machine, add_model, add_prompts

_EPILOG = """\
examples:
  vlmfix tune --method vhr                         on the embedded testbed: calibration split, then the held-out one
  vlmfix tune --method pai --benchmark pope chair --budget 30 --range alpha=0.02:0.5
  vlmfix tune --method act.json --model llava-hf/llava-1.5-7b-hf --data COCO_DIR --limit 200 --confirm 500

Of the settings tried, the one with the lowest CHAIR_i wins whose recall (and POPE accuracy, if asked) falls by at most
the margin; with POPE alone, the lowest share of absent objects confirmed, at its recall. An interrupted search goes on
when the same command is typed again. vlmfix.patch(model, "vhr-tuned.json") takes the recipe.
"""


def add_tune(verbs: Any) -> argparse.ArgumentParser:
    """Add the verb to a command line's subparsers; import nothing heavy."""
    parser: argparse.ArgumentParser = verbs.add_parser(
        "tune",
        help="search a method's parameters, and confirm the choice on other images",
        description="Search a method's parameters on calibration images, choose by a fixed rule, confirm on held-out "
        "images, write a recipe with both figures side by side.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    what = parser.add_argument_group("what to tune")
    add_model(what)
    what.add_argument("--method", required=True, metavar="NAME", help="a method, or a recipe file to start from")
    what.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="parameters that stay fixed"
    )
    what.add_argument(
        "--range",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=RANGE",
        help="what to search, alpha=1.1:2.0 or layers=null,0: (default: what the method declares)",
    )
    what.add_argument("--budget", type=int, default=20, metavar="N", help="settings to try (default: 20)")
    what.add_argument(
        "--margin", type=float, default=1.0, metavar="POINTS", help="what recall may lose, in points (default: 1)"
    )
    what.add_argument(
        "--benchmark", nargs="+", choices=("chair", "pope"), default=["chair"], help="benchmarks (default: chair)"
    )
    data = add_data(parser, limit="images to choose on, drawn by seed (default: 200)")
    data.add_argument(
        "--confirm", type=int, metavar="N", help="images to confirm on (default: 500; on the testbed 400, 200 for POPE)"
    )
    data.add_argument("--confirm-ids", type=Path, metavar="FILE", help="their ids, beside --ids for those to choose on")
    add_prompts(parser)
    add_machine(parser)
    output = parser.add_argument_group("output")
    output.add_argument("--out", type=Path, metavar="FILE", help="recipe to write (default: METHOD-tuned.json)")
    output.add_argument("--folder", type=Path, metavar="DIR", help="folder of both runs (default: runs/tune-METHOD)")
    output.add_argument(
        "--resume", action=argparse.BooleanOptionalAction, default=True, help="go on with what DIR holds (default: on)"
    )
    return parser


def run(options: argparse.Namespace, *, show: Callable[[str], None]) -> None:
    """Tune as asked."""
    from ..config import eval_options
    from .command import TuneOptions, tune

    tune(
        TuneOptions(
            method=options.method,
            settings=tuple(options.set),
            ranges=tuple(options.range),
            budget=options.budget,
            margin=options.margin,
            confirm=options.confirm,
            confirm_ids=options.confirm_ids,
            out=options.out,
            run=replace(eval_options(options), verb="tune", out=options.folder),
        ),
        show,
    )
