"""``vlmfix inspect``: loads a model and a picture, looks at them, and writes the page."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmfix.errors import DataError, VlmfixError

from .config import CHAIR_PROMPT, EvalOptions, MethodSpec, load_recipe, plan_methods
from .data.coco import load_image
from .generate import PromptBuilder
from .inspection import Inspection, inspect_picture
from .inspection_parts import Eye
from .metrics.chair import ChairMatcher
from .models import ModelSource, find_model, fitting_threads, load_model, resolve_device, resolve_dtype

if TYPE_CHECKING:
    from PIL.Image import Image

DEFAULT_SCENE = 350
"""A scene of the held-out split whose stock caption invents an object by prior; see ``testbed/EXAMPLES.md``."""


@dataclass(frozen=True)
class InspectOptions:
    """The options of ``vlmfix inspect``, as typed; None means that the command chooses.

    Attributes:
        model: Folder or hub id; None is the testbed.
        image: Image file; None takes a scene of the testbed.
        scene: Index of a scene in a split of the testbed.
        split: The split.
        prompt: What to ask.
        methods: Method to compare with the stock model: a name or a recipe file; none or one.
        settings: ``key=value`` parameters of it.
        objects: What is in the image, if known (COCO names).
        run: Machine options, as of evaluation runs.
    """

    model: str | None = None
    image: Path | None = None
    scene: int | None = None
    split: str = "heldout"
    prompt: str | None = None
    methods: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()
    objects: tuple[str, ...] | None = None
    run: EvalOptions = field(default_factory=EvalOptions)


def inspect_command(options: InspectOptions) -> Inspection:
    """Load what was asked for and look at it.

    Raises:
        VlmfixError: No such model, image or scene, an unknown method, or a model that probes refuse.
    """
    from . import testbed

    picture, name, objects, scene_words = _picture(options)
    on_testbed = options.model is None
    source = find_model(testbed.MODEL_DIR, name="testbed") if options.model is None else find_model(options.model)
    recipe = load_recipe(testbed.RECIPE) if on_testbed else None
    specs = _specs(options, recipe)
    device = resolve_device(options.run.device)
    model = load_model(
        source,
        dtype=resolve_dtype(options.run.dtype, device, source.config),
        device=device,
        attn_implementation=options.run.attn_implementation,
    )
    eye = Eye(
        model,
        source.processor,
        PromptBuilder(source.processor, use_template=options.run.chat_template),
        picture,
        options.prompt or CHAIR_PROMPT,
        objects,
        scene_words,
        options.run.max_new_tokens or (64 if on_testbed else 256),
    )
    with fitting_threads(model):
        return inspect_picture(eye, specs, title=f"{name} · {source.name}", facts=_facts(source, model, device, name))


def _specs(options: InspectOptions, recipe: Mapping[str, Any] | None) -> list[MethodSpec]:
    if len(options.methods) > 1:
        raise VlmfixError(f"inspect compares the stock model with one method, got --method {' '.join(options.methods)}")
    if not options.methods or options.methods == ("none",):
        return []
    wanted = replace(options.run, methods=options.methods, settings=options.settings, controls=False)
    return [spec for spec in plan_methods(wanted, recipe) if spec.role == "method"]


def _facts(source: ModelSource, model: Any, device: str, name: str) -> tuple[str, ...]:
    size = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    return (
        f"{source.name}: {type(model).__name__}, {size:,.1f} M parameters, {str(model.dtype).removeprefix('torch.')}, "
        f"{device}, attention {model.config._attn_implementation}; greedy decoding",
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
    if options.model is not None and options.scene is None:
        raise DataError("inspect needs a picture: --image FILE (or --scene N for one of the testbed's)")
    from PIL import Image as Images

    from .testbed.scenes import SPLITS, image_id, make_scene
    from .testbed.vocabulary import SCENES

    split = next((each for each in SPLITS if each == options.split), SPLITS[2])
    number = DEFAULT_SCENE if options.scene is None else options.scene
    scene = make_scene(image_id(split, number))
    objects = frozenset(matcher.node(name) for name in scene.counts()) if given is None else given
    places = frozenset(word for each in SCENES for word in each.name.split())
    return Images.fromarray(scene.pixels), f"scene {number} of {split}", objects, places
