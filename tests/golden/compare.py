"""How an output is held against the one on file: figures exactly, without what differs from run to run."""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Mapping
from typing import Any

#: Keys that tell when, where and with what a run was made, not what came out.
PASSING = frozenset(
    "seconds pace command versions python platform threads transformers_version settings_digest image_features "
    "vlmfix_source".split()
)
#: Parameters that may disappear: one mode of VHR without evidence, and the assumed rates of ``vlmfix power``.
DROPPABLE = frozenset(
    "reinforce_noimg --chair-s --chair-i --accuracy --mentions --questions --clustering --question-clustering "
    "--correlation".split()
)
#: Figures that are a sum in float32, whose last digits depend on the order of summation.
SUMMED = re.compile(r"\b(bias|score|scores|statistics|ranking|values)\b")
FIGURE = re.compile(r"(?<![\w.])[-+]?\d+\.\d+(?!\w|\.\d)")


def normalised(value: Any, roots: Mapping[str, str]) -> Any:
    """Without passing keys, and with folders by name.

    Args:
        value: From JSON.
        roots: Folder to the name that stands for it.
    """
    if isinstance(value, dict):
        return {k: normalised(v, roots) for k, v in value.items() if k not in PASSING | DROPPABLE}
    if isinstance(value, (list, tuple)):
        return [normalised(v, roots) for v in value]
    if isinstance(value, str):
        for root, name in roots.items():
            value = value.replace(root, name)
    return value


def figures(text: str) -> list[str]:
    """Every number with a decimal point, in order; versions are none."""
    return FIGURE.findall(text)


def lasting_figures(markdown: str) -> list[str]:
    """The figures in the tables of a report, without the columns that depend on time."""
    found: list[str] = []
    columns: list[str] = []
    for line in markdown.splitlines():
        if not line.startswith("|"):
            columns = []
            continue
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        columns = columns or cells
        for column, cell in zip(columns, cells, strict=True):
            if not re.search("second|quartile|front|dominated", column):
                found += figures(cell)
    return found


def visible_text(page: str) -> str:
    """What a page says, drawings aside."""
    page = re.sub(r"<(style|script|svg)\b.*?</\1>", " ", page, flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", page)).split())


def differences(expected: Any, found: Any, place: str = "") -> list[str]:
    """One line per expected value that is gone or changed; what is new in an object is no difference."""
    if isinstance(expected, dict) and isinstance(found, dict):
        lines = [f"{place}.{key} is gone" for key in expected if key not in found and key not in DROPPABLE]
        for key in expected.keys() & found.keys():
            lines += differences(expected[key], found[key], f"{place}.{key}")
        return sorted(lines)
    if isinstance(expected, list) and isinstance(found, list):
        if len(expected) != len(found):
            return [f"{place} has {len(found)} entries, not {len(expected)}"]
        pairs = enumerate(zip(expected, found, strict=True))
        return [line for i, (a, b) in pairs for line in differences(a, b, f"{place}[{i}]")]
    if type(expected) in (int, float) and type(found) in (int, float) and isinstance(expected + found, float):
        rel, margin = (2e-5, 2e-5) if SUMMED.search(place) else (1e-9, 1e-12)
        same = math.isclose(expected, found, rel_tol=rel, abs_tol=margin)
    else:
        same = expected == found and isinstance(expected, bool) == isinstance(found, bool)
    return [] if same else [f"{place} is {found!r}, not {expected!r}"]


def dumps(value: Any, indent: str = "") -> str:
    """JSON with what is short in one line, so that a changed figure is a short diff."""
    line = json.dumps(value, ensure_ascii=False)
    if len(line) + len(indent) <= 118 or not isinstance(value, (dict, list)):
        return line
    inner = indent + " "
    if isinstance(value, dict):
        parts = [f"{json.dumps(key, ensure_ascii=False)}: {dumps(each, inner)}" for key, each in value.items()]
    else:
        parts = [dumps(each, inner) for each in value]
    lines = [parts[0]]
    for part in parts[1:]:
        joined = f"{lines[-1]}, {part}"
        if len(inner) + len(joined) <= 118 and "\n" not in joined:
            lines[-1] = joined
        else:
            lines.append(part)
    left, right = "{}" if isinstance(value, dict) else "[]"
    return f"{left}\n{inner}" + f",\n{inner}".join(lines) + f"\n{indent}{right}"
