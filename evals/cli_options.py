"""Options that several verbs have, typed once. Nothing heavy is imported."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


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
