"""What a calibration returns: a method and how it came about."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlmfix.methods.base import Method


@dataclass(frozen=True, eq=False)
class Calibration:
    """A calibrated method, ready for ``vlmfix.patch(model, calibration)`` and ``vlmfix.save_recipe``.

    Attributes:
        method: The method, with what was learned in its parameters.
        provenance: JSON-ready: model, samples, counts, options, versions, and the scores the choice rests on
            (``scores[name][i][head]`` belongs to layer ``layers[i]``).
    """

    method: Method
    provenance: dict[str, Any] = field(repr=False)

    def save(self, path: str | Path) -> None:
        """Write a recipe file with the provenance beside the method; ``patch`` and ``load_recipe`` read it."""
        data = {"methods": [self.method.to_dict()], "calibration": self.provenance}
        text = json.dumps(data, indent=1, allow_nan=False)
        # Innermost lists on one line: a newline is never part of a JSON string.
        text = re.sub(r"\[\n[^\[\]{}]*\]", lambda found: re.sub(r"\n *", " ", found[0]), text)
        Path(path).write_text(text + "\n", encoding="utf-8")


def plain(value: Any) -> Any:
    """Return a value as JSON has it: tensors as lists, numbers to 6 digits, ``None`` for what is not finite."""
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, dict):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(each) for each in (sorted(value) if isinstance(value, (set, frozenset)) else value)]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)
