"""The tasks of the benchmarks that bring their own questions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from . import amber, custom, hallusionbench, mme, mmhal
from .base import Task

if TYPE_CHECKING:
    from ..config import EvalOptions

#: Descriptions of AMBER: as captions, but for the testbed, whose captions have about 40 tokens.
DESCRIPTION_NEW_TOKENS = 512
TESTBED_NEW_TOKENS = 128


def make_own(name: str, options: EvalOptions) -> Task:
    """Read a benchmark's questions and choose images.

    Args:
        name: One of ``config.OWN_BENCHMARKS``.
        options: Of the run; ``--max-new-tokens`` limits open answers, ``--pope-max-new-tokens`` yes/no answers.

    Raises:
        DataError: A file is missing or broken; the message names it.
    """
    return _MAKERS[name](options.data_of[name], options.prompt_of.get(name), options)


def _short(options: EvalOptions, default: int) -> int:
    return options.pope_max_new_tokens or min(options.max_new_tokens or default, default)


def _amber(where: str, prompt: str | None, options: EvalOptions) -> Task:
    long = options.max_new_tokens or (TESTBED_NEW_TOKENS if options.model is None else DESCRIPTION_NEW_TOKENS)
    return amber.AmberTask.make(
        where,
        limit=options.limit,
        seed=options.seed,
        prompt=prompt,
        max_new_tokens=(long, _short(options, amber.NEW_TOKENS)),
        spacy=options.spacy,
    )


def _mme(where: str, prompt: str | None, options: EvalOptions) -> Task:
    return mme.MmeTask.make(
        where,
        limit=options.limit,
        seed=options.seed,
        prompt=prompt,
        max_new_tokens=_short(options, mme.NEW_TOKENS),
    )


def _hallusionbench(where: str, prompt: str | None, options: EvalOptions) -> Task:
    return hallusionbench.HallusionTask.make(
        where,
        limit=options.limit,
        seed=options.seed,
        prompt=prompt,
        max_new_tokens=options.max_new_tokens or hallusionbench.NEW_TOKENS,
    )


def _mmhal(where: str, prompt: str | None, options: EvalOptions) -> Task:
    judge = None
    if isinstance(options.judge, str):
        judge = mmhal.Judge.of_command(options.judge, options.judge_name)
    elif options.judge is not None:
        judge = mmhal.Judge(str(options.judge_name), options.judge)
    return mmhal.MmhalTask.make(
        where,
        limit=options.limit,
        seed=options.seed,
        prompt=prompt,
        max_new_tokens=options.max_new_tokens or mmhal.NEW_TOKENS,
        judge=judge,
    )


def _custom(where: str, prompt: str | None, options: EvalOptions) -> Task:
    return custom.CustomTask.make(
        where,
        limit=options.limit,
        seed=options.seed,
        prompt=prompt,
        max_new_tokens=options.max_new_tokens or custom.NEW_TOKENS,
    )


_MAKERS: Mapping[str, Callable[[str, str | None, EvalOptions], Task]] = {
    "amber": _amber,
    "mme": _mme,
    "hallusionbench": _hallusionbench,
    "mmhal": _mmhal,
    "custom": _custom,
}
