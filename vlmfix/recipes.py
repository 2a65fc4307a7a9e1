"""Methods as data: names, dictionaries, JSON files, and the default recipe of a model family."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vlmfix.errors import DataError, MethodError
from vlmfix.files import read_json
from vlmfix.methods.base import Method
from vlmfix.methods.measured import Calibration
from vlmfix.methods.registry import make_method, method_from_dict, recipe_entry
from vlmfix.model.anatomy import Anatomy, AttentionKind


def load_recipe(path: str | Path) -> tuple[Method, ...]:
    """Read a recipe file: one method's dict, a list of them, or ``{"methods": [...]}``.

    Raises:
        MethodError: The file is missing or is no recipe.
    """
    try:
        data = read_json(Path(path), what="recipe file", remedy="write it again, or give another")
    except DataError as error:
        raise MethodError(f"Cannot read the recipe {path}: {error}.") from error
    try:
        return _methods_of(data, str(path))
    except MethodError as error:
        raise MethodError(f"Cannot read the recipe {path}: {error}") from error


def _methods_of(data: Any, source: str) -> tuple[Method, ...]:
    entries = data.get("methods", [data]) if isinstance(data, Mapping) else data
    if not isinstance(entries, list) or not entries:
        raise MethodError(f'{source} holds no method. Write for example [{{"method": "vhr", "alpha": 2.0}}].')
    return tuple(method_from_dict(entry) for entry in entries)


def parse_settings(settings: Iterable[str]) -> dict[str, Any]:
    """Return ``key=value`` texts as a dictionary; values are JSON, or text.

    Raises:
        MethodError: One is no ``key=value``.
    """
    return {key: parse_value(text) for key, text in (split_setting(setting, "key=value") for setting in settings)}


def split_setting(setting: str, expected: str) -> tuple[str, str]:
    """Return the key and the text of a setting.

    Raises:
        MethodError: It is none; the message says what was ``expected``.
    """
    key, separator, text = setting.partition("=")
    if not separator or not key:
        raise MethodError(f"--set expects {expected}, got {setting!r}")
    return key, text


def parse_value(text: str) -> Any:
    """Return a value as typed: JSON, or else text."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def save_recipe(path: str | Path, chosen: Method | Calibration | Sequence[Method | Calibration]) -> None:
    """Write methods as a recipe file that ``patch`` and ``load_recipe`` read.

    Of what ``calibrate`` returned, only the method is written; ``Calibration.save`` keeps the provenance too.

    Raises:
        MethodError: A method could not be read back; nothing is written.
    """
    given = [chosen] if isinstance(chosen, (Method, Calibration)) else list(chosen)
    methods = [each.method if isinstance(each, Calibration) else each for each in given]
    text = json.dumps({"methods": [recipe_entry(method) for method in methods]}, indent=2)
    Path(path).write_text(text + "\n", encoding="utf-8")


def resolve_methods(spec: Any, parameters: Mapping[str, Any], anatomy: Anatomy) -> tuple[Method, ...]:
    """Turn what a user hands to ``patch`` into methods, in the order of the path of attention.

    Raises:
        MethodError: Unknown or contradictory.
    """
    if isinstance(spec, Calibration):
        spec = spec.method
    if spec is None:
        chosen = default_recipe(anatomy)
    elif isinstance(spec, Path) or (isinstance(spec, str) and spec.endswith(".json")):
        chosen = load_recipe(spec)
    elif isinstance(spec, str):
        return (make_method(spec, parameters),)
    elif isinstance(spec, Method):
        chosen = (spec,)
    elif isinstance(spec, Mapping):
        chosen = _methods_of(spec, "The recipe")
    elif isinstance(spec, Sequence):
        chosen = tuple(method for each in spec for method in resolve_methods(each, {}, anatomy))
    else:
        raise MethodError(f"Expected a method's name, a method, a list of them or a recipe file, got {spec!r}.")
    if parameters:
        raise MethodError(
            f"Parameters ({', '.join(parameters)}) go with a method's name: vlmfix.patch(model, 'vhr', alpha=2.0)."
        )
    if not chosen:
        raise MethodError("An empty list of methods. For the identity, use vlmfix.patch(model, 'none').")
    names = [method.name for method in chosen]
    repeated = {name for name in names if names.count(name) > 1}
    if repeated:
        raise MethodError(f"{', '.join(sorted(repeated))} is given twice. Each method can be applied once.")
    alone = [method.name for method in chosen if method.searches]
    if alone and len(chosen) > 1:
        raise MethodError(f"{alone[0]} is a search of its own, which reads unedited attention. Choose it alone.")
    decoding = [method.name for method in chosen if method.replaces_logits or method.rewrites_logits]
    if len(decoding) > 1:
        raise MethodError(
            f"{' and '.join(decoding)} both decide on the next token, and no order "
            "of them is defined. Choose one; methods that edit attention can go with it."
        )
    return tuple(sorted(chosen, key=_place_on_path))


def _place_on_path(method: Method) -> int:
    attention = (method.opens_mask, method.edits_scores, method.edits_weights, method.edits_heads)
    places = (*attention, bool(method.edits_blocks), method.replaces_logits or method.rewrites_logits)
    return places.index(True) if True in places else len(places)


