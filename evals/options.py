"""The options of the verbs that let a model answer; each option is one field, with its flag and its help text.

- :class:`Options`: model, prompt and machine (``inspect`` extends it);
- :class:`DataOptions`: also images that are chosen by seed (``calibrate`` extends it);
- :class:`BenchmarkOptions`: also benchmarks (``tune`` extends it);
- :class:`EvalOptions`: the options of ``vlmfix eval``; they describe every run of a benchmark.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from vlmfix.errors import VlmfixError

from .flags import ASKING, IMAGES, MACHINE, MODEL, OUTPUT, SCORING, check_options, option, typed_values

DEFAULT_BENCHMARKS = ("chair", "pope")


TESTBED_SPLITS = ("heldout", "heldout2", "calibration")


_PROMPT_FLAGS = {"chair": "--prompt", "pope": "--pope-prompt"}
"""Benchmarks whose prompts have flags of their own, which other verbs have too."""

Made = TypeVar("Made", bound="Options")


@dataclass(frozen=True, kw_only=True)
class Options:
    """What every verb that loads a model is told; None means that the verb chooses.

    Attributes:
        command: The words behind ``vlmfix`` that were typed, to be repeated in messages and reports.
    """

    model: str | None = option(
        "model folder, hub id, smol or smol-seed1 (default: tiny, the embedded testbed)",
        group=MODEL,
        metavar="PATH_OR_ID",
    )
    yes: bool = option(
        "download what the model needs without a question (also VLMFIX_YES=1)", group=MODEL, default=False
    )
    settings: tuple[str, ...] = option(
        "method parameter: alpha=1.3, or vhr.alpha=1.3 for one method of several",
        group=MODEL,
        name="--set",
        default=(),
        metavar="KEY=VALUE",
    )
    prompt: str | None = option(
        "what captions are asked for with (default: Please describe this image in detail.)",
        group=ASKING,
        metavar="TEXT",
    )
    chat_template: bool = option("wrap prompts in the processor's chat template", group=ASKING, default=True)
    max_new_tokens: int | None = option(
        "longest caption, in tokens (default: 128 testbed, 160 smol, else 512)",
        group=ASKING,
        metavar="N",
        at_least=1,
    )
    dtype: str | None = option(
        "type of the weights (default: the checkpoint's; on a CPU float32, or bfloat16 where it computes in that)",
        group=MACHINE,
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    device: str | None = option(
        "cpu, cuda, cuda:1, or auto to spread over several (default: cuda if there is one, else cpu)",
        group=MACHINE,
        metavar="DEVICE",
    )
    attn_implementation: str | None = option(
        "attention of transformers, such as sdpa or eager", group=MACHINE, metavar="NAME"
    )
    command: tuple[str, ...] = field(default=("eval",), compare=False)

    def __post_init__(self) -> None:
        """Check the options one by one (:func:`~vlmfix.evals.flags.check_options`); the default model has a name."""
        if self.model == "tiny":
            object.__setattr__(self, "model", None)
        check_options(self)

    @classmethod
    def from_arguments(cls: type[Made], arguments: argparse.Namespace) -> Made:
        """Return the options that were typed; the others keep their defaults."""
        command: dict[str, Any] = {"command": tuple(arguments.command)} if "command" in vars(arguments) else {}
        return cls(**typed_values(cls, arguments), **command)

    def as_eval(self, **changes: Any) -> EvalOptions:
        """Return the options of an evaluation that shares this verb's, with ``changes`` made."""
        shared = {each.name for each in fields(EvalOptions)} & {each.name for each in fields(self)}
        return EvalOptions(**{**{name: getattr(self, name) for name in shared}, **changes})

    @property
    def command_line(self) -> str:
        """The command that repeats this run."""
        return shlex.join(["vlmfix", *(word for word in self.command if word != "--rescore")])

    @property
    def resume_line(self) -> str:
        """The command that goes on with this run: ``--no-resume`` would throw its answers away."""
        return shlex.join(["vlmfix", *(word for word in self.command if word != "--no-resume")])


@dataclass(frozen=True, kw_only=True)
class DataOptions(Options):
    """The options of a verb that asks about images chosen by seed."""

    data: Path | None = option("COCO folder (default: the testbed's scenes)", group=IMAGES, metavar="DIR")
    ids: Path | None = option("image ids to use: one per line, or a JSON list", group=IMAGES, metavar="FILE")
    limit: int | None = option("number of images, drawn by seed", group=IMAGES, metavar="N", at_least=1)
    seed: int = option("choice of images and questions", group=IMAGES, default=0, metavar="N")
    pope_prompt: str | None = option(
        "POPE prompt with {question} (default: asks for a single word or phrase)",
        group=ASKING,
        metavar="TEXT",
    )
    batch_size: int | str | None = option(
        "samples per batch (default: 64 testbed, 32 smol, else 8)", group=MACHINE, metavar="N", at_least=1
    )

    def __post_init__(self) -> None:
        """Refuse a prompt that asks nothing."""
        super().__post_init__()
        if self.pope_prompt is not None and "{question}" not in self.pope_prompt:
            raise VlmfixError(f"--pope-prompt needs the placeholder {{question}}, got {self.pope_prompt!r}")


