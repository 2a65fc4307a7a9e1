"""Made-up copies of the benchmarks' folders, each of a few questions on scenes of the testbed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from golden import data
from golden.data import WORDS, ask

from vlmfix.evals.data.coco import CocoData
from vlmfix.evals.testbed import prepare

__all__ = ["WORDS", "amber", "ask", "custom", "hallusionbench", "mme", "mmhal", "scenes"]


def scenes(number: int) -> list[tuple[Path, list[str]]]:
    """Pictures of the testbed with what is in them."""
    coco = CocoData.load(prepare("calibration", number))
    return [(coco.image(i).path, sorted(coco.objects(i))) for i in coco.image_ids]


def amber(folder: Path, number: int = 3, *, described: bool = True) -> Path:
    """AMBER's repository."""
    return data.amber(folder, scenes(number), described=described)


def mme(folder: Path, number: int = 3) -> Path:
    """MME's release."""
    return data.mme(folder, scenes(number))


def hallusionbench(folder: Path, number: int = 3) -> Path:
    """HallusionBench, of so many sets of two figures."""
    return data.hallusionbench(folder, scenes(2 * number))


def mmhal(folder: Path, number: int = 3) -> Path:
    """MMHal-Bench's template."""
    return data.mmhal(folder, scenes(number))


def custom(folder: Path, number: int = 3, *, more: Sequence[dict[str, Any]] = ()) -> Path:
    """A file of the user's own questions."""
    return data.custom(folder, scenes(number), more=more)
