"""The answers that a method changed most, side by side with the baseline's, what they name marked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..data.coco import load_image
from .page import data_uri

if TYPE_CHECKING:
    from ..benchmarks.base import Benchmark
    from ..benchmarks.marked_text import MarkedText
    from ..data.samples import Answers, Sample
    from ..run.methods import MethodSpec

SHOWN = 6
"""Images shown per method."""


@dataclass(frozen=True)
class Pair:
    """An image, as the address of itself, with the texts of two rows by label."""

    image_id: int
    image: str
    texts: Mapping[str, MarkedText]


@dataclass(frozen=True)
class Gallery:
    """What a page shows of one method."""

    title: str
    note: str
    pairs: tuple[Pair, ...]


def galleries(methods: Sequence[MethodSpec], task: Benchmark, answers: Mapping[str, Answers]) -> Iterator[Gallery]:
    """The texts whose invented objects changed most, of every method but controls.

    Args:
        methods: The rows, the baseline first.
        task: What was asked; nothing is shown of a benchmark that marks nothing.
        answers: Method label to its answers.
    """
    for spec in methods[1:]:
        if spec.role == "control":
            continue
        changes = []
        for sample in task.samples:
            said = {label: answers[label][sample.key].text for label in (methods[0].label, spec.label)}
            marked = {label: found for label, text in said.items() if (found := task.marked(sample, text))}
            if not marked:
                return
            if len(set(said.values())) > 1:
                before, after = (set(text.invented) for text in marked.values())
                changes.append((-len(before ^ after), sample.image_id, sample, marked))
        chosen = sorted(changes, key=lambda change: change[:2])[:SHOWN]
        yield Gallery(
            f"{task.title} captions that {spec.label} changed most",
            f"{len(changes)} of {len(task.samples)} captions changed.",
            tuple(Pair(image_id, _thumbnail(sample), marked) for _, image_id, sample, marked in chosen),
        )


def _thumbnail(sample: Sample) -> str:
    assert sample.path is not None
    image = load_image(sample.path)
    image.thumbnail((440, 440))
    return data_uri(image, quality=80)
