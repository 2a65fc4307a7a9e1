"""How figures, differences and tables are spelled, in a terminal and in Markdown."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
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


def finite(summary: Mapping[str, float]) -> dict[str, float | None]:
    """A summary for JSON, which has no NaN: undefined figures become null."""
    return {name: None if math.isnan(value) else value for name, value in summary.items()}


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
