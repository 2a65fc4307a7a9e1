"""``vlmfix info``: what the plugin sees in a model, and which methods it takes."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vlmfix.errors import MethodError, UnsupportedModelError

if TYPE_CHECKING:
    from vlmfix.methods.base import Method
    from vlmfix.model.anatomy import Anatomy

_ABOUT = """\
Show what the plugin sees in a model, what each method costs there, and which are refused and why. Only the
configuration is read.

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
    anatomy = analyse(model)
    show(f"{type(model).__name__} (model_type {config.model_type})\n{anatomy_text(anatomy)}\n{memory_text(anatomy)}\n")
    show(methods_text(anatomy))


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


def memory_text(anatomy: Anatomy) -> str:
    """Return what a model's weights and its cache take, in one indented line."""
    config = anatomy.text_config
    size = (getattr(config, "dtype", None) or anatomy.model.dtype).itemsize
    weights = sum(parameter.numel() for parameter in anatomy.model.parameters()) * size
    text = f"  memory: {weights / 1e9:.3g} GB of weights at {8 * size} bits"
    heads = getattr(config, "num_key_value_heads", None) or getattr(config, "num_attention_heads", None)
    width = getattr(config, "head_dim", None) or anatomy.hidden_size // config.num_attention_heads if heads else None
    if isinstance(heads, int) and isinstance(width, int):
        layers = len({site.layer_idx for site in anatomy.sites})
        text += f"; at most {2 * layers * heads * width * size / 1e3:.0f} kB of keys and values per token"
    return text


def methods_text(anatomy: Anatomy) -> str:
    """Return a line per method: taken, with what it costs; to be calibrated first; or refused, with the reason."""
    from vlmfix.methods.registry import list_methods

    lines = []
    for name in list_methods():
        word, text = verdict(name, anatomy)
        first, *others = textwrap.wrap(text, 90) or [""]
        lines.append(f"  {name:<17} {word:<10} {first}".rstrip())
        lines += [f"  {'':<28} {line}" for line in others]
    return "\n".join(lines)


def verdict(name: str, anatomy: Anatomy) -> tuple[str, str]:
    """Try a method with its default parameters on a model without weights.

    Returns:
        ``"yes"`` and what it costs, ``"not as is"`` (parameters are missing) or ``"no"`` with the reason.
    """
    from vlmfix.patching import find_patch, patched
    from vlmfix.recipes import check_placement, resolve_methods

    try:
        (method,) = resolve_methods(name, {}, anatomy)
    except MethodError as error:
        return "not as is", str(error)
    try:
        check_placement(method, anatomy)
    except MethodError as error:
        return "no", str(error)
    try:
        with patched(anatomy.model, method):
            patch = find_patch(anatomy.model)
            assert patch is not None
            return "yes", cost(patch.methods[0])
    except UnsupportedModelError as error:
        return "no", str(error)
    except MethodError as error:
        return "not as is", str(error)
    except RuntimeError:  # what reads weights finds none here, and says so in many ways
        if anatomy.model.device.type != "meta":
            raise
        return "yes", f"{cost(method)}; looks at the weights when patching"


def cost(method: Method) -> str:
    """Return what a method costs beside the stock model, by what it declares."""
    from vlmfix.decoding.base import DecodingMethod

    if method.is_identity and method.name == "none":
        return "nothing"
    if method.searches:
        return "several beams, one prompt at a time"
    if method.rewrites_answers:
        return "a short question for each object that an answer names, behind one reading of the image"
    parts = []
    if isinstance(method, DecodingMethod):
        parts.append(
            "a second branch: another prompt, and twice the rows each step" if method.uses_branch else "no forward"
        )
    if method.needs_text_only_heads:
        parts.append("a pass over the text without the image, per prompt")
    if method.reads_prompt:
        parts.append("a look at the prompt first")
    if method.edits_scores or method.edits_weights or method.edits_blocks:
        rows = {"all": "all rows", "text": "the rows behind the image", "last": "the last row"}.get(method.prompt_rows)
        each = [f"{rows} of the prompt"] if rows else []
        parts.append(" and ".join([*each, "each new token's row"] if method.edits_decode else each))
    elif method.opens_mask:
        parts.append("the image's rows of the prompt a second time")
    return "; ".join(parts) or "a factor on head outputs"
