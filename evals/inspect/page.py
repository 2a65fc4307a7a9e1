"""The page of ``vlmfix inspect``: one HTML file, nothing fetched, to be looked at."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from vlmfix.probes.evidence import DOUBT_THRESHOLD

from .look import Inspection, Version, Word
from .words import GROUPS


def escaped(value: object) -> str:
    """Escape a value for HTML."""
    return html.escape(str(value))


def percent(value: float | None, digits: int = 0) -> str:
    """Write a share in percent; a dash for none."""
    return "–" if value is None else f"{100 * value:.{digits}f} %"


def picture(found: Inspection, tokens: int, kind: str) -> str:
    """The picture with a cell for every image token; where they fill no single grid, a strip of them below it."""
    image = f'<img alt="{escaped(found.title)}" src="{found.picture}">'
    if found.grid is None:
        cells = "".join(_cell(index, 0, f"image token {index}") for index in range(tokens))
        strip = f'<svg viewBox="0 0 {tokens} 1" preserveAspectRatio="none">{cells}</svg>'
        return (
            f'<div class="picture">{image}</div><div class="strip {kind}">{strip}</div>'
            "<p><small>The image's tokens come from several tiles or views: shown in their order, not in place."
            "</small></p>"
        )
    rows, columns = found.grid
    cells = "".join(
        _cell(index % columns, index // columns, f"row {index // columns + 1}, column {index % columns + 1}")
        for index in range(rows * columns)
    )
    svg = f'<svg viewBox="0 0 {columns} {rows}" preserveAspectRatio="none">{cells}</svg>'
    return f'<div class="picture {kind}">{image}{svg}</div>'


def _cell(x: int, y: int, label: str) -> str:
    return (
        f'<rect x="{x}" y="{y}" width="1" height="1" fill-opacity="0" data-at="{label}"><title>{label}</title></rect>'
    )


def sinks_section(found: Inspection, data: dict[str, Any]) -> str:
    """The section on sinks: what every token of the prompt receives."""
    parts = []
    for number, version in enumerate(found.versions):
        sinks = version.sinks
        rows = "".join(
            f"<tr><td>{escaped(text)}</td><td>{place}</td><td>{'image' if image else 'text'}</td>"
            f"<td>{percent(received, 1)}</td><td>{attention}</td><td>{hidden}</td></tr>"
            for text, place, image, received, attention, hidden in sinks.rows
        )
        counts = ", ".join(f"{sum(layers)} {kind}" for kind, layers in sinks.counts.items() if sum(layers))
        dims = (
            f"Hidden dimensions that mark sinks: {', '.join(map(str, sinks.sink_dims))}."
            if sinks.sink_dims
            else "No hidden dimension marks sinks in this model."
        )
        parts.append(
            f'<div class="card"><h3>{escaped(version.label)}</h3><div class="sinks" data-version="{number}">'
            f"{picture(found, len(sinks.received), '')}</div><p><small>{dims} Over all layers: {counts or 'no sinks'}."
            '</small></p><div class="wide"><table><thead><tr><th>token</th><th>place</th><th></th><th>received</th>'
            "<th>attention<br>sink in</th><th>hidden-state<br>sink in</th></tr></thead>"
            f"<tbody>{rows}</tbody></table></div></div>"
        )
    return (
        "<h2>Sinks</h2><p>The attention that each token of the prompt receives, mean over the rows that see it, layers "
        "and heads; below, the tokens that receive most, with the number of layers in which they are sinks.</p>"
        f'<div class="tools"><span class="legend">0 <i class="ramp-warm"></i> {percent(data["topSinks"], 2)} of the '
        f'attention of a row, per cell</span></div><div class="versions">{"".join(parts)}</div>'
    )


def heads_section(found: Inspection, data: dict[str, Any]) -> str:
    """The section on heads: a map of layers and heads, which follows the chosen word."""
    parts = []
    for number, version in enumerate(found.versions):
        if not version.words:
            continue
        layers, heads = len(version.layers), len(version.selected[0])
        size = 26 if heads <= 16 else 14
        cells = []
        for row, layer in enumerate(version.layers):
            y = (layers - 1 - row) * size
            cells.append(f'<text x="{38}" y="{y + size * 0.68:.0f}" text-anchor="end">{layer}</text>')
        for row, layer in enumerate(version.layers):
            y = (layers - 1 - row) * size
            for head in range(heads):
                chosen = ' class="chosen"' if version.selected[row][head] else ""
                label = f"layer {layer}, head {head}"
                cells.append(
                    f'<rect{chosen} x="{44 + head * size}" y="{y + 1}" width="{size - 2}" height="{size - 2}" rx="2" '
                    f'data-at="{label}"><title>{label}</title></rect>'
                )
        width, height = 50 + heads * size, layers * size + 30
        cells.append(f'<text x="{44 + heads * size / 2}" y="{height - 8}" text-anchor="middle">head</text>')
        cells.append(
            f'<text transform="translate(12 {layers * size / 2}) rotate(-90)" text-anchor="middle">layer</text>'
        )
        parts.append(
            f'<div class="card heads" data-version="{number}"><h3>{escaped(version.label)}</h3><p class="soft"></p>'
            f'<svg viewBox="0 0 {width} {height}" style="max-width:{1.4 * width:.0f}px">{"".join(cells)}</svg></div>'
        )
    return (
        "<h2>Heads that depend on the image</h2><p>How far each head's output moves at the chosen word when the image "
        "is taken away (VHD). Framed: the heads that VHR would choose at the end of the prompt.</p>"
        f'<div class="tools"><span class="legend">0 <i class="ramp-cool"></i> {data["topHeads"]:.1f}</span></div>'
        f'<div class="versions">{"".join(parts)}</div>'
    )


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


_HERE = Path(__file__).parent


def inspection_page(found: Inspection) -> str:
    """Write the page of an inspection.

    Args:
        found: What was looked at.

    Returns:
        HTML without any reference to another file.
    """
    data = _data(found)
    script = json.dumps(data, allow_nan=False, ensure_ascii=False).replace("<", "\\u003c")
    parts = [
        '<p class="over">vlmfix inspect</p>',
        f"<h1>{escaped(found.title)}</h1>",
        f'<p class="prompt">{escaped(found.prompt)}</p>',
        "".join(f'<p class="summary">{escaped(line)}</p>' for line in summary(found)),
        _looks(found, data),
        _table(found),
        sinks_section(found, data),
        heads_section(found, data),
        _NOTES,
        "<footer>" + "".join(f"<p><small>{escaped(fact)}</small></p>" for fact in found.facts) + "</footer>",
    ]
    style = (_HERE / "inspection.css").read_text(encoding="utf-8")
    code = (_HERE / "inspection.js").read_text(encoding="utf-8")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f"<title>{escaped('vlmfix inspect: ' + found.title)}</title>"
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{style}</style></head>'
        f"<body><main>{''.join(parts)}</main>"
        f'<script type="application/json" id="data">{script}</script><script>{code}</script></body></html>\n'
    )


_NOTES = f"""<h2>What a flag says, and what it does not</h2>
<p>Object words (of CHAIR's COCO vocabulary; other words are never flagged) get a doubt between 0 and 1:
<em>(1 − p·q) · (1 + min(1, p₀/p)) / 2</em>, with p the probability of the word where it was said, q the probability of
yes when the same model is asked for the object, and p₀ the probability of the word after the same words without the
image. From {DOUBT_THRESHOLD} on a word is flagged; that was chosen on calibration scenes of the embedded model,
and holds for no other model until somebody measures it there.</p>
<ul>
<li>It is no probability that the object is absent. On the embedded model's held-out scenes 56 % of the flags fall on
objects that are really absent, and 64 % of the absent ones are flagged.</li>
<li>An object that is there and usually stands in such a place is doubtful too; one that was misread with confidence is
not.</li>
<li>Little attention to the image is shown, and not used: on the embedded model it hardly tells invented objects from
others. Attention is where a row reads, not why a word was chosen.</li>
<li>“Context hidden” asks what carries the word: the objects (and the place) named before it are hidden from everything
behind them. Words that are right may rest on them too.</li>
</ul>"""


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


def _looks(found: Inspection, data: dict[str, Any]) -> str:
    groups = "".join(
        f'<button type="button" aria-pressed="{"true" if i == 0 else "false"}">{escaped(name)}</button>'
        for i, name in enumerate(GROUPS)
    )
    alone = ' class="alone"' if len(found.versions) == 1 else ""
    known = ""
    if found.objects is not None:
        known = f"<p><small>In the picture: {escaped(', '.join(found.objects) or 'nothing')}.</small></p>"
    key = (
        '<span><span class="word flagged object">flagged</span> likely invented</span>'
        '<span><span class="word object absent">absent</span> named, and not in the picture</span>'
        '<span><span class="word object present">present</span> named, and in the picture</span>'
        if found.objects is not None
        else '<span><span class="word flagged object">flagged</span> likely invented</span>'
        '<span><span class="word object">object</span> an object word</span>'
    )
    return (
        "<h2>Where each word looks</h2>"
        "<p>Choose a word, with the mouse or the arrow keys: the cells show how much the row that predicts it attends "
        "to each part of the picture, mean over heads. One scale for all words.</p>"
        f'<div class="tools"><span class="segments" id="groups">{groups}</span>'
        f'<span class="legend">0 <i class="ramp-warm"></i> <span id="top">{percent(data["tops"][0], 1)}</span> '
        'of the attention, per cell</span><label><input type="checkbox" id="colour"> picture in colour</label></div>'
        f'<p class="key">{key}</p>'
        f'<div{alone}><div class="versions">'
        + "".join(_answer(number, version, found) for number, version in enumerate(found.versions))
        + "</div>"
        + '<div class="panels">'
        + "".join(f'<div class="card panel" data-version="{number}"></div>' for number in range(len(found.versions)))
        + "</div></div>"
        + known
        + "<noscript><p>Maps need JavaScript; the table below does not.</p></noscript>"
    )


def _answer(number: int, version: Version, found: Inspection) -> str:
    note = f'<p class="soft">{escaped(version.note)}</p>' if version.note else ""
    words = " ".join(_button(number, index, word) for index, word in enumerate(version.words))
    tokens = len(version.sinks.received)
    return (
        f'<div class="card version" data-version="{number}"><h3>{escaped(version.label)}</h3>'
        f'{picture(found, tokens, "map")}<p class="looks"></p>'
        f'<p class="caption">{words or "(no words)"}</p>{note}</div>'
    )


def _button(version: int, index: int, word: Word) -> str:
    kinds = ["word"]
    if word.name is not None:
        kinds += ["object", *(["present" if word.present else "absent"] if word.present is not None else [])]
    if word.flagged:
        kinds.append("flagged")
    return (
        f'<button type="button" class="{" ".join(kinds)}" data-version="{version}" data-word="{index}" '
        f'aria-pressed="false" title="{escaped(verdict(word))}">{escaped(word.text)}</button>'
    )


def _table(found: Inspection) -> str:
    head = (
        "<th>word</th><th>doubt</th><th>as said</th><th>without<br>image</th><th>image<br>hidden</th>"
        "<th>context<br>hidden</th><th>yes if<br>asked</th><th>looks at<br>image</th>"
        + ("<th>in the<br>picture</th>" if found.objects is not None else "")
        + '<th style="text-align:left">in words</th>'
    )
    body = []
    for version in found.versions:
        words = [word for word in version.words if word.name is not None]
        if len(found.versions) > 1:
            body.append(f'<tr class="group"><th colspan="10">{escaped(version.label)}</th></tr>')
        body += [_row(word, found) for word in sorted(words, key=lambda word: -(word.doubt or 0))]
        if not words:
            body.append('<tr><td colspan="10">no word that CHAIR\'s vocabulary knows</td></tr>')
    return (
        "<h2>The objects named, most doubtful first</h2>"
        f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'
    )


def _row(word: Word, found: Inspection) -> str:
    shown = word.name if word.name and word.name.split()[0] in word.text.lower() else f"{word.text} ({word.name})"
    cells = [
        f"{word.doubt:.2f}" if word.doubt is not None else "–",
        *map(percent, (word.probability, word.without_image, word.image_hidden, word.context_hidden)),
        percent(word.asked),
        percent(word.mass),
    ]
    if found.objects is not None:
        cells.append("yes" if word.present else "no")
    return (
        f'<tr class="{"flagged" if word.flagged else ""}"><td>{escaped(shown)}</td>'
        + "".join(f"<td>{cell}</td>" for cell in cells)
        + f'<td class="say">{escaped(verdict(word))}</td></tr>'
    )
