"""``vlmfix calibrate``: samples for ``vlmfix.calibrate`` out of the testbed's calibration split or a COCO folder."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence, Set
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmfix.errors import DataError

from .flags import IMAGES, MODEL, OUTPUT, add_verb, option
from .options import DataOptions, EvalOptions

if TYPE_CHECKING:
    from vlmfix import CalibrationSample

    from .benchmarks.registry import Tasks

TESTBED_IMAGES = 40

COCO_IMAGES = 500

POPE_SPLIT = "adversarial"
"""Which absent objects are asked for: those that often occur together with a present one, as AllPath's authors do."""


@dataclass(frozen=True, kw_only=True)
class CalibrateOptions(DataOptions):
    """The options of ``vlmfix calibrate``."""

    method: str = option(
        "act, adhh, adaiat, allpath, iri, maskcd, vaf, var, verify or vti",
        group=MODEL,
        default=MISSING,
        name="method",
        metavar="METHOD",
    )
    exclude: tuple[Path, ...] = option(
        "refuse to run if one of these image ids is used", group=IMAGES, default=(), metavar="FILE"
    )
    out: Path | None = option("recipe to write (default: METHOD.json)", group=OUTPUT, metavar="FILE")

    @property
    def parameters(self) -> dict[str, Any]:
        """The settings, parsed.

        Raises:
            MethodError: One is no ``key=value``.
        """
        from vlmfix.recipes import parse_settings

        return parse_settings(self.settings)

    @property
    def asks(self) -> bool:
        """Whether it learns from yes/no questions rather than captions or prompts."""
        return self.method in ("act", "iri") or self.parameters.get("answers") == "yesno"

    def filled_in(self) -> EvalOptions:
        """What a calibration run leaves open: the benchmark, the calibration split, and how many images."""
        limit = self.limit
        if limit is None and self.ids is None:
            limit = TESTBED_IMAGES if self.data is None else COCO_IMAGES
        benchmark = "pope" if self.asks else "chair"
        return self.as_eval(benchmarks=(benchmark,), split="calibration", limit=limit, out=None)


def calibrate_command(options: CalibrateOptions, show: Callable[[str], None]) -> None:
    """Calibrate a method and write its recipe.

    Raises:
        VlmfixError: Something is missing or contradictory, an image is excluded, or the search finds nothing.
    """
    # Imported here, so that the verb's --help does not wait for torch.
    import vlmfix
    from vlmfix.calibration.calibrate import plan
    from vlmfix.observe.prompts import PromptBuilder

    from .benchmarks.coco_objects import ChairMatcher
    from .benchmarks.registry import make_tasks
    from .data.write import check_parent
    from .run.models import find_model, fitting_threads, load_model

    run, settings, asks = options.filled_in(), options.parameters, options.asks
    out = options.out or Path(f"{options.method}.json")
    check_parent(out)
    plan(options.method, settings)
    tasks = make_tasks(run)
    samples, max_new_tokens = _samples(tasks, asks)
    _check_excluded({sample.image_id for sample in samples}, options.exclude)
    source = find_model(run.model, yes=run.yes)
    model = load_model(source, dtype=run.dtype, device=run.device, attn_implementation=run.attn_implementation)
    images = len({sample.image_id for sample in samples})
    show(f"{source.name}: {options.method} from {len(samples)} {'questions' if asks else 'prompts'} on {images} images")
    with fitting_threads(model):
        calibration = vlmfix.calibrate(
            model,
            options.method,
            samples,
            processor=source.processor,
            prompt=PromptBuilder(source.processor, use_template=run.chat_template),
            mentions=ChairMatcher("original").as_written,
            seed=run.seed,
            batch_size=int(run.batch_size or (32 if run.model is None else 8)),
            max_new_tokens=max_new_tokens,
            **settings,
        )
    calibration.provenance["model"] |= {"name": source.name, **source.identity}
    calibration.provenance["data"] = tasks.description
    calibration.save(out)
    show(repr(calibration.method))
    show(", ".join(f"{name} {count}" for name, count in calibration.provenance["counts"].items()))
    show(f"written: {out} (patch(model, {str(out)!r}))")


def _samples(tasks: Tasks, asks: bool) -> tuple[list[CalibrationSample], int]:
    """Return the samples, and how long captions may get."""
    from vlmfix import CalibrationSample

    from .benchmarks.chair.task import Chair
    from .benchmarks.pope.task import Pope

    if not asks:
        chair = tasks.find(Chair)
        assert chair is not None
        captions = [
            CalibrationSample(each.path, each.question, objects=chair.truth[each.image_id], image_id=each.image_id)
            for each in chair.samples
        ]
        return captions, chair.max_new_tokens
    pope = tasks.find(Pope)
    assert pope is not None
    paths = {sample.image_id: sample.path for sample in pope.samples}
    splits = {question.split for question in pope.asked}
    wanted = {POPE_SPLIT} & splits or splits  # question files given by the user may have other names
    questions = {(each.image_id, each.text): each for each in pope.asked if each.split in wanted}
    asked = [
        CalibrationSample(
            paths[each.image_id],
            pope.prompt_text(each),
            answer=each.label,
            objects={each.object} if each.label else None,
            absent=None if each.label else {each.object},
            image_id=each.image_id,
        )
        for each in questions.values()
    ]
    return asked, 1


def _check_excluded(used: Set[int | str | None], files: Sequence[Path]) -> None:
    """Refuse images that an evaluation uses.

    Raises:
        DataError: An image is listed, or a file cannot be read.
    """
    from .data.records import read_ids

    for path in files:
        both = sorted(number for number in read_ids(path, "--exclude") if number in used)
        if both:
            raise DataError(
                f"{len(both)} of the images are in --exclude {path} (first: {both[0]}), so methods would be evaluated "
                "on what they learned from; choose other images with --ids FILE or another --data folder"
            )


_ABOUT = """\
Learn the heads, statistics or dimensions that a method needs for one model, and write them as a recipe.

  vlmfix calibrate adhh                            on the embedded testbed
  vlmfix calibrate allpath --set answers=yesno     heads for yes/no questions
  vlmfix calibrate act --model llava-hf/llava-1.5-7b-hf --data COCO_DIR --limit 100 --exclude ids.txt

act costs a prefill per question and head; adhh a decode step per named object and head; iri two prefills per question
and layer; vti two prefills and 51 passes of the vision tower per image; the others a prefill or a caption per image.
VLMFIX_LOG_LEVEL=INFO shows how far it is.
vlmfix.patch(model, "act.json") takes the file.
"""


def add_calibrate(verbs: Any) -> argparse.ArgumentParser:
    """Add the verb to a command line's subparsers; import nothing heavy."""
    return add_verb(
        verbs,
        "calibrate",
        CalibrateOptions,
        about=_ABOUT,
        help_of={
            "settings": "option of the search or the method",
            "data": "COCO folder (default: scenes of the testbed's calibration split)",
            "limit": "number of images, drawn by seed (default: 500; on the testbed 40)",
            "batch_size": "samples per batch (default: 32 testbed, else 8)",
        },
    )


def run(options: argparse.Namespace, *, show: Callable[[str], None]) -> None:
    """Calibrate as asked."""
    calibrate_command(CalibrateOptions.from_arguments(options), show)
