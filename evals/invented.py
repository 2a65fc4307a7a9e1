"""Which objects captions invent, by category, read off ``results.json``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any


def categories(results: Mapping[str, Any], most: int) -> tuple[list[str], dict[str, dict[str, int]]]:
    """Captions that invent an object, per category, of the baseline and of every method (controls aside).

    Args:
        results: The content of ``results.json``.
        most: Categories to name, those invented most often over all rows.

    Returns:
        The categories, most frequent first, and label -> category -> captions; both empty where nothing was invented
        or the run did not count it.
    """
    counts = {
        row["label"]: dict(row["chair"]["invented"])
        for row in results["methods"]
        if row["role"] != "control" and "invented" in row.get("chair", {})
    }
    total: Counter[str] = Counter()
    for found in counts.values():
        total.update(found)
    names = [name for name, _ in sorted(total.items(), key=lambda item: (-item[1], item[0]))[:most]]
    return names, counts if names else {}
