"""The ``vlmfix`` command: a table of verbs, each in a module that is imported when it is typed.

Nothing heavy is imported before a verb runs, so that ``--help`` is immediate.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NamedTuple

import vlmfix
from vlmfix.errors import VlmfixError, how_to_install


class Verb(NamedTuple):
    """A verb of the command line.

    Attributes:
        module: Where it lives. ``add_<verb>(verbs)`` adds its parser without importing anything heavy, and
            ``run(options, show=...)`` runs it.
        help: One line for the list of verbs.
        needs_evaluation: Whether it needs the packages of the extra ``eval``.
        runs_programs: Whether it runs other people's programs, whose environment and logging are their own.
    """

    module: str
    help: str
    needs_evaluation: bool = True
    runs_programs: bool = False


VERBS = {
    "eval": Verb("vlmfix.evals.evaluate", "evaluate methods against 'none' on CHAIR, POPE and other benchmarks"),
    "methods": Verb("vlmfix.methods.listing", "list the methods with their parameters and papers", False),
    "info": Verb("vlmfix.info", "show what the plugin sees in a model, and which methods it takes", False),
    "score": Verb("vlmfix.evals.score_files", "score captions or answers in a file, without a model"),
    "calibrate": Verb("vlmfix.evals.calibrate", "learn what a method needs to know about a model, from a few images"),
    "tune": Verb("vlmfix.evals.tune.command", "search a method's parameters, and confirm the choice on other images"),
    "power": Verb("vlmfix.evals.power", "how small a difference n images can show", False),
    "inspect": Verb(
        "vlmfix.evals.inspect.command", "show where each word of an answer looks and what it rests on, as a page"
    ),
    "trace": Verb(
        "vlmfix.evals.inspect.trace", "show which layers and attention edges an answer comes through, as a page"
    ),
    "compare": Verb("vlmfix.evals.compare.report", "paired differences between the methods of several runs"),
    "plot": Verb("vlmfix.evals.report.plots", "the plots of a run as PNG"),
    "export": Verb("vlmfix.clients.export", "fold factors of heads into a checkpoint, for engines of others", False),
    "run": Verb("vlmfix.clients.run", "run a program with every model that it loads patched", False, True),
    "serve": Verb("vlmfix.clients.serve", "transformers serve with a patch, methods by request", False, True),
    "reproduce": Verb("vlmfix.evals.reproduce.command", "published tables: commands, and expected beside measured"),
}


EMBEDDED_MODELS = ("tiny", "smol", "smol-seed1")
"""Models that come with the evaluation, by the name that ``--model`` takes."""


EVALUATION_PACKAGES = ("filelock", "jinja2", "matplotlib", "numpy", "PIL", "pycocotools", "tqdm")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: Words after ``vlmfix``; those of the process by default.

    Returns:
        Exit status: 0, 2 for an error the user can act on, 130 after Ctrl-C.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = command_parser(words[0] if words else "")
    options = parser.parse_args(words)
    if options.verb is None:
        parser.print_help()
        return 2
    options.command = tuple(words)
    verb = VERBS[options.verb]
    try:
        if not verb.runs_programs:
            # transformers' remarks on missing optional packages are no news to the user of this command.
            os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
            # On a machine that does other things too, threads that spin while they wait slow each other down tenfold.
            os.environ.setdefault("GOMP_SPINCOUNT", "10000")
            _set_up_logging()
        _run(verb, options)
    except VlmfixError as error:
        sys.stderr.write(f"vlmfix: error: {error}\n")
        return 2
    except KeyboardInterrupt as error:
        sys.stderr.write(f"\nvlmfix: {error or 'interrupted'}\n")
        return 130
    except BrokenPipeError:  # The reader of our output (head, less) has gone: not an error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return 0


def command_parser(verb: str | None = None) -> argparse.ArgumentParser:
    """Return the parser of the command line.

    Args:
        verb: The verb that is typed, whose module alone is imported; the others are no more than lines of help.
            ``None``: all of them.
    """
    parser = argparse.ArgumentParser(
        prog="vlmfix",
        allow_abbrev=False,
        description="Make vision-language models hallucinate less at inference time, and measure it.",
    )
    parser.add_argument("--version", action="version", version=f"vlmfix {vlmfix.__version__}")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", dest="verb")
    for name, each in VERBS.items():
        if verb in (None, name):
            getattr(import_module(each.module), f"add_{name}")(verbs)
        else:
            verbs.add_parser(name, help=each.help)
    return parser


def _run(verb: Verb, options: argparse.Namespace) -> None:
    """Run a verb.

    Raises:
        VlmfixError: The packages of the evaluation are not installed; or what the verb raises.
    """
    missing = [name for name in EVALUATION_PACKAGES if importlib.util.find_spec(name) is None]
    names_embedded = not verb.needs_evaluation and getattr(options, "model", None) in EMBEDDED_MODELS
    if missing and (verb.needs_evaluation or names_embedded):
        raise VlmfixError(f"this needs {', '.join(missing)}; type: {how_to_install('eval')}")
    if names_embedded:
        options.model = str(import_module("vlmfix.evals.testbed").model_folder(options.model))
    import_module(verb.module).run(options, show=_show)


def _show(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _set_up_logging() -> None:
    level = os.environ.get("VLMFIX_LOG_LEVEL", "WARNING").upper()
    if not isinstance(logging.getLevelName(level), int):
        raise VlmfixError(f"VLMFIX_LOG_LEVEL={level}: expected DEBUG, INFO, WARNING or ERROR")
    logging.basicConfig(level=level, format="%(levelname)s: %(message)s")
