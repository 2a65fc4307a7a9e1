"""What an evaluation wrote into its folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read(folder: Path) -> dict[str, Any]:
    results: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return results


def answers_of(folder: Path) -> dict[str, dict[str, Any]]:
    """Every answer of a run by its key, each once, without its time."""
    rows = [json.loads(line) for line in (folder / "answers.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len({row["key"] for row in rows}) == len(rows), "no answer twice"
    return {row["key"]: {name: value for name, value in row.items() if name != "seconds"} for row in rows}


def timeless(value: Any) -> Any:
    """Without wall times and without the command, which names the folder."""
    if isinstance(value, dict):
        return {k: timeless(v) for k, v in value.items() if k not in ("seconds", "pace", "command")}
    return [timeless(v) for v in value] if isinstance(value, list) else value
