"""Small pieces of HTML and SVG."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence


def text(value: object) -> str:
    """Text that means itself in HTML."""
    return html.escape(str(value))


def table(rows: Sequence[Sequence[str]], *, heads: int = 1, words: Iterable[int] = ()) -> str:
    """A table of plain text.

    Args:
        rows: Cells, the headings first.
        heads: Number of heading rows.
        words: Columns of words, beside the first one; they go to the left.
    """
    left = {0, *(column % len(rows[0]) for column in words)}

    def line(cells: Sequence[str], tag: str) -> str:
        made = (f"<{tag}{' class=word' if i in left else ''}>{text(cell)}</{tag}>" for i, cell in enumerate(cells))
        return f"<tr>{''.join(made)}</tr>"

    head = "".join(line(cells, "th") for cells in rows[:heads])
    body = "".join(line(cells, "td") for cells in rows[heads:])
    return f'<div class="wide"><table><thead>{head}</thead><tbody>{body}</tbody></table></div>'


def line(x1: float, y1: float, x2: float, y2: float, colour: str, opacity: float = 1.0, width: float = 1) -> str:
    """A straight line of an SVG."""
    return (
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" stroke-width="{width}" '
        f'stroke-opacity="{opacity}"/>'
    )


def polyline(points: Iterable[tuple[float, float]], colour: str, *, dashes: str = "", opacity: float = 1.0) -> str:
    """A line through points of an SVG."""
    places = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    dashed = f' stroke-dasharray="{dashes}"' if dashes else ""
    return f'<polyline points="{places}" fill="none" stroke="{colour}" stroke-opacity="{opacity}"{dashed}/>'


def write(x: float, y: float, words: object, *, anchor: str = "start", bold: bool = False) -> str:
    """Text of an SVG; ``y`` is its base line."""
    weight = ' font-weight="600"' if bold else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{weight}>{text(words)}</text>'


def svg(width: float, height: float, marks: Iterable[str], label: str) -> str:
    """A drawing that scales down with the page.

    Args:
        width: In pixels.
        height: In pixels.
        marks: Its elements.
        label: What it shows, for those who cannot see it.
    """
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" width="{width:g}" role="img" aria-label="{text(label)}">'
        f"{''.join(marks)}</svg>"
    )
