"""In which settings two runs differ; comparing runs needs no model, so nothing of it is imported here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def differing_settings(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return one line per setting in which two runs differ, nested names joined by dots."""
    return [
        f"{name}: {_clip(old_value)} in the folder, {_clip(new_value)} now"
        for name, old_value, new_value in setting_differences(old, new)
    ]


def setting_differences(old: Any, new: Any, name: str = "") -> Iterable[tuple[str, Any, Any]]:
    """Yield dotted name, old and new value of every setting in which two runs differ; ``"nothing"`` for none."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in sorted({*old, *new}):
            yield from setting_differences(
                old.get(key, "nothing"), new.get(key, "nothing"), f"{name}.{key}" if name else key
            )
    elif _is_list(old) and _is_list(new) and len(old) == len(new):
        for index, (a, b) in enumerate(zip(old, new, strict=True)):
            yield from setting_differences(a, b, f"{name}[{index}]")
    elif old != new:
        yield name, old, new


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _clip(value: Any) -> str:
    text = f"{len(value)} entries" if _is_list(value) and len(value) > 4 else str(value)
    return text if len(text) <= 80 else text[:77] + "..."