_MEANING: dict[AttentionKind, str] = {
    "joint": "self-attention over a prompt that holds the image's tokens",
    "text": "self-attention over text alone",
    "image": "cross-attention to image features alone",
    "encoder": "cross-attention to an encoder's image and text tokens",
    "answer": "self-attention over the answer alone",
}


def check_placement(method: Method, anatomy: Anatomy, name: str = "") -> None:
    """Refuse a method that means nothing in a model.

    Args:
        method: The method.
        anatomy: The model.
        name: What it is called; by default by its own name.

    Raises:
        MethodError: None of the model's kinds of attention is one the method acts in, or the model undoes its edits;
            the message says why.
    """
    if method.is_identity or method.replaces_logits or method.rewrites_answers:
        return
    model, name = type(anatomy.model).__name__, name or method.name
    if anatomy.kinds.isdisjoint(method.attention_kinds):
        raise MethodError(
            f"{name} does not act in {model}: {_reason(anatomy)}. {method.name} is defined for "
            f"{' or '.join(_MEANING[kind] for kind in method.attention_kinds)}. Choose another method; "
            "vlmfix.list_methods() lists them."
        )
    norms = {site.norm_behind for site in anatomy.sites if site.norm_behind}
    if method.scales_heads and norms:
        raise MethodError(
            f"{name} scales the outputs of heads, and {model} normalises them behind its attention "
            f"({', '.join(sorted(norms))}), which undoes every factor. Choose a method that edits scores or weights, "
            "such as vlmfix.patch(model, 'pai')."
        )


def placement_notes(method: Method, anatomy: Anatomy) -> tuple[str, ...]:
    """Return what a method's place means in a model, where that is not what it means elsewhere."""
    gates = sorted({site.gate_behind for site in anatomy.sites if site.gate_behind})
    if not gates or not method.edits_heads or method.is_identity:
        return ()
    return (
        f"{method.name}: this model multiplies the outputs of heads by gates ({', '.join(gates)}) behind its "
        f"attention; {method.name} reads and edits them before that",
    )


def layers_with(methods: Sequence[Method], anatomy: Anatomy) -> list[int]:
    """Return the layers with attention that one of the methods acts in."""
    kinds = {kind for method in methods for kind in method.attention_kinds}
    return sorted({site.layer_idx for site in anatomy.sites if site.kind in kinds})


def _reason(anatomy: Anatomy) -> str:
    if "image" in anatomy.kinds:
        return (
            "all keys of its cross-attention are image keys and its self-attention is over text alone, so that no row "
            "weighs the image against text"
        )
    if "encoder" in anatomy.kinds:
        return "an encoder reads its prompt, and every row of its decoder is one of the answer"
    return "its images are tokens of the prompt"


class DefaultRecipe(NamedTuple):
    """The default of some model families.

    Attributes:
        families: ``model_type`` of their configs; empty for all others.
        methods: As in a recipe file.
        reason: How it was chosen.
        behind_encoder: Whether it is for models whose prompt an encoder reads, or for all others.
    """

    families: tuple[str, ...]
    methods: tuple[dict[str, Any], ...]
    reason: str
    behind_encoder: bool = False


DEFAULTS = (
    DefaultRecipe(
        ("instructblip", "instructblipvideo"),
        ({"method": "vhr", "layers": "0.4375:"},),
        "arXiv 2412.13949, section 4.4: the last 18 of 32 layers for InstructBLIP-7B, without layer 1",
    ),
    DefaultRecipe(
        (),
        ({"method": "vhr"},),
        "of the four methods at the heart of the project the one with a published gain on captions (arXiv 2412.13949, "
        "tables 1 and 5: LLaVA-1.5, LLaVA-NeXT, InstructBLIP), and the cheapest at run time; its settings there",
    ),
    DefaultRecipe(
        (),
        ({"method": "pai", "alpha": 0.2},),
        "the gentlest setting of the method most often run by others (arXiv 2407.21771); VHR's reading of a prompt "
        "that an encoder reads is ours",
        behind_encoder=True,
    ),
)
"""In order: the first that names the family, or names none, and means something in the model.

None of them was tuned by us on a real checkpoint: they are papers' settings. On the embedded model the default does not
beat its controls (README). Measure yours: ``vlmfix eval --model ... --data ...``.
"""


def default_recipe(anatomy: Anatomy) -> tuple[Method, ...]:
    """Return the default methods of a model's family.

    Raises:
        MethodError: None means anything in this model.
    """
    reasons = []
    for recipe in DEFAULTS:
        if recipe.families and anatomy.model.config.model_type not in recipe.families:
            continue
        if recipe.behind_encoder != (anatomy.encoder is not None):
            continue
        methods = tuple(method_from_dict(entry) for entry in recipe.methods)
        try:
            for method in methods:
                check_placement(method, anatomy)
        except MethodError as error:
            reasons.append(str(error))
            continue
        return methods
    raise MethodError("No default method acts in this model. " + " ".join(reasons))
