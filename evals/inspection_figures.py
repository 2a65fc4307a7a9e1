"""Figures of an inspection's page: the picture under its cells, sinks, heads."""

from __future__ import annotations

import html
from typing import Any

from .inspection import Inspection


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
