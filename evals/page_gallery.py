"""The captions that a method changed most, each beside the baseline's and its image, with the objects marked."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from .data.coco import load_image
from .markup import text as _text
from .metrics.chair_words import double_words

if TYPE_CHECKING:
    from .benchmarks.chair import ChairTask
    from .config import MethodSpec
    from .samples import Answer, Sample

    Answers = Mapping[tuple[str, int, str], Answer]

GALLERY = 6
"""Captions shown per method."""


def gallery(methods: Sequence[MethodSpec], task: ChairTask, answers: Mapping[str, Answers]) -> Iterator[str]:
    """The captions whose invented objects changed most, each beside the baseline's."""
    baseline = answers[methods[0].label]
    for spec in methods[1:]:
        if spec.role == "control":
            continue
        changes = []
        for sample in task.samples:
            before, after = (_caption(sample, each) for each in (baseline, answers[spec.label]))
            if before != after:
                moved = set(_invented(task, sample, after)) ^ set(_invented(task, sample, before))
                changes.append((-len(moved), sample.image_id, sample, before, after))
        opened = " open" if spec is next(each for each in methods[1:] if each.role != "control") else ""
        yield f"<details{opened}><summary><h2>Captions that {_text(spec.label)} changed most</h2></summary>"
        yield f"<p>{len(changes)} of {len(task.samples)} captions changed. "
        yield "<mark>Invented</mark> and <mark class=real>present</mark> objects are marked.</p>"
        for _, _, sample, before, after in sorted(changes, key=lambda change: change[:2])[:GALLERY]:
            yield (
                f'<div class="pair"><div><img alt="image {sample.image_id}" src="{_thumbnail(sample)}">'
                f"<small>{sample.image_id}</small></div><div><small>{_text(methods[0].label)}</small>"
                f"<p>{_marked(task, sample, before)}</p><small>{_text(spec.label)}</small>"
                f"<p>{_marked(task, sample, after)}</p></div></div>"
            )
        yield "</details>"


def _marked(task: ChairTask, sample: Sample, caption: str) -> str:
    """A caption with its objects marked, as far as their place in it is known, and those it invents."""
    truth = task.truth[sample.image_id]
    parts, start = [], 0
    for word, node in task.matcher.as_written(caption):
        found = re.search(rf"\b{re.escape(word)}\b", caption[start:], re.IGNORECASE)
        if found is None:
            continue
        kind = ' class="real"' if node in truth else ""
        parts.append(_text(caption[start : start + found.start()]))
        end = start + found.end() + _second_word(found[0], caption[start + found.end() :])
        parts.append(f'<mark{kind} title="{_text(node)}">{_text(caption[start + found.start() : end])}</mark>')
        start = end
    parts.append(_text(caption[start:]))
    invented = _invented(task, sample, caption)
    tail = f"<br><small>invented: {_text(', '.join(invented))}</small>" if invented else ""
    return "".join(parts) + tail


def _second_word(first: str, rest: str) -> int:
    """How many characters of the rest belong to a name of two words that ``first`` begins; 0 for none."""
    following = re.match(r"\s+(\w+)", rest)
    if following is None:
        return 0
    names = {f"{first} {form}".lower() for form in (following[1], following[1].removesuffix("s"))}
    return following.end() if names & double_words().keys() else 0


def _thumbnail(sample: Sample) -> str:
    assert sample.path is not None
    image = load_image(sample.path)
    image.thumbnail((440, 440))
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _invented(task: ChairTask, sample: Sample, caption: str) -> list[str]:
    """The objects a caption names that are not there, sorted."""
    return sorted(set(task.matcher.match(caption).nodes) - set(task.truth[sample.image_id]))


def _caption(sample: Sample, answers: Answers) -> str:
    return answers[sample.benchmark, sample.image_id, sample.question].text
