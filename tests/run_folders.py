"""What an evaluation wrote into its folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read(folder: Path) -> dict[str, Any]:
    results: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return results


def timeless(value: Any) -> Any:
    """Without wall times and without the command, which names the folder."""
    if isinstance(value, dict):
        return {k: timeless(v) for k, v in value.items() if k not in ("seconds", "pace", "command")}
    return [timeless(v) for v in value] if isinstance(value, list) else value
