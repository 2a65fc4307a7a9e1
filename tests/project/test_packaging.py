"""What an installation holds, and what depends on what."""

from __future__ import annotations

import re
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


def setuptools_table() -> Any:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 reads no TOML")
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]


def files() -> list[tuple[str, Path]]:
    """Every file of the sources, with its package."""
    found = []
    for top, package in ((ROOT / "vlmfix", "vlmfix"), (ROOT / "evals", "vlmfix.evals")):
        for path in sorted(top.rglob("*")):
            inside = path.relative_to(top)
            if path.is_file() and not any(part.startswith((".", "__pycache__")) for part in inside.parts):
                found.append((".".join([package, *inside.parts[:-1]]), path))
    return found


def test_every_package_is_installed() -> None:
    with_code = {package for package, path in files() if path.suffix == ".py"}
    assert set(setuptools_table()["packages"]) == with_code
    assert {package for package, path in files() if path.name == "__init__.py"} == with_code


def test_every_data_file_is_installed() -> None:
    patterns = setuptools_table()["package-data"]
    for package, path in files():
        if path.suffix != ".py":
            holder, inside = package, path.name
            while holder not in patterns and "." in holder:
                holder, _, folder = holder.rpartition(".")
                inside = f"{folder}/{inside}"
            alike = [each for each in patterns.get(holder, []) if each.count("/") == inside.count("/")]
            everywhere = patterns["*"] if package in setuptools_table()["packages"] else []
            assert any(fnmatch(inside, each) for each in alike) or any(fnmatch(path.name, p) for p in everywhere), path


def test_the_plugin_does_not_need_the_evaluation() -> None:
    """Verbs of the command line aside."""
    for path in (ROOT / "vlmfix").rglob("*.py"):
        if path.name != "cli.py":
            imports = r"^\s*(from|import) vlmfix\.evals|^\s*from vlmfix import .*\bevals\b|import_module\(.*evals"
            assert re.search(imports, path.read_text(encoding="utf-8"), re.MULTILINE) is None, path
