"""The ``vlmfix eval`` verb. Nothing heavy is imported before it runs."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .cli_options import add_data, add_machine, add_model, add_prompts

#: As in ``config.BENCHMARKS``, which is not imported before the verb runs.
BENCHMARKS = ("chair", "pope", "sycophancy", "amber", "mme", "hallusionbench", "mmhal", "custom")

_EPILOG = """\
examples:
  vlmfix eval                                      none, VHR and VAR on the embedded testbed, under 3 minutes on 2 cores
  vlmfix eval --method vhr --set alpha=1.5 --limit 100
  vlmfix eval --method all --limit 100             every method the model takes, and which are worth having
  vlmfix eval --model llava-hf/llava-1.5-7b-hf --data COCO_DIR --limit 500 --dtype float16
                                                   COCO_DIR: instances_val2014.json, captions_val2014.json, val2014/
  vlmfix eval --benchmark sycophancy               POPE's questions with hints and doubts
  vlmfix eval --model ... --benchmark amber mme --benchmark-data amber=AMBER_DIR mme=MME_DIR
  vlmfix eval --model ... --benchmark custom --benchmark-data custom=questions.jsonl
                                                   lines of {"image": ..., "question": ..., "answer": ...}

An interrupted run goes on when the same command is typed again. Every run evaluates 'none' on the same images.
"""


def add_eval(verbs: Any) -> argparse.ArgumentParser:
    """Add the verb to a command line's subparsers; import nothing heavy."""
    parser: argparse.ArgumentParser = verbs.add_parser(
        "eval",
        help="evaluate methods against 'none' on CHAIR, POPE and other benchmarks",
        description="Evaluate methods against 'none', greedy decoding, with paired 95 %% intervals.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    what = parser.add_argument_group("what to evaluate")
    add_model(what)
    what.add_argument(
        "--method",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME",
        help="methods, recipe files, or all: whatever the model takes as it comes (default: vhr var)",
    )
    what.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="method parameter: alpha=1.3 or vhr.alpha=1.3",
    )
    what.add_argument(
        "--benchmark",
        nargs="+",
        choices=BENCHMARKS,
        default=["chair", "pope"],
        metavar="NAME",
        help=f"benchmarks: {', '.join(BENCHMARKS)} (default: chair pope)",
    )
    what.add_argument(
        "--controls",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="early-stop and yes-bias controls, and VHR's head controls (default: on)",
    )
    data = add_data(
        parser,
        limit="number of images per benchmark, drawn by seed; of sets of figures for hallusionbench, per task for mme "
        "(default: 500; testbed 400, POPE 200, sycophancy 100; all of amber, mme, hallusionbench, mmhal, custom)",
    )
    data.add_argument(
        "--split",
        choices=("heldout", "heldout2", "calibration"),
        default="heldout",
        help="testbed scenes; strengths were chosen on calibration (default: heldout)",
    )
    data.add_argument(
        "--benchmark-data",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=PATH",
        help="the benchmark's own folder (amber, mme, hallusionbench, mmhal), a file of questions (custom), the folder "
        "of the images that --pope-questions name (pope), or datasets:PATH_OR_ID[#SPLIT] for the datasets library",
    )
    asking = add_prompts(parser)
    asking.add_argument(
        "--benchmark-prompt",
        dest="benchmark_prompts",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=TEXT",
        help="prompt of another benchmark's questions, with {question}",
    )
    scoring = parser.add_argument_group("scoring")
    scoring.add_argument(
        "--judge",
        metavar="COMMAND",
        help="rates MMHal-Bench: reads a prompt, writes a judgement with 'Rating: N' (default: not scored)",
    )
    scoring.add_argument("--judge-name", metavar="NAME", help="name of the judge in the report (default: the command)")
    scoring.add_argument(
        "--spacy", metavar="MODEL", help="word similarity of AMBER, officially en_core_web_lg (default: exact words)"
    )
    add_machine(parser).add_argument(
        "--reuse-images",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="encode an image once for its questions and for all methods; answers are the same (default: on)",
    )
    output = parser.add_argument_group("output")
    output.add_argument("--out", type=Path, metavar="DIR", help="run folder (default: runs/MODEL-SETTINGS)")
    output.add_argument(
        "--resume",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="keep the answers an earlier, interrupted run left in the folder (default: on)",
    )
    output.add_argument(
        "--rescore",
        action="store_true",
        help="score the answers in the folder again and generate none, also those of another version of vlmfix",
    )
    return parser


def run(options: argparse.Namespace, *, show: Callable[[str], None]) -> None:
    """Evaluate as asked."""
    from dataclasses import replace

    from vlmfix.evals.config import eval_options
    from vlmfix.evals.runner import evaluate

    evaluate(replace(eval_options(options), methods=tuple(options.method), settings=tuple(options.set)), show=show)
