"""What is asked for, loaded: the picture, the model and the method to compare it with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from PIL import Image as Images

from vlmfix.errors import DataError, VlmfixError
from vlmfix.observe.prompts import PromptBuilder

from .. import testbed
from ..benchmarks.chair.task import PROMPT as CHAIR_PROMPT
from ..benchmarks.coco_objects import ChairMatcher
from ..data.coco import load_image
from ..run.methods import MethodSpec, load_recipe, plan_methods
from ..run.models import ModelSource, find_model, fitting_threads, load_model, placement
from ..testbed import MODELS
from ..testbed.scenes import SPLITS, image_id, make_scene
from ..testbed.vocabulary import SCENES
from .case import Case
from .look import Inspection, inspect_picture
from .options import InspectOptions

if TYPE_CHECKING:
    from PIL.Image import Image

DEFAULT_SCENE = 350
"""A scene of the held-out split whose stock caption invents an object by prior; see ``testbed/EXAMPLES.md``."""


def inspect_command(options: InspectOptions) -> Inspection:
    """Load what was asked for and look at it.

    Raises:
        VlmfixError: No such model, image or scene, an unknown method, or a model that probes refuse.
    """
    picture, name, objects, scene_words = _picture(options)
    on_testbed = options.model is None
    source = find_model(options.model, yes=options.yes)
    recipe = load_recipe(testbed.RECIPE) if on_testbed else None
    specs = _specs(options, recipe)
    model = load_model(
        source, dtype=options.dtype, device=options.device, attn_implementation=options.attn_implementation
    )
    case = Case(
        model=model,
        processor=source.processor,
        prompts=PromptBuilder(source.processor, use_template=options.chat_template),
        picture=picture,
        question=options.prompt or CHAIR_PROMPT,
        objects=objects,
        scene_words=scene_words,
        max_new_tokens=options.max_new_tokens or (64 if on_testbed else 256),
    )
    with fitting_threads(model):
        return inspect_picture(case, specs, title=f"{name} · {source.name}", facts=_facts(source, model, name))


def _specs(options: InspectOptions, recipe: Mapping[str, Any] | None) -> list[MethodSpec]:
    if len(options.methods) > 1:
        raise VlmfixError(f"inspect compares the stock model with one method, got --method {' '.join(options.methods)}")
    if not options.methods or options.methods == ("none",):
        return []
    wanted = options.as_eval(controls=False, out=None)
    return [spec for spec in plan_methods(wanted, recipe) if spec.role == "method"]


def _facts(source: ModelSource, model: Any, name: str) -> tuple[str, ...]:
    size = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    return (
        f"{source.name}: {type(model).__name__}, {size:,.1f} M parameters, {str(model.dtype).removeprefix('torch.')}, "
        f"{placement(model)}, attention {model.config._attn_implementation}; greedy decoding",
        f"picture: {name}",
    )


def _picture(options: InspectOptions) -> tuple[Image, str, frozenset[str] | None, frozenset[str]]:
    """Return the picture, its name, the objects in it where known, and words that name its place."""
    matcher = ChairMatcher("original")
    given = None if options.objects is None else frozenset(matcher.node(name) for name in options.objects)
    if options.image is not None:
        if options.scene is not None:
            raise DataError("give either --image or --scene, not both")
        return load_image(options.image), options.image.name, given, frozenset()
    if options.model not in (None, *MODELS) and options.scene is None:
        raise DataError("inspect needs a picture: --image FILE (or --scene N for one of the testbed's)")
    split = next((each for each in SPLITS if each == options.split), SPLITS[2])
    number = DEFAULT_SCENE if options.scene is None else options.scene
    scene = make_scene(image_id(split, number))
    objects = frozenset(matcher.node(name) for name in scene.counts()) if given is None else given
    places = frozenset(word for each in SCENES for word in each.name.split())
    return Images.fromarray(scene.pixels), f"scene {number} of {split}", objects, places
