"""A new method is one file, one naive formula and two lines; ``scripts/new_method.py`` starts them."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from families.tiny_llava import IMAGE, PAD, RAGGED, collate, generate
from naive.reference import Reference

import vlmfix

ROOT = Path(__file__).resolve().parents[3]


LISTS = {
    "vlmfix/methods/README.md": "| `my_method` |",
    "vlmfix/__init__.pyi": "from vlmfix.methods.my_method import MyMethod as MyMethod",
}
"""The files in which a method has a line."""


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
    for file in LISTS:
        (tmp_path / file).write_text((ROOT / file).read_text(encoding="utf-8"), encoding="utf-8")
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
    for file, line in LISTS.items():
        before = (ROOT / file).read_text(encoding="utf-8").splitlines()
        (added,) = (each for each in (root / file).read_text(encoding="utf-8").splitlines() if each not in before)
        assert added.startswith(line)


def test_two_files_of_the_package_say_what_a_method_needs(root: Path, new_method: Any) -> None:
    new_method("my_method", "--place", "weights")
    text = (root / "vlmfix/methods/my_method.py").read_text(encoding="utf-8")
    read = re.findall(r"^from vlmfix\.methods\.(\w+) import", text, re.MULTILINE)
    assert read == ["base", "parameters", "views"]  # the contract, its parameters, what a method is shown


def test_a_new_file_is_a_new_name(root: Path, new_method: Any) -> None:
    new_method("my_method")
    shutil.copytree(ROOT / "vlmfix", root / "copy" / "vlmfix")
    for file in ("methods/my_method.py", "__init__.pyi"):
        shutil.copy(root / "vlmfix" / file, root / "copy" / "vlmfix" / file)
    code = "import vlmfix, vlmfix.methods.registry as all; print(*all.method_names(), *vlmfix.__all__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=root / "copy", capture_output=True, text=True, check=True)
    assert {"my_method", "MyMethod"} <= set(done.stdout.split())


def test_nothing_is_overwritten(root: Path, new_method: Any) -> None:
    new_method("my_method")
    readme = (root / "vlmfix/methods/README.md").read_text(encoding="utf-8")
    with pytest.raises(SystemExit, match="exists"):
        new_method("my_method", "--place", "heads")
    assert (root / "vlmfix/methods/README.md").read_text(encoding="utf-8") == readme
    with pytest.raises(SystemExit, match="lower case"):
        new_method("MyMethod")
