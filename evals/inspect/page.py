"""The page of ``vlmfix inspect``: one HTML file, nothing fetched, to be looked at."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from typing import Any

from vlmfix.probes.evidence import DOUBT_THRESHOLD

from ..report.page import render
from .look import GROUPS, Inspection, SinkSummary, Version, Word


def inspection_page(found: Inspection) -> str:
    """Write the page of an inspection.

    Args:
        found: What was looked at.

    Returns:
        HTML without any reference to another file.
    """
    return render(
        "inspect.html",
        title=f"vlmfix inspect: {found.title}",
        found=found,
        summary=summary(found),
        groups=GROUPS,
        data=_data(found),
        percent=percent,
        verdict=verdict,
        by_doubt=_by_doubt,
        spelled=_spelled,
        sink_counts=_sink_counts,
    )


def percent(value: float | None, digits: int = 0) -> str:
    """Write a share in percent; a dash for none."""
    return "–" if value is None else f"{100 * value:.{digits}f} %"


SAME = 0.75
"""A probability that keeps this share of another one counts as about the same."""

GONE = 0.5
"""A probability below this share of another one has dropped."""


def verdict(word: Word) -> str:
    """Say in a sentence or two what an object word rests on; of other words, how much the image raises them."""
    p = word.probability
    by_itself = word.without_image >= SAME * p
    blind = word.image_hidden >= SAME * p
    context = word.context_hidden
    if word.name is None:
        return f"Without the image {percent(word.without_image)} instead of {percent(p)}."
    parts = ["Flagged." if word.flagged else "Not flagged."]
    if by_itself:
        parts.append(f"The words alone predict it as well: {percent(word.without_image)} without the image.")
    elif word.without_image < GONE * p:
        parts.append(f"The image carries it: {percent(word.without_image)} without it instead of {percent(p)}.")
    else:
        parts.append(f"The words alone predict it with {percent(word.without_image)}, with the image {percent(p)}.")
    if by_itself and word.image_hidden * SAME > p:
        parts.append(f"Hiding the image even raises it: {percent(word.image_hidden)}.")
    elif by_itself and blind:
        parts.append("Hiding the image hardly changes it.")
    if by_itself and context is not None and context < GONE * p:
        parts.append(f"Hiding what was named before takes it away: {percent(context)}.")
    if word.asked is not None and word.asked < 0.5:
        parts.append(f"Asked for it, the model says no ({percent(word.asked)} yes).")
    return " ".join(parts)


def summary(found: Inspection) -> list[str]:
    """Say of each answer what was flagged, and where known what of the objects named is not there."""
    lines = []
    for version in found.versions:
        objects = [word for word in version.words if word.name is not None]
        flagged = [word for word in objects if word.flagged]
        names = ", ".join(dict.fromkeys(str(word.name) for word in flagged))
        line = f"{version.label}: {len(flagged)} of {len(objects)} object words flagged"
        line += f" ({names})" if names else ""
        if found.objects is not None:
            absent = list(dict.fromkeys(str(word.name) for word in objects if not word.present))
            line += f"; named and not in the picture: {', '.join(absent) or 'none'}"
        lines.append(line + ".")
    return lines


def _by_doubt(version: Version) -> list[Word]:
    """The words that name objects, the most doubtful first."""
    return sorted((word for word in version.words if word.name is not None), key=lambda word: -(word.doubt or 0))


def _spelled(word: Word) -> str:
    """An object's name, with the word that stands for it where that is another one."""
    return word.name if word.name and word.name.split()[0] in word.text.lower() else f"{word.text} ({word.name})"


def _sink_counts(sinks: SinkSummary) -> str:
    return ", ".join(f"{sum(layers)} {kind}" for kind, layers in sinks.counts.items() if sum(layers))


def _packed(values: Iterable[float], top: float) -> str:
    """Pack values from 0 to ``top`` into one byte each."""
    scale = 255 / top if top > 0 else 0.0
    return base64.b64encode(bytes(min(255, max(0, round(value * scale))) for value in values)).decode()


def _flat(rows: Sequence[Sequence[Any]]) -> list[Any]:
    return [value for row in rows for value in row]


def _data(found: Inspection) -> dict[str, Any]:
    """What the page's script needs, JSON-ready."""
    words = [word for version in found.versions for word in version.words]
    tops = [max((max(word.maps[group], default=0.0) for word in words), default=0.0) for group in range(len(GROUPS))]
    top_heads = max((value for word in words for value in _flat(word.heads)), default=0.0)
    top_sinks = max((value for version in found.versions for value in version.sinks.received), default=0.0)
    return {
        "versions": [_version(version, tops, top_heads, top_sinks) for version in found.versions],
        "tops": tops,
        "topHeads": top_heads,
        "topSinks": top_sinks,
        "threshold": DOUBT_THRESHOLD,
        "first": _first(found),
    }


def _first(found: Inspection) -> dict[str, int] | None:
    """The word the page opens with: the most doubtful one, else the first object, else the first."""
    places = [(v, w, word) for v, version in enumerate(found.versions) for w, word in enumerate(version.words)]
    if not places:
        return None
    version, word, _ = max(places, key=lambda place: (-place[0], place[2].doubt if place[2].doubt is not None else -1))
    return {"version": version, "word": word}


def _version(version: Version, tops: Sequence[float], top_heads: float, top_sinks: float) -> dict[str, Any]:
    every = [_flat(word.heads) for word in version.words]
    mean = [sum(column) / len(column) for column in zip(*every, strict=True)]
    return {
        "words": [
            {
                "text": word.text,
                "name": word.name,
                "say": verdict(word),
                "p": word.probability,
                "p0": word.without_image,
                "hidden": word.image_hidden,
                "context": word.context_hidden,
                "mass": word.mass,
                "asked": word.asked,
                "doubt": word.doubt,
                "maps": [_packed(values, top) for values, top in zip(word.maps, tops, strict=True)],
                "heads": _packed(_flat(word.heads), top_heads),
            }
            for word in version.words
        ],
        "heads": _packed(mean, top_heads),
        "sinks": _packed(version.sinks.received, top_sinks),
    }
