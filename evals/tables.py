"""How figures, differences and tables are spelled, the same in a terminal, in Markdown and in a page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
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


def survives(difference: Mapping[str, Any], *, alpha: float = 0.05) -> bool:
    """Whether the p-value corrected for several comparisons is below alpha; without a correction nothing is lost."""
    corrected = difference.get("p_holm")
    return corrected is None or corrected < alpha


def is_certain(difference: Mapping[str, Any] | None) -> bool:
    """Whether there is a difference, its interval excludes zero, and the correction leaves it."""
    return difference is not None and excludes_zero(difference) and survives(difference)


def difference_cell(difference: Mapping[str, Any] | None, *, percent: bool = True) -> str:
    """A difference with its star: ``*`` if the interval excludes zero, ``(*)`` if no longer after the correction."""
    if difference is None:
        return ""
    star = ""
    if excludes_zero(difference):
        star = "*" if survives(difference) else "(*)"
    return signed(difference["estimate"], percent=percent) + star


def interval_cell(difference: Mapping[str, Any] | None, *, percent: bool = True) -> str:
    """The two ends of a difference's interval; no end is shown as zero where the interval excludes it."""
    if difference is None:
        return ""
    starred = excludes_zero(difference)
    return ",".join(_end(difference[end], percent=percent, starred=starred) for end in ("low", "high"))


def _end(value: float | None, *, percent: bool, starred: bool) -> str:
    text = signed(value, percent=percent)
    if starred and text == "0.0" and value:  # One significant digit: +0.04, not 0.0 beside a star.
        scaled = 100 * value if percent else value
        return f"{scaled:+.{-math.floor(math.log10(abs(scaled)))}f}"
    return text


def p_cell(p_value: float | None) -> str:
    """A p-value with three decimals; a dash where there was no test."""
    if p_value is None:
        return "-"
    return "<0.001" if p_value < 0.001 else f"{p_value:.3f}"


@dataclass(frozen=True)
class Table:
    """A table of text.

    Attributes:
        rows: Cells, the headings first.
        title: What it shows.
        words: Columns of words, which are aligned to the left, as the first one is; negative ones count from the end.
        groups: Titles above several columns, with the number of columns of each; all columns, or none.
        notes: How to read it, a paragraph each.
        is_detail: Whether it is left out of the terminal and folded in a page.
    """

    rows: Sequence[Sequence[str]]
    title: str = ""
    words: tuple[int, ...] = ()
    groups: tuple[tuple[str, int], ...] = ()
    notes: tuple[str, ...] = ()
    is_detail: bool = False

    @property
    def left(self) -> set[int]:
        """The columns that are aligned to the left."""
        return {0, *(column % len(self.rows[0]) for column in self.words)}

    @property
    def headings(self) -> list[str]:
        """A heading per column that needs none above it: ``at equal words: CHAIR_i``."""
        above = [title for title, span in self.groups for _ in range(span)] or [""] * len(self.rows[0])
        return [f"{group}: {name}" if group else name for group, name in zip(above, self.rows[0], strict=True)]

    def plain(self, width: int | None = None) -> str:
        """Aligned text without trailing blanks, with narrow gaps where it is wider than ``width`` otherwise."""
        widths = [max(map(len, column)) for column in zip(*self.rows, strict=True)]
        starts = list(accumulate((span for _, span in self.groups), initial=0))
        for (title, _), (first, last) in zip(self.groups[:-1], pairwise(starts), strict=False):
            widths[first] += max(0, len(title) - sum(widths[first:last]))
        gap = 2 if width is None or sum(widths) + 2 * (len(widths) - 1) <= width else 1
        above = ""
        for (title, _), first in zip(self.groups, starts, strict=False):
            above = above.ljust(sum(widths[:first]) + gap * first) + title.rjust(widths[first])
        lines = [
            (" " * gap).join(
                cell.ljust(size) if i in self.left else cell.rjust(size)
                for i, (cell, size) in enumerate(zip(row, widths, strict=True))
            )
            for row in self.rows
        ]
        return "\n".join(line.rstrip() for line in ([above] if self.groups else []) + lines)

    def markdown(self) -> str:
        """A Markdown table, words to the left and numbers to the right."""
        rule = ["---" if i in self.left else "--:" for i in range(len(self.rows[0]))]
        return "\n".join("| " + " | ".join(row) + " |" for row in [self.headings, rule, *self.rows[1:]])


def plain_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of text as an aligned table, the headings first."""
    return Table(rows).plain()
