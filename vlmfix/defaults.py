"""What ``vlmfix.patch(model)`` takes when no method is named, and why."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from vlmfix.errors import MethodError
from vlmfix.placement import check_placement
from vlmfix.recipes import method_from_dict

if TYPE_CHECKING:
    from vlmfix.anatomy import Anatomy
    from vlmfix.methods.base import Method


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
