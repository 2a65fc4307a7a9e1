"""``vlmfix run``: run a Python program with every vision-language model that it loads patched."""

from __future__ import annotations

import argparse
import os
import re
import runpy
import shutil
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmfix.clients.options import add_program, methods_of, verb_with_method, words_behind_dashes
from vlmfix.errors import DataError, UnsupportedModelError, VlmfixError

if TYPE_CHECKING:
    from vlmfix.clients.loading import PatchOnLoad
    from vlmfix.methods.base import Method


_ABOUT = """\
Run a Python program with every vision-language model that it loads patched, and say at the end what the patch did.

  vlmfix run vhr -- lm_eval --model hf-multimodal --model_args pretrained=MODEL --tasks mmmu_val
  vlmfix run pai --set alpha=0.3 -- -m lmms_eval --model llava_hf --model_args pretrained=MODEL --tasks pope
  vlmfix run recipe.json -- my_script.py --its-own option
  accelerate launch -m vlmfix run vhr -- -m lmms_eval ...      on several GPUs, or torchrun ... -m vlmfix run vhr -- ...

PROGRAM is a script, -m MODULE, or the name of a command that a Python package installs. Only this process is patched,
not those that the program starts. The exit status is the program's; 2 if it loaded no vision-language model, if none
was ever called with a picture (by the first of several processes), or if a call was refused.
"""


_CACHING = ("--use_cache",)
"""Options by which evaluators keep answers under keys that do not name the patch."""


_LAUNCHERS = ("accelerate", "deepspeed", "torchrun", "torch.distributed.run", "torch.distributed.launch")
"""Programs that start others, which would not be patched."""


def add_run(verbs: Any) -> argparse.ArgumentParser:
    """Add the verb to a command line's subparsers; import nothing heavy."""
    parser = verb_with_method(verbs, "run", "-- PROGRAM [ARGUMENT ...]", _ABOUT)
    add_program(parser, "program", "what to run, with its arguments")
    return parser


def run(options: argparse.Namespace, *, show: Callable[[str], None]) -> None:
    """Run the program.

    Raises:
        VlmfixError: There is no such program; or see :func:`check_use`.
        SystemExit: The program's own, if it failed.
    """
    words = words_behind_dashes(options)
    cached = [word for word in words if word.partition("=")[0] in _CACHING]
    if cached:
        raise VlmfixError(
            f"{cached[0]} keeps answers under keys that do not name the patch, so that a patched model would be given "
            "the stock model's. Leave it out."
        )
    launchers = [word for word in words[: 1 + (words[0] == "-m")] if word in _LAUNCHERS]
    if launchers:
        raise VlmfixError(
            f"{launchers[0]} starts processes of its own, which would not be patched. Let it start vlmfix: "
            f"{' '.join(words[:2])} ... -m vlmfix run {options.method} -- PROGRAM"
        )
    run_patched(methods_of(options), words, show)


def run_patched(methods: Sequence[Method] | None, words: Sequence[str], show: Callable[[str], None]) -> None:
    """Run a program with every vision-language model that it loads patched, and show what the patch did.

    Args:
        methods: As ``patch`` takes them.
        words: The program and its arguments.
        show: Is given the status of each model.

    Raises:
        VlmfixError: There is no such program; or see :func:`check_use`.
        SystemExit: The program's own, if it failed.
    """
    from vlmfix.clients.loading import PatchOnLoad

    program = program_of(words)
    with PatchOnLoad(methods) as loading:
        try:
            failed = exit_status(program)
        finally:  # a server ends by Ctrl-C
            several = f"process {rank()}: " if int(os.environ.get("WORLD_SIZE", 1)) > 1 else ""
            for model in loading.patched:
                show(f"{several}{model.status()}")
    if failed:
        raise SystemExit(failed)
    check_use(loading)


def rank() -> int:
    """Number of this process among those that a launcher started together; 0 if it is alone."""
    return int(os.environ.get("RANK", 0))


def check_use(loading: PatchOnLoad) -> None:
    """Make sure that a program was a patched one.

    Raises:
        VlmfixError: It loaded no vision-language model, called none with a picture, or a call was refused.
    """
    if not loading.patched:
        others = "".join(f" It loaded {name}: {why}" for name, why in loading.left_alone.items())
        raise UnsupportedModelError(f"the program loaded no vision-language model, so nothing was patched.{others}")
    refusals = [reason for model in loading.patched for reason in model.refusals]
    if refusals:
        raise VlmfixError(f"{len(refusals)} calls were refused, and their answers are missing: {refusals[0]}")
    states = [model.status() for model in loading.patched]
    # Of several processes those behind the first may have been given nothing to do.
    if rank() == 0 and all(state.prompts == state.prompts_without_image for state in states):
        calls = sum(state.prompts for state in states)
        raise VlmfixError(f"the patched model was never called with a picture ({calls} prompts without one)")


def exit_status(program: Callable[[], Any]) -> Any:
    """Run a program; return what it exits with, ``None`` or 0 for success."""
    try:
        return program()
    except SystemExit as exit_:
        return exit_.code


def program_of(words: Sequence[str]) -> Callable[[], Any]:
    """Return what runs a program, once ``sys.argv`` is set for it as Python does.

    Args:
        words: The program and its arguments.

    Raises:
        DataError: There is no such program.
    """
    first, *arguments = words
    if re.fullmatch(r"python[\d.]*", Path(first).name) and arguments:
        first, *arguments = arguments
    if first == "-m" and arguments:
        module, *arguments = arguments
        sys.argv[:] = [module, *arguments]
        sys.path.insert(0, str(Path.cwd()))
        return lambda: runpy.run_module(module, run_name="__main__", alter_sys=True) and None
    commands = entry_points(group="console_scripts", name=first)
    if commands:
        command = next(iter(commands))
        sys.argv[:] = [shutil.which(first) or first, *arguments]
        return lambda: command.load()()
    script = Path(first)
    if not script.is_file():
        raise DataError(
            f"there is no script and no command of a Python package named {first!r}; expected a script, -m MODULE or "
            "a command behind --"
        )
    sys.argv[:] = [first, *arguments]
    sys.path.insert(0, str(script.resolve().parent))
    return lambda: runpy.run_path(str(script), run_name="__main__") and None
