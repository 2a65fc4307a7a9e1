"""How figures, differences and tables are spelled, in a terminal and in Markdown."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def number(value: float | None, *, percent: bool = True) -> str:
    """A figure with one decimal, fractions as percent; a dash where it is undefined."""
    if value is None or math.isnan(value):
        return "-"
    return f"{100 * value if percent else value:.1f}"


def signed(value: float | None, *, percent: bool = True) -> str:
    """A difference with one decimal and its sign."""
    text = number(value, percent=percent)
    if text in ("-", "0.0", "-0.0"):
        return text.removeprefix("-") or "-"
    return text if text.startswith("-") else f"+{text}"


def excludes_zero(interval: Mapping[str, Any]) -> bool:
    """Whether an interval lies on one side of zero."""
    low, high = interval["low"], interval["high"]
    return low is not None and high is not None and (low > 0 or high < 0)


def difference_cell(difference: Mapping[str, Any] | None, *, percent: bool = True) -> str:
    """A difference with its star: ``*`` if the interval excludes zero, ``(*)`` if no longer after the correction."""
    if difference is None:
        return ""
    star = ""
    if excludes_zero(difference):
        star = "*" if survives(difference) else "(*)"
    return signed(difference["estimate"], percent=percent) + star


def interval_cell(difference: Mapping[str, Any] | None, *, percent: bool = True) -> str:
    """The two ends of a difference's interval."""
    if difference is None:
        return ""
    return ",".join(signed(difference[end], percent=percent) for end in ("low", "high"))


def survives(difference: Mapping[str, Any], *, alpha: float = 0.05) -> bool:
    """Whether the p-value corrected for several comparisons is below alpha; without a correction nothing is lost."""
    corrected = difference.get("p_holm")
    return corrected is None or corrected < alpha


def p_cell(p_value: float | None) -> str:
    """A p-value with three decimals; a dash where there was no test."""
    if p_value is None:
        return "-"
    return "<0.001" if p_value < 0.001 else f"{p_value:.3f}"


def plain_table(rows: Sequence[Sequence[str]], *, gap: int = 2) -> str:
    """Aligned plain text: first column to the left, the others to the right; trailing blanks removed."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        (
            row[0].ljust(widths[0])
            + "".join(" " * gap + cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))
        ).rstrip()
        for row in rows
    )


def fitting_table(rows: Sequence[Sequence[str]], width: int) -> str:
    """:func:`plain_table`, with narrow gaps if it is too wide otherwise."""
    table = plain_table(rows)
    return table if max(map(len, table.split("\n"))) <= width else plain_table(rows, gap=1)


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, numbers to the right."""
    rule = ["---", *["--:"] * (len(rows[0]) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in [rows[0], rule, *rows[1:]])


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