@dataclass(frozen=True, kw_only=True)
class BenchmarkOptions(DataOptions):
    """The options of a verb that runs benchmarks, and goes on with what an interrupted run left."""

    benchmarks: tuple[str, ...] = option(
        "benchmarks to ask", group=IMAGES, name="--benchmark", default=DEFAULT_BENCHMARKS, metavar="NAME"
    )
    pope_questions: tuple[Path, ...] = option(
        "official POPE files (default: built by the published rule)", group=IMAGES, default=(), metavar="FILE"
    )
    chair_mode: str = option(
        "word normalisation of CHAIR", group=SCORING, default="original", choices=("original", "nltk")
    )
    pope_max_new_tokens: int | None = option(
        "longest yes/no answer, in tokens (default: 16)", group=ASKING, metavar="N", at_least=1
    )
    batch_size: int | str | None = option(
        "samples per batch; auto: as many as the free memory takes (default: 64 testbed, 32 smol, else 8)",
        group=MACHINE,
        metavar="N",
        at_least=1,
        word="auto",
    )
    resume: bool = option("keep the answers that an interrupted run left in the folder", group=OUTPUT, default=True)


@dataclass(frozen=True, kw_only=True)
class EvalOptions(BenchmarkOptions):
    """The options of ``vlmfix eval``.

    From Python ``judge`` may be a function from a prompt to a judgement; ``judge_name`` then names it.
    """

    methods: tuple[str, ...] = option(
        "methods, recipe files, or all: every method that the model takes without calibration (default: vhr var)",
        group=MODEL,
        name="--method",
        default=(),
        metavar="NAME",
    )
    controls: bool = option(
        "add the early-stop, yes-bias and self-verification controls, and VHR's head controls",
        group=SCORING,
        default=True,
    )
    self_verification: bool = option(
        "ask the unpatched model for every object that its captions name, for the self-verification control",
        group=SCORING,
        default=True,
    )
    split: str = option(
        "scenes of the testbed; strengths were chosen on calibration",
        group=IMAGES,
        default="heldout",
        choices=TESTBED_SPLITS,
    )
    benchmark_data: tuple[str, ...] = option(
        "a file of questions (custom), the folder of the images that --pope-questions name (pope), the benchmark's own "
        "folder (others), or datasets:PATH_OR_ID[#SPLIT] for the datasets library",
        group=IMAGES,
        default=(),
        metavar="NAME=PATH",
    )
    benchmark_prompts: tuple[str, ...] = option(
        "prompt of another benchmark's questions, with {question}",
        group=ASKING,
        name="--benchmark-prompt",
        default=(),
        metavar="NAME=TEXT",
    )
    judge: str | Callable[[str], str] | None = option(
        "rates MMHal-Bench: reads a prompt, writes a judgement with 'Rating: N' (default: not scored)",
        group=SCORING,
        metavar="COMMAND",
    )
    judge_name: str | None = option(
        "name of the judge in the report (default: the command)", group=SCORING, metavar="NAME"
    )
    thinking: str = option(
        "what is done with thinking (<think>...</think>) before an answer",
        group=SCORING,
        default="strip",
        choices=("strip", "keep"),
    )
    spacy: str | None = option(
        "word similarity of AMBER, officially en_core_web_lg (default: exact words)", group=SCORING, metavar="MODEL"
    )
    reuse_images: bool = option(
        "encode an image once for its questions and for all methods; the answers are the same",
        group=MACHINE,
        default=True,
    )
    share_prefixes: bool = option(
        "read what the questions about an image share once, under every method that leaves it alone; the answers are "
        "the same up to rounding, which is checked",
        group=MACHINE,
        default=True,
    )
    out: Path | None = option("run folder (default: runs/MODEL-SETTINGS)", group=OUTPUT, metavar="DIR")
    verbose: bool = option(
        "print every table of the report, not the headline figures alone", group=OUTPUT, default=False
    )
    rescore: bool = option(
        "score the answers in the folder again and generate none, also those of another version of vlmfix",
        group=OUTPUT,
        default=False,
    )

    def __post_init__(self) -> None:
        """Refuse combinations that no run can have."""
        super().__post_init__()
        if not self.benchmarks:
            raise VlmfixError("--benchmark needs the name of a benchmark")
        for name, text in self.prompt_of.items():
            if name in _PROMPT_FLAGS:
                raise VlmfixError(f"--benchmark-prompt {name}=...: type {_PROMPT_FLAGS[name]} TEXT for that")
            if name not in self.benchmarks:
                raise VlmfixError(f"--benchmark-prompt names {name}, which is not asked; add it to --benchmark")
            if "{question}" not in text:
                raise VlmfixError(f"--benchmark-prompt {name} needs the placeholder {{question}} in its text")
        if self.judge is not None and "mmhal" not in self.benchmarks:
            raise VlmfixError("--judge is for mmhal; add it to --benchmark, or leave the judge out")
        if callable(self.judge) and self.judge_name is None:
            raise VlmfixError("give judge_name=... with a judge: the figures depend on who judges")

    @property
    def data_of(self) -> dict[str, str]:
        """Benchmark to where its data are."""
        return _assigned("--benchmark-data", self.benchmark_data)

    @property
    def prompt_of(self) -> dict[str, str]:
        """Benchmark to its prompt."""
        return _assigned("--benchmark-prompt", self.benchmark_prompts)


def _assigned(option: str, given: Sequence[str]) -> dict[str, str]:
    """Return what ``NAME=VALUE`` words assign, by name.

    Args:
        option: The option they were given to, for the message.
        given: The words.

    Raises:
        VlmfixError: A word has another form, or a name occurs twice.
    """
    found: dict[str, str] = {}
    for word in given:
        name, equals, value = word.partition("=")
        if not equals or not value or not name:
            raise VlmfixError(f"{option} expects NAME=VALUE, got {word!r}")
        if name in found:
            raise VlmfixError(f"{option} names {name} twice")
        found[name] = value
    return found
