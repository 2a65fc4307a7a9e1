"""The ``vlmfix score`` verb. Nothing heavy is imported before it runs."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vlmfix.errors import VlmfixError

from ..flags import verb_parser

#: Named here as well as in ``metrics.pope``, whose import takes too long for ``--help``.
POPE_PARSERS = ("official", "official_raw", "opera", "vcd", "lmms", "vlmeval")


_CHAIR_EPILOG = """\
--ground-truth takes a COCO folder (instances_val2014.json, captions_val2014.json, also below annotations/), or JSON:
  {"mode": "nltk", "objects": {"139": ["book", "chair"], ...}}    or {"139": [...]}, or lines of image_id, objects
  {"categories": [...], "objects": {"139": [14, 15], ...}}        places in the list of categories
nltk and mixed need nltk and its data: pip install 'vlmfix[nltk]' &&
  python -m nltk.downloader punkt_tab averaged_perceptron_tagger_eng
"""


_ABOUT = """\
Score captions or answers in a file, whoever generated them, without a model. Each benchmark has its own --help.

  vlmfix score chair --captions captions.jsonl --ground-truth COCO_DIR --mode nltk
  vlmfix score pope --answers answers.jsonl --questions coco_pope_*.json
  vlmfix score amber responses.jsonl --data AMBER_DIR
"""


def add_score(verbs: Any) -> argparse.ArgumentParser:
    """Add the verb to a command line's subparsers; import nothing heavy."""
    parser = verb_parser(verbs, "score", _ABOUT, "BENCHMARK FILE [OPTIONS]")
    kinds = parser.add_subparsers(title="benchmarks", metavar="BENCHMARK", required=True)
    chair = _add_chair(kinds)
    pope = _add_pope(kinds)
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
    for kind in (amber, hallusion, mmhal, mme):
        kind.add_argument(
            "--subset", action="store_true", help="score what is answered, such as the files of a run with --limit"
        )
    for kind in (chair, pope, amber, hallusion, mmhal, mme):
        kind.add_argument("--out", type=Path, metavar="FILE", help="also write the figures and integer counts as JSON")
    from .declared import add_declared

    add_declared(kinds)
    return parser


def _add_chair(kinds: Any) -> Any:
    chair = kinds.add_parser(
        "chair",
        allow_abbrev=False,
        help="captions against COCO annotations",
        epilog=_CHAIR_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_file(chair, "--captions", "JSON lines with image_id and caption (or text, answer, response, ...)")
    chair.add_argument(
        "--ground-truth",
        "--data",
        type=Path,
        required=True,
        metavar="PATH",
        help="COCO folder with the annotations, or a file of objects per image",
    )
    chair.add_argument(
        "--mode",
        "--chair-mode",
        choices=("original", "nltk", "mixed"),
        default="original",
        help="word matching of captions and ground truth; mixed: captions nltk, ground truth original, as in OPERA's "
        "table (default: original)",
    )
    _add_comparison(chair, "captions of the same images")
    chair.set_defaults(score=_score_chair)
    return chair


def _add_pope(kinds: Any) -> Any:
    pope = kinds.add_parser("pope", allow_abbrev=False, help="answers against POPE question files")
    _add_file(pope, "--answers", "JSON lines with answer (or text, ...), and question_id or the order of the questions")
    pope.add_argument(
        "--questions",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="POPE question files (default: labels beside the answers)",
    )
    pope.add_argument("--parser", choices=POPE_PARSERS, default="official", help="reads yes or no (default: official)")
    pope.add_argument("--scores", metavar="KEY", help="key of a yes/no logit (higher means yes), for the AUC")
    pope.add_argument("--by-order", action="store_true", help="answers are in the order of the questions, ids or not")
    _add_comparison(pope, "answers to the same questions")
    pope.set_defaults(score=_score_pope)
    return pope


def _add_file(parser: Any, flag: str, text: str) -> None:
    parser.add_argument("file", type=Path, nargs="?", metavar="FILE", help=f"the same as {flag} FILE")
    parser.add_argument(flag, dest="named_file", type=Path, metavar="FILE", help=text)


def _add_comparison(parser: Any, text: str) -> None:
    parser.add_argument("--text-key", metavar="KEY", help="key of the model's text, if it has no usual name")
    parser.add_argument("--baseline", type=Path, metavar="FILE", help=f"{text}, to compare with (paired)")


def _file(options: argparse.Namespace, flag: str) -> Path:
    given = [path for path in (options.file, options.named_file) if path is not None]
    if len(given) != 1:
        raise VlmfixError(f"expected one file to score, found {len(given)}; type {flag} FILE")
    path: Path = given[0]
    return path


def run(options: argparse.Namespace, *, show: Callable[[str], None]) -> None:
    """Score the file as asked and show the table."""
    show(options.score(options))


def _score_chair(options: argparse.Namespace) -> str:
    from .chair import score_chair_file

    return score_chair_file(
        _file(options, "--captions"),
        options.ground_truth,
        mode=options.mode,
        text_key=options.text_key,
        baseline=options.baseline,
        out=options.out,
    )


def _score_pope(options: argparse.Namespace) -> str:
    from .pope import score_pope_file

    return score_pope_file(
        _file(options, "--answers"),
        options.questions,
        parser=options.parser,
        text_key=options.text_key,
        scores=options.scores,
        by_order=options.by_order,
        baseline=options.baseline,
        out=options.out,
    )


def _score_amber(options: argparse.Namespace) -> str:
    from .benchmarks import score_amber_file

    return score_amber_file(
        options.file, options.data, spacy_model=options.spacy, subset=options.subset, out=options.out
    )


def _score_hallusionbench(options: argparse.Namespace) -> str:
    from .benchmarks import score_hallusionbench_file

    return score_hallusionbench_file(options.file, options.questions, subset=options.subset, out=options.out)


def _score_mmhal(options: argparse.Namespace) -> str:
    from .benchmarks import score_mmhal_file

    return score_mmhal_file(
        options.file,
        options.questions,
        judge=options.judge,
        requests=options.requests,
        subset=options.subset,
        out=options.out,
    )


def _score_mme(options: argparse.Namespace) -> str:
    from .benchmarks import score_mme_file

    return score_mme_file(options.file, parser=options.parser, subset=options.subset, out=options.out)
