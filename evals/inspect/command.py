"""``vlmfix inspect``: loads a picture, the model and the method to compare it with, and writes the page."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from vlmfix.errors import DataError, VlmfixError

from ..flags import IMAGES, MODEL, OUTPUT, add_verb, option
from ..options import TESTBED_SPLITS, Options

if TYPE_CHECKING:
    from PIL.Image import Image

    from ..testbed.scenes import RenderedScene
    from .case import Case
    from .look import Inspection

DEFAULT_SCENE = 350
"""A scene of the held-out split whose stock caption invents an object by prior; see ``testbed/EXAMPLES.md``."""


@dataclass(frozen=True, kw_only=True)
class PictureOptions(Options):
    """The options of a verb that looks at one answer about one picture."""

    image: Path | None = option("picture (default: a scene of the testbed)", group=IMAGES, metavar="FILE")
    scene: int | None = option("scene of the testbed, from 0 (default: 350)", group=IMAGES, metavar="N", at_least=0)
    split: str = option(
        "split of the testbed that the scene is from", group=IMAGES, default="heldout", choices=TESTBED_SPLITS
    )


@dataclass(frozen=True, kw_only=True)
class InspectOptions(PictureOptions):
    """The options of ``vlmfix inspect``."""

    objects: tuple[str, ...] | None = option(
        "COCO objects that are in the picture, if you know them", group=IMAGES, metavar="NAME"
    )
    methods: tuple[str, ...] = option(
        "compare with a method or recipe file", group=MODEL, name="--method", default=(), metavar="NAME"
    )
    out: Path = option("the page", group=OUTPUT, default=Path("inspect.html"), metavar="FILE")


def inspect_command(options: InspectOptions) -> Inspection:
    """Load what was asked for and look at it.

    Raises:
        VlmfixError: No such model, image or scene, an unknown method, or a model that probes refuse.
    """
    # Imported here, so that the verb's --help does not wait for torch.
    from ..benchmarks.chair.task import PROMPT as CHAIR_PROMPT
    from ..benchmarks.coco_objects import ChairMatcher
    from ..run.methods import plan_methods, strengths_on
    from ..run.models import fitting_threads
    from ..testbed.vocabulary import SCENES
    from .look import inspect_picture

    matcher, picture = ChairMatcher("original"), shown_picture(options)
    named = options.objects if picture.scene is None or options.objects is not None else picture.scene.counts()
    if len(options.methods) > 1:
        raise VlmfixError(f"inspect compares the stock model with one method, got --method {' '.join(options.methods)}")
    wanted = options.as_eval(methods=options.methods or ("none",), controls=False, out=None)
    specs = [spec for spec in plan_methods(wanted, strengths_on(options.model)[0]) if spec.role == "method"]
    case, title, facts = load_case(
        options,
        picture,
        options.prompt or CHAIR_PROMPT,
        objects=None if named is None else frozenset(matcher.node(name) for name in named),
        scene_words=frozenset() if picture.scene is None else frozenset(" ".join(s.name for s in SCENES).split()),
    )
    with fitting_threads(case.model):
        return inspect_picture(case, specs, title=title, facts=facts)


class Shown(NamedTuple):
    """A picture, its name, and the testbed's scene that it is, if it is one."""

    picture: Image
    name: str
    scene: RenderedScene | None


def shown_picture(options: PictureOptions) -> Shown:
    """Return the picture that was asked for.

    Raises:
        DataError: Both a file and a scene were given, or neither, or there is no such file or scene.
    """
    from PIL import Image as Images

    from ..data.coco import load_image
    from ..testbed import MODELS
    from ..testbed.scenes import SPLITS, image_id, make_scene

    if options.image is not None:
        if options.scene is not None:
            raise DataError("give either --image or --scene, not both")
        return Shown(load_image(options.image), options.image.name, None)
    if options.model not in (None, *MODELS) and options.scene is None:
        raise DataError("this model needs a picture: --image FILE (or --scene N for one of the testbed's)")
    split = next((each for each in SPLITS if each == options.split), SPLITS[2])
    number = DEFAULT_SCENE if options.scene is None else options.scene
    scene = make_scene(image_id(split, number))
    return Shown(Images.fromarray(scene.pixels), f"scene {number} of {split}", scene)


def load_case(
    options: PictureOptions,
    shown: Shown,
    question: str,
    *,
    objects: frozenset[str] | None = None,
    scene_words: frozenset[str] = frozenset(),
) -> tuple[Case, str, tuple[str, ...]]:
    """Load the model that is asked.

    Returns:
        Model, picture and question; a title; lines on model and picture.
    """
    from vlmfix.observe.prompts import PromptBuilder

    from ..run.models import find_model, load_model, placement
    from .case import Case

    source = find_model(options.model, yes=options.yes)
    model = load_model(
        source, dtype=options.dtype, device=options.device, attn_implementation=options.attn_implementation
    )
    case = Case(
        model=model,
        processor=source.processor,
        prompts=PromptBuilder(source.processor, use_template=options.chat_template),
        picture=shown.picture,
        question=question,
        objects=objects,
        scene_words=scene_words,
        max_new_tokens=options.max_new_tokens or (64 if options.model is None else 256),
    )
    size = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    facts = (
        f"{source.name}: {type(model).__name__}, {size:,.1f} M parameters, {str(model.dtype).removeprefix('torch.')}, "
        f"{placement(model)}, attention {model.config._attn_implementation}; greedy decoding",
        f"picture: {shown.name}",
    )
    return case, f"{shown.name} · {source.name}", facts


_ABOUT = """\
Write a page that shows what an answer about a picture rests on, before and after a patch.

  vlmfix inspect                                   a scene of the embedded model whose caption invents an object
  vlmfix inspect --scene 356 --method vhr          before and after a patch
  vlmfix inspect --model llava-hf/llava-1.5-7b-hf --image dog.jpg --prompt 'Describe the image.' --objects dog car

The page is one HTML file that needs no other: where every word looks, what it rests on, which objects are likely
invented, sinks, and the heads that depend on the image.
"""


def add_inspect(verbs: Any) -> argparse.ArgumentParser:
    """Add the verb to a command line's subparsers; import nothing heavy."""
    return add_verb(
        verbs,
        "inspect",
        InspectOptions,
        about=_ABOUT,
        help_of={
            "settings": "parameters of the method",
            "prompt": "what to ask (default: Please describe this image in detail.)",
            "max_new_tokens": "longest answer, in tokens (default: 64 testbed, else 256)",
        },
    )


def run(arguments: argparse.Namespace, *, show: Callable[[str], None]) -> None:
    """Inspect as asked and write the page."""
    from ..data.write import check_parent, write_text
    from .page import inspection_page, summary

    options = InspectOptions.from_arguments(arguments)
    check_parent(options.out)
    found = inspect_command(options)
    write_text(options.out, inspection_page(found))
    for version in found.versions:
        show(f"{version.label}: {version.caption}")
    for line in summary(found):
        show(line)
    show(f"written: {options.out}")
