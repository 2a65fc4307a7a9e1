"""What README shows works as shown."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from models import RAGGED, collate, forward

import vlmfix

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def half_heads() -> Any:
    (source,) = re.findall(r"```python\n(@dataclass.*?)```", README, re.DOTALL)
    names: dict[str, Any] = {"dataclass": dataclass, "ClassVar": ClassVar, "Method": vlmfix.Method}
    exec(source, names)
    return names["HalfHeads"]


def test_the_method_in_the_readme_runs(tiny: Any) -> None:
    stock = forward(tiny, collate([RAGGED[0]])).logits
    vlmfix.patch(tiny, half_heads()())
    assert (forward(tiny, collate([RAGGED[0]])).logits - stock).abs().max() > 0.01
    vlmfix.patch(tiny, half_heads()(strength=1.0))
    assert torch.equal(forward(tiny, collate([RAGGED[0]])).logits, stock)
    with pytest.raises(vlmfix.MethodError, match="strength"):
        half_heads()(strength="much")


def test_files_the_readme_names_exist() -> None:
    root = Path(__file__).parent.parent
    for name in re.findall(r"(?:scripts|evals|vlmfix|tests)/[\w./]+\w", README):
        assert (root / name).exists() or "my_method" in name, name


def test_the_methods_table_is_complete() -> None:
    listed = set(re.findall(r"^\| `(\w+)` \|", README, re.MULTILINE))
    assert set(vlmfix.methods()) <= listed
