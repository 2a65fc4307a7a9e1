"""The options of an evaluation run, checked."""

from __future__ import annotations

import argparse
import shlex
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from vlmfix.errors import VlmfixError

from .data.source import parse_assignments

#: Those whose questions are made from COCO annotations (or the testbed's), and those that bring their own.
COCO_BENCHMARKS = ("chair", "pope", "sycophancy")


OWN_BENCHMARKS = ("amber", "mme", "hallusionbench", "mmhal", "custom")


BENCHMARKS = (*COCO_BENCHMARKS, *OWN_BENCHMARKS)


DEFAULT_BENCHMARKS = ("chair", "pope")


POPE_SPLITS = ("random", "popular", "adversarial")


CHAIR_PROMPT = "Please describe this image in detail."


POPE_PROMPT = "{question}\nAnswer the question using a single word or phrase."


@dataclass(frozen=True)
class EvalOptions:
    """The options of ``vlmfix eval``, as typed; None means that the run chooses (see ``vlmfix eval --help``).

    From Python ``judge`` may be a function from a prompt to a judgement; ``judge_name`` then names it.
    """

    model: str | None = None
    methods: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()
    benchmarks: tuple[str, ...] = DEFAULT_BENCHMARKS
    benchmark_data: tuple[str, ...] = ()
    benchmark_prompts: tuple[str, ...] = ()
    data: Path | None = None
    split: str = "heldout"
    ids: Path | None = None
    limit: int | None = None
    batch_size: int | None = None
    dtype: str | None = None
    device: str | None = None
    attn_implementation: str | None = None
    max_new_tokens: int | None = None
    pope_max_new_tokens: int | None = None
    seed: int = 0
    out: Path | None = None
    resume: bool = True
    rescore: bool = False
    prompt: str | None = None
    pope_prompt: str | None = None
    chat_template: bool = True
    pope_questions: tuple[Path, ...] = ()
    chair_mode: str = "original"
    controls: bool = True
    judge: str | Callable[[str], str] | None = None
    judge_name: str | None = None
    spacy: str | None = None
    reuse_images: bool = True
    verb: str = field(default="eval", compare=False)
    command: tuple[str, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        """Refuse values that no run can have."""
        for name in ("limit", "batch_size", "max_new_tokens", "pope_max_new_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise VlmfixError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
        unknown = [name for name in self.benchmarks if name not in BENCHMARKS]
        if unknown or not self.benchmarks:
            raise VlmfixError(f"unknown --benchmark {unknown}; choose from {', '.join(BENCHMARKS)}")
        for name in self.benchmarks:
            if name in OWN_BENCHMARKS and name not in self.data_of:
                raise VlmfixError(f"--benchmark {name} needs its data; type --benchmark-data {name}=PATH")
        used = {*self.benchmarks, *(["pope"] if "sycophancy" in self.benchmarks else [])}
        for option, named in (("data", self.data_of), ("prompt", self.prompt_of)):
            idle = [name for name in named if name not in used]
            if idle:
                raise VlmfixError(f"--benchmark-{option} names {idle[0]}, which is not asked; add it to --benchmark")
        if self.judge is not None and "mmhal" not in self.benchmarks:
            raise VlmfixError("--judge is for mmhal; add it to --benchmark, or leave the judge out")
        lacking = [name for name, text in self.prompt_of.items() if "{question}" not in text]
        if lacking:
            raise VlmfixError(f"--benchmark-prompt {lacking[0]} needs the placeholder {{question}} in its text")
        if callable(self.judge) and self.judge_name is None:
            raise VlmfixError("give judge_name=... with a judge: the figures depend on who judges")
        if self.pope_prompt is not None and "{question}" not in self.pope_prompt:
            raise VlmfixError(f"--pope-prompt needs the placeholder {{question}}, got {self.pope_prompt!r}")

    @property
    def data_of(self) -> dict[str, str]:
        """Benchmark to where its data are."""
        return parse_assignments("--benchmark-data", self.benchmark_data, ("pope", *OWN_BENCHMARKS))

    @property
    def prompt_of(self) -> dict[str, str]:
        """Benchmark to its prompt."""
        known = (*OWN_BENCHMARKS, "sycophancy")
        return parse_assignments("--benchmark-prompt", self.benchmark_prompts, known)

    @property
    def command_line(self) -> str:
        """The command that repeats this run."""
        return shlex.join(["vlmfix", self.verb, *(word for word in self.command if word != "--rescore")])

    @property
    def resume_line(self) -> str:
        """The command that goes on with this run: ``--no-resume`` would throw its answers away."""
        return shlex.join(["vlmfix", self.verb, *(word for word in self.command if word != "--no-resume")])


def eval_options(typed: Namespace) -> EvalOptions:
    """The options of a verb that has some of those of ``vlmfix eval``, under the same names."""
    names = {field.name for field in fields(EvalOptions)} & set(vars(typed))
    values: dict[str, Any] = {name: getattr(typed, name) for name in names}
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    if "benchmark" in vars(typed):
        values["benchmarks"] = tuple(dict.fromkeys(typed.benchmark))
    return EvalOptions(**values)


def add_model(group: Any) -> None:
    """Add ``--model``."""
    group.add_argument("--model", metavar="PATH_OR_ID", help="model folder or hub id (default: the embedded testbed)")


def add_images(parser: argparse.ArgumentParser, *, data: str, limit: str) -> Any:
    """Add the options that choose images, and return their group; the texts explain ``--data`` and ``--limit``."""
    group = parser.add_argument_group("data")
    group.add_argument("--data", type=Path, metavar="DIR", help=data)
    group.add_argument("--ids", type=Path, metavar="FILE", help="image ids to use: one per line, or a JSON list")
    group.add_argument("--limit", type=int, metavar="N", help=limit)
    group.add_argument("--seed", type=int, default=0, help="choice of images and questions (default: 0)")
    return group


def add_data(parser: argparse.ArgumentParser, *, limit: str) -> Any:
    """Add the options that choose images and questions of an evaluation; ``limit`` explains ``--limit``."""
    data = add_images(parser, data="COCO folder (default: the testbed's scenes)", limit=limit)
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


def add_captioning(parser: argparse.ArgumentParser, *, max_new_tokens: str) -> Any:
    """Add the options on prompts and captions, and return their group; the text explains ``--max-new-tokens``."""
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
    asking.add_argument("--max-new-tokens", type=int, metavar="N", help=max_new_tokens)
    return asking


def add_prompts(parser: argparse.ArgumentParser) -> Any:
    """Add the options on prompts and decoding of an evaluation, and return their group."""
    asking = add_captioning(
        parser,
        max_new_tokens="limit of captions (default: 128 testbed, else 512) and open answers (256 mmhal, else 64)",
    )
    asking.add_argument("--pope-max-new-tokens", type=int, metavar="N", help="limit of yes/no answers (default: 16)")
    return asking


def add_machine(
    parser: argparse.ArgumentParser, *, batch_size: str | None = "samples per batch (default: 64 testbed, else 8)"
) -> Any:
    """Add the options on device and batch, and return their group; ``batch_size=None`` leaves ``--batch-size`` out."""
    machine = parser.add_argument_group("machine")
    if batch_size is not None:
        machine.add_argument("--batch-size", type=int, metavar="N", help=batch_size)
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
