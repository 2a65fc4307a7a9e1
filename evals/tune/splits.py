"""Two sets of images that share none: one to choose on, one to confirm on."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

from vlmfix.errors import DataError

from ..data.coco import CocoData
from ..data.records import read_ids
from ..data.write import write_text
from ..options import EvalOptions

TESTBED_IMAGES = 200

COCO_IMAGES = 200

CONFIRM_IMAGES = 500


def make_splits(
    options: EvalOptions, confirm: int | None, confirm_ids: Path | None, folder: Path
) -> tuple[EvalOptions, EvalOptions]:
    """Return the options of the run that chooses, and those of the one that confirms.

    Without data both are splits of the testbed. In a COCO folder the images are those of two files of ids, or drawn by
    seed and kept as ``calibration_ids.json`` and ``heldout_ids.json`` in ``folder``.

    Args:
        options: As typed; ``limit`` images to choose on.
        confirm: Images to confirm on.
        confirm_ids: File of their ids, beside ``options.ids``.
        folder: Where drawn ids go.

    Raises:
        DataError: Only one file of ids, one image in both, or not enough images.
    """
    if options.data is None:
        if options.ids is not None or confirm_ids is not None:
            raise DataError("--ids and --confirm-ids name images of a COCO folder; give --data DIR too")
        limit = options.limit or TESTBED_IMAGES
        return replace(options, split="calibration", limit=limit), replace(options, split="heldout", limit=confirm)
    if (options.ids is None) != (confirm_ids is None):
        raise DataError("give both --ids FILE (to choose on) and --confirm-ids FILE (to confirm on), or neither")
    if options.ids is not None and confirm_ids is not None:
        both = set(read_ids(options.ids, "--ids")) & set(read_ids(confirm_ids, "--confirm-ids"))
        if both:
            raise DataError(
                f"{len(both)} images (first: {min(both)}) are in both --ids and --confirm-ids: a setting would be "
                "confirmed on what it was chosen on; take them out of one"
            )
        return options, replace(options, ids=confirm_ids, limit=confirm)
    drawn = _draw(options, confirm or CONFIRM_IMAGES, folder)
    return replace(options, ids=drawn[0], limit=None), replace(options, ids=drawn[1], limit=None)


def _draw(options: EvalOptions, confirm: int, folder: Path) -> tuple[Path, Path]:
    assert options.data is not None
    limit = options.limit or COCO_IMAGES
    present = sorted(CocoData.load(options.data).present_ids())
    if len(present) < limit + confirm:
        raise DataError(
            f"{options.data} has {len(present)} annotated images with their file, {limit} + {confirm} are wanted; give "
            "fewer with --limit N and --confirm N"
        )
    order = random.Random(options.seed).sample(present, limit + confirm)
    paths = []
    for name, ids in (("calibration", order[:limit]), ("heldout", order[limit:])):
        paths.append(folder / f"{name}_ids.json")
        write_text(paths[-1], json.dumps(sorted(ids)) + "\n")
    return paths[0], paths[1]
