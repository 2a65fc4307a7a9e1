"""``vlmfix info``: what the plugin sees in a model."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vlmfix.errors import UnsupportedModelError

if TYPE_CHECKING:
    from vlmfix.model.anatomy import Anatomy


_ABOUT = """\
Show what the plugin sees in a model: its layers, its attention, its image tokens. Only the configuration is read.

  vlmfix info llava-hf/llava-1.5-7b-hf             a model of the hub, if it is cached or can be reached
  vlmfix info ./my-finetune                        a folder that save_pretrained wrote
  vlmfix info Qwen/Qwen2.5-VL-7B-Instruct
"""


def add_info(verbs: Any) -> argparse.ArgumentParser:
    """Add the verb to a command line's subparsers; import nothing heavy."""
    parser: argparse.ArgumentParser = verbs.add_parser(
        "info",
        usage="vlmfix info MODEL",
        description=_ABOUT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="MODEL", help="folder or hub id; only its configuration is read")
    return parser


def run(options: argparse.Namespace, *, show: Callable[[str], None]) -> None:
    """Build the model without its weights and show its parts.

    Raises:
        UnsupportedModelError: There is no such model, or the plugin cannot edit it.
    """
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    from vlmfix.model.anatomy import analyse

    try:
        config = AutoConfig.from_pretrained(options.model)
        with torch.device("meta"):  # the structure without the weights
            model = AutoModelForImageTextToText.from_config(config)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UnsupportedModelError(f"no vision-language model in {options.model!r}: {reason}") from error
    show(f"{type(model).__name__} (model_type {config.model_type})\n{anatomy_text(analyse(model))}")


def anatomy_text(anatomy: Anatomy) -> str:
    """Return the parts of a model that methods act in, in indented lines."""
    heads = getattr(anatomy.text_config, "num_attention_heads", "?")
    key_heads = getattr(anatomy.text_config, "num_key_value_heads", None) or heads
    first = anatomy.sites[0]
    lines = [
        f"text layers: {anatomy.num_layers}, hidden size {anatomy.hidden_size}, {heads} heads, {key_heads} key heads",
        f"text attention modules: {len(anatomy.sites)} x {type(first.module).__name__}, {first.name} ...",
    ]
    layers = sorted({site.layer_idx for site in anatomy.sites})
    if len(layers) < anatomy.num_layers:
        lines.append(f"layers with softmax attention: {', '.join(map(str, layers))}")
    lines.append(f"image token ids: {', '.join(map(str, anatomy.image_token_ids))}")
    return "\n".join(f"  {line}" for line in lines)
