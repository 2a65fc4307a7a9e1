"""A new method is one file, one naive formula and one line of README; ``scripts/new_method.py`` starts all three."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from families.tiny_llava import IMAGE, PAD, RAGGED, collate, generate
from naive.reference import Reference

import vlmfix

ROOT = Path(__file__).resolve().parents[3]


def load(path: Path, name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for folder in ("vlmfix/methods", "tests/naive"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "README.md").write_text((ROOT / "README.md").read_text(encoding="utf-8"), encoding="utf-8")
    return tmp_path


@pytest.fixture
def new_method(root: Path) -> Any:
    main = load(ROOT / "scripts" / "new_method.py", "new_method").main
    return lambda *arguments: main([*arguments, "--root", str(root)])


@pytest.mark.parametrize("place", ["scores", "weights", "heads", "blocks"])
def test_what_is_written_works_and_agrees_with_its_formula(build: Any, root: Path, new_method: Any, place: str) -> None:
    new_method("my_method", "--place", place)
    method = load(root / "vlmfix/methods/my_method.py", f"my_{place}").MyMethod
    ((parameters, formula),) = load(root / "tests/naive/my_method.py", f"naive_{place}").CASES
    model = build()
    stock = generate(model, collate(RAGGED), 3)[1]
    reference = Reference(model, naive=[formula])
    vlmfix.patch(model, method(**parameters))
    _, logits = generate(model, collate(RAGGED), 3)
    for row, each in enumerate(RAGGED):
        _, expected = reference.generate(each.ids, each.pixels, 3, [PAD, IMAGE])
        torch.testing.assert_close(logits[row], expected, atol=1e-5, rtol=1e-5)
    assert (logits - stock)[0].abs().max() > 0.01
    vlmfix.patch(model, method(strength=0.0))
    assert torch.equal(generate(model, collate(RAGGED), 3)[1], stock)
    before = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    added = [line for line in (root / "README.md").read_text(encoding="utf-8").splitlines() if line not in before]
    assert len(added) == 1
    assert added[0].startswith("| `my_method` |")


def test_nothing_is_overwritten(root: Path, new_method: Any) -> None:
    new_method("my_method")
    readme = (root / "README.md").read_text(encoding="utf-8")
    with pytest.raises(SystemExit, match="exists"):
        new_method("my_method", "--place", "heads")
    assert (root / "README.md").read_text(encoding="utf-8") == readme
    with pytest.raises(SystemExit, match="lower case"):
        new_method("MyMethod")
