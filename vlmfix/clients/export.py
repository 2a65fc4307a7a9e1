"""``vlmfix export``: fold factors of heads that no prompt changes into a checkpoint, for engines of others."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmfix.clients.options import methods_of, verb_with_method
from vlmfix.errors import MethodError, UnsupportedFeatureError, UnsupportedModelError

if TYPE_CHECKING:
    import torch

    from vlmfix.engine.plan import PatchedSite
    from vlmfix.methods.base import Method
    from vlmfix.patching import MethodSpec


EXPORT_FILE = "vlmfix_export.json"
"""The file of an exported checkpoint that says what was folded into it."""


_ABOUT = """\
Write a checkpoint that answers like the patched model, for engines that take no plugin (vLLM, SGLang, llama.cpp).

  vlmfix export vhr --set select=all alpha=1.5 --model MODEL --out FOLDER
  vlmfix export allpath.json --model MODEL --out FOLDER      a recipe of vlmfix calibrate
  vlmfix export adhh --set mode=always --model llava-hf/llava-1.5-7b-hf --out FOLDER

Factors of head outputs that no prompt changes are columns of the output projection. What depends on the prompt, or acts
elsewhere, is refused. Prompts without an image are scaled too, which a patch leaves alone.
"""


def add_export(verbs: Any) -> argparse.ArgumentParser:
    """Add the verb to a command line's subparsers; import nothing heavy."""
    parser = verb_with_method(verbs, "export", "--model MODEL --out FOLDER", _ABOUT)
    parser.add_argument("--model", required=True, metavar="MODEL", help="folder or hub id of the stock model")
    parser.add_argument("--out", required=True, type=Path, metavar="FOLDER", help="where the new checkpoint goes")
    return parser


def run(options: argparse.Namespace, *, show: Callable[[str], None]) -> None:
    """Load a model, and write it with the factors folded in, and its processor.

    Raises:
        VlmfixError: See :func:`export`; or there is no such model, or it would be overwritten.
    """
    if Path(options.model).is_dir() and options.out.is_dir() and options.out.samefile(options.model):
        raise UnsupportedModelError(
            f"--out {options.out} is the folder of the model, whose weights would be lost. Name another one."
        )
    methods = methods_of(options)
    from transformers import AutoModelForImageTextToText, AutoProcessor

    try:
        model = AutoModelForImageTextToText.from_pretrained(options.model, dtype="auto")
        processor = AutoProcessor.from_pretrained(options.model)
    except (OSError, ValueError) as error:
        raise UnsupportedModelError(f"no vision-language model in {options.model!r}: {error}") from error
    folded = export(model, options.out, None if methods is None else list(methods))
    processor.save_pretrained(options.out)
    show(f"{options.out}: {type(model).__name__} with {folded} factors of heads folded into its output projections")


def export(model: Any, folder: str | Path, method: MethodSpec | None = None, **parameters: Any) -> int:
    """Write a checkpoint with a method's factors of heads folded into the output projections.

    The checkpoint's logits are those of the patched model, up to the rounding of its weights, for prompts with an
    image. Prompts without one are scaled too. The model itself stays as it is.

    Args:
        model: A Hugging Face vision-language model, patched or not.
        folder: Where the checkpoint goes, as by ``save_pretrained``.
        method: As for ``patch``.
        **parameters: Parameters of a single method given by name.

    Returns:
        How many (layer, head) pairs have another factor than 1.

    Raises:
        MethodError: As by ``patch``; or the method's edits depend on the prompt, or are no factors of heads.
        UnsupportedFeatureError: The weights are quantised, adapted or offloaded.
    """
    import vlmfix
    from vlmfix.engine.plan import make_sites
    from vlmfix.model.anatomy import analyse
    from vlmfix.recipes import check_placement, resolve_methods

    anatomy = analyse(model)
    methods = resolve_methods(method, parameters, anatomy)
    for each in methods:
        check_placement(each, anatomy)
    bound = [each.bind(anatomy) for each in methods]
    factors = {number: _fixed_factors(each, anatomy.num_heads) for number, each in enumerate(bound)}
    weights: dict[str, torch.Tensor] = {}
    folded = 0
    for site in make_sites(anatomy, bound):
        scale = [1.0] * anatomy.num_heads
        for number, _ in site.heads:
            scale = [factors[number].get((site.layer_idx, head), 1.0) * known for head, known in enumerate(scale)]
        if any(factor != 1 for factor in scale):
            folded += sum(factor != 1 for factor in scale)
            name, projection = _output_projection(site)
            weights[name] = _scaled_columns(projection, scale)
    if not weights:
        raise MethodError("All factors are 1: the checkpoint would be the stock model's. Choose other parameters.")
    anatomy.model.save_pretrained(folder, state_dict={**anatomy.model.state_dict(), **weights})
    about = {"vlmfix": vlmfix.__version__, "methods": [each.to_dict() for each in bound], "factors": folded}
    (Path(folder) / EXPORT_FILE).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    return folded


def _fixed_factors(method: Method, num_heads: int) -> dict[tuple[int, int], float]:
    """Return the factors of a bound method by (layer, head).

    Raises:
        MethodError: It has none that hold for every prompt; the message says why.
    """
    found = method.fixed_factors(num_heads)
    if found is None:
        if method.rewrites_answers:
            reason = "it edits answers that are finished"
        elif method.replaces_logits or method.rewrites_logits:
            reason = "it decides on the next token, behind the layers"
        elif method.edits_heads and not method.edits_weights:
            reason = "it chooses heads anew for every prompt"
        elif method.edits_blocks:
            reason = "it adds to the residual stream, by what is in the prompt"
        else:
            reason = "it edits the attention of each prompt, which no weight holds"
        raise MethodError(
            f"{method.name} cannot be folded into weights: {reason}. Factors of heads that no prompt changes can: vhr "
            "with select='all', allpath, adhh with mode='always'."
        )
    return found


def _output_projection(site: PatchedSite) -> tuple[str, Any]:
    """Return the name of the weight behind an attention module's head outputs, and its module.

    Raises:
        UnsupportedFeatureError: It is no plain matrix.
    """
    from torch import nn

    from vlmfix.model.anatomy import OUTPUT_PROJECTIONS

    name = next(name for name in OUTPUT_PROJECTIONS if isinstance(getattr(site.module, name, None), nn.Module))
    projection = getattr(site.module, name)
    if type(projection) is not nn.Linear or not projection.weight.is_floating_point() or projection.weight.is_meta:
        raise UnsupportedFeatureError(
            f"{site.name}.{name} is no plain matrix of this model ({type(projection).__name__}): quantised weights, "
            "adapters and offloaded weights cannot take a factor. Load the model in its own precision, on one device, "
            "and merge adapters first (model.merge_and_unload())."
        )
    return f"{site.name}.{name}.weight", projection


def _scaled_columns(projection: Any, scale: list[float]) -> torch.Tensor:
    """Return a weight ``[hidden, heads * head_dim]`` with the columns of each head multiplied by its factor."""
    weight: torch.Tensor = projection.weight.detach()
    by_head = weight.float().view(len(weight), len(scale), -1)
    scaled: torch.Tensor = by_head * by_head.new_tensor(scale)[:, None]
    return scaled.flatten(1).to(weight.dtype)
