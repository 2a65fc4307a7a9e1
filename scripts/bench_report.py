"""How ``scripts/bench.py`` prints what it measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

TITLES = {"prefill": "prefill", "decode": "decode", "end_to_end": "whole answer"}


def ratio_text(quartiles: Sequence[float]) -> str:
    """Write a median with its quartiles."""
    low, middle, high = quartiles
    return f"{middle:.3f} [{low:.3f}, {high:.3f}]"


def table(setting: Mapping[str, Any]) -> str:
    """Write one setting as text: milliseconds, ratios by the wall clock, and by the processor's in short."""
    lines = [setting["title"]]
    head = f"{'':22}"
    for title in TITLES.values():
        head += f"{title + ' ms':>15}{'ratio [quartiles]':>22}{'cpu':>7}"
    lines.append(head + f"{'peak MiB':>10}{'ratio':>7}{'edited':>10}")
    for name, row in setting["variants"].items():
        line = f"{name:22}"
        for part in TITLES:
            line += f"{1000 * row[part]['wall_seconds']:15.2f}{ratio_text(row[part]['wall_ratio']):>22}"
            line += f"{row[part]['cpu_ratio'][1]:7.3f}"
        if "peak_bytes" in row:
            line += f"{row['peak_bytes'] / 2**20:10.0f}{row['memory_ratio']:7.3f}"
        else:
            line += " " * 17
        lines.append(line + ("" if row["edited"] is None else f"{row['edited']:10d}"))
    bound = setting["bound"]
    lines.append(
        f"  decode: {bound['tokens_per_second']:.1f} tokens/s unpatched; a bandwidth of "
        f"{bound['bandwidth'] / 1e9:.0f} GB/s (measured by copying) allows {bound['bound_tokens_per_second']:.1f}"
    )
    return "\n".join(lines)


def curve_table(curve: Mapping[str, Any]) -> str:
    """Write the memory curve: MiB beyond the stock model."""
    lines = [curve["title"], f"{'MiB, by tokens':22}" + "".join(f"{number:>10}" for number in curve["tokens"])]
    for name, extra in curve["extra_bytes"].items():
        lines.append(f"{name:22}" + "".join(f"{value / 2**20:>10.1f}" for value in extra))
    return "\n".join(lines)


def markdown(setting: Mapping[str, Any], clock: str = "wall") -> str:
    """Write one setting for the README, by the clock on the ``wall`` or the processor's (``cpu``)."""
    has_memory = any("peak_bytes" in row for row in setting["variants"].values())
    lines = [f"{setting['title']}, {setting['rounds']} rounds, answers of {setting['new_tokens']} tokens:\n"]
    lines.append("| | prefill | decode, per token | whole answer |" + (" peak memory |" if has_memory else ""))
    lines.append("|---|--:|--:|--:|" + ("--:|" if has_memory else ""))
    return "\n".join(lines + [_markdown_row(name, row, has_memory, clock) for name, row in setting["variants"].items()])


def curve_markdown(curve: Mapping[str, Any]) -> str:
    """Write the memory curve for the README."""
    lines = [f"{curve['title']}:\n", "| tokens | " + " | ".join(map(str, curve["tokens"])) + " |"]
    lines.append("|---|" + "--:|" * len(curve["tokens"]))
    for name, extra in curve["extra_bytes"].items():
        lines.append(f"| {_code(name)} | " + " | ".join(f"{value / 2**20:.1f} MiB" for value in extra) + " |")
    return "\n".join(lines)


def _markdown_row(name: str, row: Mapping[str, Any], has_memory: bool, clock: str) -> str:
    cells = []
    for part in TITLES:
        low, middle, high = row[part][f"{clock}_ratio"]
        if name == "unpatched":
            seconds = row[part][f"{clock}_seconds"]
            cells.append(f"{seconds:.2f} s" if seconds >= 10 else f"{1000 * seconds:.{0 if seconds > 1 else 1}f} ms")
        else:
            cells.append(f"{middle:.2f} [{low:.2f}, {high:.2f}]")
    if has_memory:
        unpatched = f"{row['peak_bytes'] / 2**20:.0f} MiB" if "peak_bytes" in row else ""
        cells.append(
            unpatched if name == "unpatched" else f"{row['memory_ratio']:.3f}" if "memory_ratio" in row else ""
        )
    return f"| {_code(name)} | " + " | ".join(cells) + " |"


def _code(name: str) -> str:
    plain = {"unpatched": "unpatched (SDPA)", "eager": "unpatched (eager)"}
    if name in plain:
        return plain[name]
    if name.startswith("released "):
        return f"`{name.removeprefix('released ')}` as released"
    return " + ".join(f"`{part}`" for part in name.split(" + "))
