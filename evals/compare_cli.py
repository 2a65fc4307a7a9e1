"""The ``vlmfix compare`` verb. Nothing heavy is imported before it runs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_compare(verbs: Any) -> argparse.ArgumentParser:
    """Add ``vlmfix compare`` to the command line; the caller sets what runs it (see ``compare_report.run``)."""
    parser: argparse.ArgumentParser = verbs.add_parser(
        "compare",
        allow_abbrev=False,
        help="paired differences between the methods of several runs",
        description="Compare the methods of several run folders, paired on the images and questions that all of them "
        "share. Neither data nor a model is needed.",
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folders; called A, B, ... in this order")
    parser.add_argument("--against", metavar="ROW", help="row to compare with, such as B:vhr (default: A's baseline)")
    parser.add_argument(
        "--method", nargs="+", action="extend", default=[], metavar="NAME", help="methods to show (default: all)"
    )
    parser.add_argument(
        "--across-prompts", action="store_true", help="compare answers to different prompts too (default: refuse)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap (default: 0)")
    parser.add_argument(
        "--out", type=Path, metavar="PATH", help="write FILE.json, FILE.md, or both into a folder (compare.json, .md)"
    )
    return parser
