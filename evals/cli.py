"""The ``vlmfix eval`` verb. Nothing heavy is imported before it runs."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
    what.add_argument("--model", metavar="PATH_OR_ID", help="model folder or hub id (default: the embedded testbed)")
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


def add_data(parser: argparse.ArgumentParser, *, limit: str) -> Any:
    """Add the options that choose images and questions; ``limit`` explains ``--limit``."""
    data = parser.add_argument_group("data")
    data.add_argument("--data", type=Path, metavar="DIR", help="COCO folder (default: the testbed's scenes)")
    data.add_argument("--ids", type=Path, metavar="FILE", help="image ids to use: one per line, or a JSON list")
    data.add_argument("--limit", type=int, metavar="N", help=limit)
    data.add_argument("--seed", type=int, default=0, help="choice of images and questions (default: 0)")
    data.add_argument(
        "--pope-questions",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="official POPE files (default: built by the published rule)",
    )
    data.add_argument(
        "--chair-mode",
        choices=("original", "nltk"),
        default="original",
        help="word normalisation of CHAIR (default: original)",
    )
    return data


def add_prompts(parser: argparse.ArgumentParser) -> Any:
    """Add the options on prompts and decoding."""
    asking = parser.add_argument_group("prompts and decoding")
    asking.add_argument(
        "--prompt", metavar="TEXT", help="captioning prompt (default: Please describe this image in detail.)"
    )
    asking.add_argument(
        "--pope-prompt", metavar="TEXT", help="POPE prompt with {question} (default: asks for a single word or phrase)"
    )
    asking.add_argument(
        "--chat-template",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="wrap prompts into the processor's chat template (default: on)",
    )
    asking.add_argument(
        "--max-new-tokens",
        type=int,
        metavar="N",
        help="limit of captions (default: 128 testbed, else 512) and open answers (256 mmhal, else 64)",
    )
    asking.add_argument("--pope-max-new-tokens", type=int, metavar="N", help="limit of yes/no answers (default: 16)")
    return asking


def add_machine(parser: argparse.ArgumentParser) -> Any:
    """Add the options on device and batch, and return their group."""
    machine = parser.add_argument_group("machine")
    machine.add_argument("--batch-size", type=int, metavar="N", help="samples per batch (default: 64 testbed, else 8)")
    machine.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="default: float32 on the CPU, else the checkpoint's",
    )
    machine.add_argument(
        "--device",
        metavar="DEVICE",
        help="cpu, cuda, cuda:1, or auto to spread over several (default: cuda if there, else cpu)",
    )
    machine.add_argument(
        "--attn-implementation", metavar="NAME", help="attention of transformers, such as sdpa or eager"
    )
    return machine


def run(options: argparse.Namespace, *, show: Callable[[str], None]) -> None:
    """Evaluate as asked."""
    from dataclasses import replace

    from vlmfix.evals.config import eval_options
    from vlmfix.evals.runner import evaluate

    evaluate(replace(eval_options(options), methods=tuple(options.method), settings=tuple(options.set)), show=show)
