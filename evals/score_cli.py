"""The ``vlmfix score`` verb. Nothing heavy is imported before it runs."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any


def add_score(verbs: Any) -> argparse.ArgumentParser:
    """Add ``vlmfix score`` to the command line; the caller sets what runs it (see :func:`run`)."""
    parser: argparse.ArgumentParser = verbs.add_parser(
        "score", help="score captions or answers in a file, without a model"
    )
    kinds = parser.add_subparsers(title="benchmarks", metavar="BENCHMARK", required=True)
    chair = kinds.add_parser("chair", allow_abbrev=False, help="captions against COCO annotations")
    chair.add_argument("file", type=Path, metavar="FILE", help="JSON lines with image_id and caption (or text, answer)")
    chair.add_argument("--data", type=Path, required=True, metavar="DIR", help="COCO folder with the annotations")
    chair.add_argument("--chair-mode", choices=("original", "nltk"), default="original", help="default: original")
    chair.set_defaults(score=_score_chair)
    pope = kinds.add_parser("pope", allow_abbrev=False, help="answers against POPE question files")
    pope.add_argument(
        "file",
        type=Path,
        metavar="FILE",
        help="JSON lines with answer (or text, caption), and question_id or the order of the questions",
    )
    pope.add_argument(
        "--questions",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="POPE question files (default: labels in FILE)",
    )
    pope.add_argument("--parser", default="official", help="rule that reads yes or no (default: official)")
    pope.set_defaults(score=_score_pope)
    amber = kinds.add_parser("amber", allow_abbrev=False, help="responses against AMBER's annotations")
    amber.add_argument("file", type=Path, metavar="FILE", help="JSON lines with id and response (or answer, text)")
    amber.add_argument(
        "--data",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder with annotations.json, relation.json and safe_words.txt",
    )
    amber.add_argument(
        "--spacy",
        metavar="MODEL",
        help="word similarity, officially en_core_web_lg (default: none, exact words only)",
    )
    amber.set_defaults(score=_score_amber)
    hallusion = kinds.add_parser("hallusionbench", allow_abbrev=False, help="answers to HallusionBench, judged or not")
    hallusion.add_argument(
        "file",
        type=Path,
        metavar="FILE",
        help="JSON lines with judge (0, 1 or 2) or answer, in the order of the questions or with their ids",
    )
    hallusion.add_argument("--questions", type=Path, required=True, metavar="FILE", help="HallusionBench.json")
    hallusion.set_defaults(score=_score_hallusionbench)
    mmhal = kinds.add_parser("mmhal", allow_abbrev=False, help="judged answers to MMHal-Bench, or requests to a judge")
    mmhal.add_argument(
        "file",
        type=Path,
        metavar="FILE",
        help="JSON lines with rating or judgement; with model_answer only, the requests to a judge are written",
    )
    mmhal.add_argument("--questions", type=Path, required=True, metavar="FILE", help="response_template.json")
    mmhal.add_argument("--judge", metavar="NAME", help="name of the judge, for the table")
    mmhal.add_argument("--requests", type=Path, metavar="FILE", help="where requests go (default: beside FILE)")
    mmhal.set_defaults(score=_score_mmhal)
    mme = kinds.add_parser("mme", allow_abbrev=False, help="answers to the hallucination subset of MME")
    mme.add_argument(
        "file",
        type=Path,
        metavar="FILE",
        help="results folder of the official tool, or JSON lines with task, image, question, label and answer",
    )
    mme.add_argument("--parser", default="official", help="rule that reads yes or no: official or lmms")
    mme.set_defaults(score=_score_mme)
    for kind in (chair, pope, amber, hallusion, mmhal, mme):
        kind.add_argument("--out", type=Path, metavar="FILE", help="also write the figures and integer counts as JSON")
    return parser


def run(options: argparse.Namespace, *, show: Callable[[str], None]) -> None:
    """Score the file as asked and show the table."""
    show(options.score(options))


def _score_chair(options: argparse.Namespace) -> str:
    from .rescore import score_chair_file

    return score_chair_file(options.file, options.data, mode=options.chair_mode, out=options.out)


def _score_pope(options: argparse.Namespace) -> str:
    from .rescore import score_pope_file

    return score_pope_file(options.file, options.questions, parser=options.parser, out=options.out)


def _score_amber(options: argparse.Namespace) -> str:
    from .rescore_benchmarks import score_amber_file

    return score_amber_file(options.file, options.data, spacy_model=options.spacy, out=options.out)


def _score_hallusionbench(options: argparse.Namespace) -> str:
    from .rescore_benchmarks import score_hallusionbench_file

    return score_hallusionbench_file(options.file, options.questions, out=options.out)


def _score_mmhal(options: argparse.Namespace) -> str:
    from .rescore_benchmarks import score_mmhal_file

    return score_mmhal_file(
        options.file, options.questions, judge=options.judge, requests=options.requests, out=options.out
    )


def _score_mme(options: argparse.Namespace) -> str:
    from .rescore_benchmarks import score_mme_file

    return score_mme_file(options.file, parser=options.parser, out=options.out)
