"""The ``vlmfix`` command. Nothing heavy is imported before a verb runs, so that ``--help`` is immediate."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence

import vlmfix
from vlmfix.errors import VlmfixError
from vlmfix.evals.calibrate import add_calibrate
from vlmfix.evals.compare.compare import add_compare
from vlmfix.evals.evaluate import add_eval
from vlmfix.evals.inspect.run import add_inspect
from vlmfix.evals.power import add_power
from vlmfix.evals.report.plots import add_plot
from vlmfix.evals.score_files.command import add_score
from vlmfix.evals.tune.command import add_tune


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: Words after ``vlmfix``; those of the process by default.

    Returns:
        Exit status: 0, 2 for an error the user can act on, 130 after Ctrl-C.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = _parser()
    options = parser.parse_args(words)
    if options.run is None:
        parser.print_help()
        return 2
    # transformers' remarks on missing optional packages are no news to the user of this command.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # On a machine that does other things too, threads that spin while they wait slow each other down tenfold.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    options.command = tuple(words)
    try:
        _set_up_logging()
        options.run(options)
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


def _set_up_logging() -> None:
    level = os.environ.get("VLMFIX_LOG_LEVEL", "WARNING").upper()
    if not isinstance(logging.getLevelName(level), int):
        raise VlmfixError(f"VLMFIX_LOG_LEVEL={level}: expected DEBUG, INFO, WARNING or ERROR")
    logging.basicConfig(level=level, format="%(levelname)s: %(message)s")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vlmfix",
        allow_abbrev=False,
        description="Make vision-language models hallucinate less at inference time, and measure it.",
    )
    parser.add_argument("--version", action="version", version=f"vlmfix {vlmfix.__version__}")
    parser.set_defaults(run=None)
    verbs = parser.add_subparsers(title="verbs", metavar="VERB")
    add_eval(verbs).set_defaults(run=_eval)
    methods = verbs.add_parser("methods", help="list the methods with their parameters and papers")
    methods.set_defaults(run=_methods)
    info = verbs.add_parser("info", help="show what the plugin sees in a model")
    info.add_argument("model", metavar="MODEL", help="folder or hub id; only its configuration is read")
    info.set_defaults(run=_info)
    add_score(verbs).set_defaults(run=_score)
    add_calibrate(verbs).set_defaults(run=_calibrate)
    add_tune(verbs).set_defaults(run=_tune)
    add_power(verbs).set_defaults(run=_power)
    add_inspect(verbs).set_defaults(run=_inspect)
    add_compare(verbs).set_defaults(run=_compare)
    add_plot(verbs).set_defaults(run=_plot)
    return parser


def _show(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _need_evals() -> None:
    """Say which extra is missing instead of a traceback from deep inside."""
    import importlib.util

    missing = [
        name
        for name in ("filelock", "jinja2", "matplotlib", "numpy", "PIL", "pycocotools", "tqdm")
        if importlib.util.find_spec(name) is None
    ]
    if missing:
        raise VlmfixError(f"this needs {', '.join(missing)}; type: pip install 'vlmfix[eval]'")


def _eval(options: argparse.Namespace) -> None:
    _need_evals()
    from vlmfix.evals.evaluate import run

    run(options, show=_show)


def _calibrate(options: argparse.Namespace) -> None:
    _need_evals()
    from vlmfix.evals.calibrate import run

    run(options, show=_show)


def _compare(options: argparse.Namespace) -> None:
    _need_evals()
    from vlmfix.evals.compare.report import run

    _show(run(options))


def _tune(options: argparse.Namespace) -> None:
    _need_evals()
    from vlmfix.evals.tune.command import run

    run(options, show=_show)


def _plot(options: argparse.Namespace) -> None:
    _need_evals()
    from vlmfix.evals.report.plots import run

    _show(run(options))


def _inspect(options: argparse.Namespace) -> None:
    _need_evals()
    from vlmfix.evals.inspect.run import run

    run(options, show=_show)


def _power(options: argparse.Namespace) -> None:
    from vlmfix.evals.power import run

    _show(run(options))


def _score(options: argparse.Namespace) -> None:
    _need_evals()
    from vlmfix.evals.score_files.command import run

    run(options, show=_show)


def _methods(options: argparse.Namespace) -> None:
    import dataclasses

    for name, method in vlmfix.list_methods().items():
        _show(f"{name}: {method.summary}" + (f" ({method.paper})" if method.paper else ""))
        for parameter in dataclasses.fields(method):
            if name != "none":
                _show(f"    {parameter.name} = {parameter.default!r}")


def _info(options: argparse.Namespace) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    from vlmfix.errors import UnsupportedModelError
    from vlmfix.model.anatomy import analyse

    try:
        config = AutoConfig.from_pretrained(options.model)
        with torch.device("meta"):  # The structure without the weights.
            model = AutoModelForImageTextToText.from_config(config)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UnsupportedModelError(f"no vision-language model in {options.model!r}: {reason}") from error
    anatomy = analyse(model)
    first = anatomy.sites[0].module
    heads = getattr(anatomy.text_config, "num_attention_heads", "?")
    key_heads = getattr(anatomy.text_config, "num_key_value_heads", None) or heads
    layers = sorted({site.layer_idx for site in anatomy.sites})
    _show(f"{type(model).__name__} (model_type {config.model_type})")
    _show(
        f"  text layers: {anatomy.num_layers}, hidden size {anatomy.hidden_size}, {heads} heads, {key_heads} key heads"
    )
    _show(f"  text attention modules: {len(anatomy.sites)} x {type(first).__name__}, {anatomy.sites[0].name} ...")
    if len(layers) < anatomy.num_layers:
        _show(f"  layers with softmax attention: {', '.join(map(str, layers))}")
    _show(f"  image token ids: {', '.join(map(str, anatomy.image_token_ids))}")
