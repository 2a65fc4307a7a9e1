"""What the figures of an inspection say, in words."""

from __future__ import annotations

from .inspection import Inspection, Word

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
        return f"Without the image {_percent(word.without_image)} instead of {_percent(p)}."
    parts = ["Flagged." if word.flagged else "Not flagged."]
    if by_itself:
        parts.append(f"The words alone predict it as well: {_percent(word.without_image)} without the image.")
    elif word.without_image < GONE * p:
        parts.append(f"The image carries it: {_percent(word.without_image)} without it instead of {_percent(p)}.")
    else:
        parts.append(f"The words alone predict it with {_percent(word.without_image)}, with the image {_percent(p)}.")
    if by_itself and word.image_hidden * SAME > p:
        parts.append(f"Hiding the image even raises it: {_percent(word.image_hidden)}.")
    elif by_itself and blind:
        parts.append("Hiding the image hardly changes it.")
    if by_itself and context is not None and context < GONE * p:
        parts.append(f"Hiding what was named before takes it away: {_percent(context)}.")
    if word.asked is not None and word.asked < 0.5:
        parts.append(f"Asked for it, the model says no ({_percent(word.asked)} yes).")
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


def _percent(value: float) -> str:
    return f"{100 * value:.0f} %"
