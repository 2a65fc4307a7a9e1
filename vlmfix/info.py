"""``vlmfix info``: what the plugin sees in a model, and which methods it takes."""

from __future__ import annotations

import argparse
import textwrap
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vlmfix.errors import MethodError, UnsupportedModelError

if TYPE_CHECKING:
    from torch import nn

    from vlmfix.methods.base import Method
    from vlmfix.model.anatomy import Anatomy

COLUMNS = f"  {'method':<17} {'taken':<10} what it adds: forwards, and rows of attention or of blocks that it computes"

HOW_ROUGH = """\
Memory and time are computed from the configuration and are lower bounds: activations, the image's encoder and the start
of every kernel come on top; of small models they are the larger part. What stands beside a method is the work it adds,
not a measurement. vlmfix eval measures seconds."""

_ABOUT = """\
Show what the plugin sees in a model, what each method costs there, and which are refused and why. Only the
configuration is read.

  vlmfix info llava-hf/llava-1.5-7b-hf             a model of the hub, if it is cached or can be reached
  vlmfix info ./my-finetune                        a folder that save_pretrained wrote
  vlmfix info tiny                                 an embedded model: tiny, smol or smol-seed1
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
    parser.add_argument(
        "model", metavar="MODEL", help="folder, hub id or embedded model; only its configuration is read"
    )
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
    about = [f"{type(model).__name__} (model_type {config.model_type})", anatomy_text(anatomy), memory_text(anatomy)]
    show("\n".join([*about, time_text(anatomy), "", COLUMNS, methods_text(anatomy), "", HOW_ROUGH]))


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
    text = f"  memory: {_bytes(_parameters(anatomy.model) * size)} of weights at {8 * size} bits"
    heads = getattr(config, "num_key_value_heads", None) or getattr(config, "num_attention_heads", None)
    width = getattr(config, "head_dim", None) or anatomy.hidden_size // config.num_attention_heads if heads else None
    if isinstance(heads, int) and isinstance(width, int):
        layers = len({site.layer_idx for site in anatomy.sites})
        text += f"; at most {_bytes(2 * layers * heads * width * size)} of keys and values per token"
    return text


BANDWIDTH = 2e12
"""Bytes per second that a large GPU reads from its memory, for an example."""


def time_text(anatomy: Anatomy) -> str:
    """Return what a token costs the stock model at most, in one indented line.

    Prompts are bound by arithmetic, new tokens of few samples by reading the weights of the decoder's layers and
    of its head. Where experts are chosen per token, fewer are read.
    """
    size = (getattr(anatomy.text_config, "dtype", None) or anatomy.model.dtype).itemsize
    head = anatomy.language_model.get_output_embeddings()
    layers = sum(map(_parameters, anatomy.decoder_layers))
    read = (layers + (0 if head is None else _parameters(head))) * size
    prompt = "" if anatomy.encoder is not None else f"; a token of the prompt takes {2 * layers / 1e9:.2g} GFLOP"
    milliseconds = f"{1e3 * read / BANDWIDTH:.2g} ms at {BANDWIDTH / 1e12:.0f} TB/s"
    return f"  time: a new token reads at most {_bytes(read)} of them ({milliseconds}){prompt}"


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _bytes(count: float) -> str:
    """Return a size as people read it: ``14.1 GB``, ``3.1 kB``."""
    unit, name = next((each for each in ((1e9, "GB"), (1e6, "MB")) if count >= each[0]), (1e3, "kB"))
    return f"{count / unit:.3g} {name}"


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
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            with patched(anatomy.model, method):
                patch = find_patch(anatomy.model)
                assert patch is not None
                return "yes", "; ".join([cost(patch.methods[0]), *(str(each.message) for each in told)])
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
    from vlmfix.decoding.edited import AgainstEdit
    from vlmfix.decoding.opera import OPERA

    if method.is_identity and method.name == "none":
        return "nothing"
    if isinstance(method, OPERA):
        return f"{method.num_beams} beams with a cache each, which look ahead; one prompt at a time"
    if method.rewrites_answers:
        return "a short question for each object that an answer names, behind one reading of the image"
    parts = []
    if isinstance(method, AgainstEdit):
        parts.append("a second branch: the prompt once more, a cache of its own, and a second forward each step")
    elif isinstance(method, DecodingMethod):
        branch = "a second branch: another prompt, a cache of its own, and twice the rows each step"
        parts.append(branch if method.uses_branch else "no forward of its own")
    if method.needs_text_only_heads:
        parts.append("a pass over the text without the image, per prompt")
    if method.vision_layers:
        parts.append("the attention of the vision tower")
    elif method.reads_prompt:
        parts.append("another reading of the prompt first")
    if method.reads_mlp_input:
        parts.append(f"the head {len(method.layers or ()) + 1} times per forward")
    elif method.early_layers:
        parts.append(f"the head {len(method.early_layers) + 1} times per new token")
    if method.edits_scores or method.edits_weights or method.edits_blocks:
        rows = {"all": "all rows", "text": "the rows behind the image", "last": "the last row"}.get(method.prompt_rows)
        each = [f"{rows} of the prompt"] if rows else []
        parts.append(" and ".join([*each, "each new token's row"] if method.edits_decode else each))
    elif method.opens_mask:
        parts.append("the image's rows of the prompt a second time")
    return "; ".join(parts) or "a factor on head outputs"
