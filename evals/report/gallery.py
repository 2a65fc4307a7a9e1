"""The captions that a method changed most, side by side with the baseline's, their objects marked."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..benchmarks.coco_objects import double_words
from ..data.coco import load_image
from .page import data_uri

if TYPE_CHECKING:
    from ..benchmarks.chair.task import Chair
    from ..data.samples import Answers, Sample
    from ..run.methods import MethodSpec

SHOWN = 6
"""Captions shown per method."""


@dataclass(frozen=True)
class Part:
    """A piece of a caption; ``kind`` is ``"invented"`` or ``"present"`` for the object ``name``, else empty."""

    text: str
    kind: str = ""
    name: str = ""


@dataclass(frozen=True)
class Text:
    """A row's caption in parts, and the objects it names that are not there, sorted."""

    label: str
    parts: tuple[Part, ...]
    invented: tuple[str, ...]


@dataclass(frozen=True)
class Pair:
    """An image, as the address of itself, with the captions of two rows."""

    image_id: int
    image: str
    texts: tuple[Text, Text]


@dataclass(frozen=True)
class Gallery:
    """What a page shows of one method."""

    title: str
    note: str
    pairs: tuple[Pair, ...]


def galleries(methods: Sequence[MethodSpec], task: Chair, answers: Mapping[str, Answers]) -> Iterator[Gallery]:
    """The captions whose invented objects changed most, each beside the baseline's, of every method but controls."""
    baseline = methods[0].label
    for spec in methods[1:]:
        if spec.role == "control":
            continue
        changes = []
        for sample in task.samples:
            before, after = (answers[label][sample.key].text for label in (baseline, spec.label))
            if before != after:
                moved = set(_invented(task, sample, after)) ^ set(_invented(task, sample, before))
                changes.append((-len(moved), sample.image_id, sample, before, after))
        pairs = []
        for _, image_id, sample, before, after in sorted(changes, key=lambda change: change[:2])[:SHOWN]:
            texts = _text(baseline, task, sample, before), _text(spec.label, task, sample, after)
            pairs.append(Pair(image_id, _thumbnail(sample), texts))
        note = f"{len(changes)} of {len(task.samples)} captions changed."
        yield Gallery(f"Captions that {spec.label} changed most", note, tuple(pairs))


def _text(label: str, task: Chair, sample: Sample, caption: str) -> Text:
    return Text(label, tuple(_parts(task, sample, caption)), tuple(_invented(task, sample, caption)))


def _parts(task: Chair, sample: Sample, caption: str) -> Iterator[Part]:
    """A caption with its objects marked, as far as their place in it is known."""
    truth = task.truth[sample.image_id]
    start = 0
    for word, node in task.matcher.as_written(caption):
        found = re.search(rf"\b{re.escape(word)}\b", caption[start:], re.IGNORECASE)
        if found is None:
            continue
        yield Part(caption[start : start + found.start()])
        end = start + found.end() + _second_word(found[0], caption[start + found.end() :])
        yield Part(caption[start + found.start() : end], "present" if node in truth else "invented", node)
        start = end
    yield Part(caption[start:])


def _second_word(first: str, rest: str) -> int:
    """How many characters of the rest belong to a name of two words that ``first`` begins; 0 for none."""
    following = re.match(r"\s+(\w+)", rest)
    if following is None:
        return 0
    names = {f"{first} {form}".lower() for form in (following[1], following[1].removesuffix("s"))}
    return following.end() if names & double_words().keys() else 0


def _invented(task: Chair, sample: Sample, caption: str) -> list[str]:
    """The objects a caption names that are not there, sorted."""
    return sorted(set(task.matcher.match(caption).nodes) - set(task.truth[sample.image_id]))


def _thumbnail(sample: Sample) -> str:
    assert sample.path is not None
    image = load_image(sample.path)
    image.thumbnail((440, 440))
    return data_uri(image, quality=80)
