"""The ``vlmfix plot`` verb. Nothing heavy is imported before it runs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_plot(verbs: Any) -> argparse.ArgumentParser:
    """Add ``vlmfix plot`` to the command line; the caller sets what runs it (see :func:`run`)."""
    parser: argparse.ArgumentParser = verbs.add_parser(
        "plot",
        allow_abbrev=False,
        help="the plots of a run as PNG",
        description="Draw a run's plots: differences with their intervals, hallucination against recall, and invented "
        "objects by category. Needs matplotlib (pip install 'vlmfix[plot]').",
    )
    parser.add_argument("folder", type=Path, metavar="RUN", help="run folder")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the files go (default: the run folder)")
    return parser


def run(options: argparse.Namespace) -> str:
    """Draw the plots and say where they are.

    Raises:
        VlmfixError: No such run, nothing to draw, or matplotlib is not installed.
    """
    from .counts import load_results
    from .plots import write_plots

    written = write_plots(load_results(options.folder), options.out or options.folder)
    return f"written: {' '.join(map(str, written))}"
