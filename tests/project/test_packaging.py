"""What an installation holds, and what depends on what."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import zipfile
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
from builds import build, copy_of_the_sources

from vlmfix.errors import how_to_install

ROOT = Path(__file__).resolve().parents[2]


def project_file() -> Any:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 reads no TOML")
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def setuptools_table() -> Any:
    return project_file()["tool"]["setuptools"]


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


def contents(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_the_source_distribution_is_whole_and_builds_a_wheel(tmp_path: Path) -> None:
    sources = copy_of_the_sources(tmp_path / "sources")
    held = contents(sources)
    archive = build(sources, "sdist", tmp_path)
    shutil.unpack_archive(archive, tmp_path / "unpacked")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    assert held - contents(unpacked) == set()
    for script in ("scripts/demo", "scripts/test", "scripts/reproduce", ".ci/run"):
        assert os.access(unpacked / script, os.X_OK), script
    with zipfile.ZipFile(build(unpacked, "wheel", tmp_path)) as wheel:
        installed = set(wheel.namelist())
        (metadata,) = (wheel.read(name).decode() for name in installed if name.endswith(".dist-info/METADATA"))
    sources_of_packages = {each for each in held if each.startswith("vlmfix/")}
    sources_of_packages |= {f"vlmfix/{each}" for each in held if each.startswith("evals/")}
    assert {each for each in installed if ".dist-info/" not in each} == sources_of_packages
    assert "Author: vlmfix contributors" in metadata and "License-Expression: Apache-2.0" in metadata
    assert "Project-URL" not in metadata and "Home-page" not in metadata


def test_every_folder_goes_into_the_source_distribution() -> None:
    grafted = set(re.findall(r"^graft (\S+)$", (ROOT / "MANIFEST.in").read_text(encoding="utf-8"), re.MULTILINE))
    needed = {".ci", ".github", "evals", "scripts", "tests", "vlmfix"}
    assert grafted == needed and all((ROOT / each).is_dir() for each in needed)


def test_versions_of_python_are_the_same_everywhere() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    declared = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', text)
    script = (ROOT / "scripts" / "environment.sh").read_text(encoding="utf-8")
    (accepted,) = re.findall(r"^  (3\.[\d |.]+)\) ;;$", script, re.MULTILINE)
    assert accepted.split(" | ") == declared
    span = f"Python {declared[0]} to {declared[-1]}"
    assert span in script and span in (ROOT / "README.md").read_text(encoding="utf-8")


def fake_python(path: Path, version: str) -> Path:
    """An interpreter that knows its version, makes a .venv with itself and notes what pip is to install."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "#!/bin/sh\n"
        f'if [ "$1" = -c ]; then echo {version}; fi\n'
        'if [ "$2" = venv ]; then mkdir -p .venv/bin; cp "$0" .venv/bin/python; touch .venv/bin/activate; fi\n'
        'if [ "$2" = pip ]; then echo "$@" >> pip.txt; fi\n'
    )
    path.chmod(0o755)
    return path


def environment(folder: Path, extra: str, python: Path | str | None) -> subprocess.CompletedProcess[str]:
    """``scripts/environment.sh`` in a folder, as ``scripts/demo`` and ``scripts/test`` source it."""
    (folder / "scripts").mkdir(exist_ok=True)
    for name in ("pyproject.toml", "scripts/constraints.txt", "scripts/environment.sh"):
        if not (folder / name).exists():
            shutil.copy(ROOT / name, folder / name)
    asked = {} if python is None else {"PYTHON": str(python)}
    return subprocess.run(
        ["bash", "-c", f"set -euo pipefail; . scripts/environment.sh {extra}; echo 'ready'"],
        cwd=folder,
        env={"PATH": f"{folder / 'path'}:/usr/bin:/bin", **asked},
        capture_output=True,
        text=True,
    )


def test_the_demo_installs_what_it_needs_and_the_tests_the_rest(tmp_path: Path) -> None:
    for script, extra in (
        ("demo", "eval"),
        ("test", "dev"),
        ("test_versions", "dev"),
        ("test_clients", "dev"),
        ("test_upstream", "dev"),
        ("../.ci/run", "dev"),
    ):
        assert f"\n. scripts/environment.sh {extra}\n" in (ROOT / "scripts" / script).read_text(encoding="utf-8")
    fake_python(tmp_path / "path" / "python3", "3.12")

    def installed() -> list[str]:
        return [line.split()[-1] for line in (tmp_path / "pip.txt").read_text().splitlines()]

    first = environment(tmp_path, "eval", None)
    assert first.returncode == 0 and "making .venv with Python 3.12" in first.stdout, first.stderr
    assert "installing vlmfix[eval]" in first.stdout and installed() == [".[eval]"]
    again = environment(tmp_path, "eval", None)
    assert again.stdout == "using .venv (Python 3.12)\nready\n" and installed() == [".[eval]"]
    assert environment(tmp_path, "dev", None).returncode == 0 and installed() == [".[eval]", ".[dev]"]
    (tmp_path / ".venv" / "installed-eval").unlink()
    assert "using .venv" in environment(tmp_path, "eval", None).stdout, "what developers have serves the demo"
    (tmp_path / "scripts" / "constraints.txt").write_text("torch==0\n")
    assert environment(tmp_path, "eval", None).returncode == 0 and installed()[2:] == [".[eval]"]


def test_a_python_that_does_not_fit_is_named(tmp_path: Path) -> None:
    for version in ("3.9", "3.15"):
        done = environment(tmp_path, "eval", fake_python(tmp_path / "other", version))
        assert done.returncode == 1 and f"Python 3.10 to 3.14; this is {version}" in done.stderr
    done = environment(tmp_path, "eval", "no-such-python")
    assert done.returncode == 1 and "no Python answers to 'no-such-python'" in done.stderr
    assert not (tmp_path / ".venv").exists()
    assert environment(tmp_path, "eval", fake_python(tmp_path / "good", "3.11")).returncode == 0
    done = environment(tmp_path, "eval", fake_python(tmp_path / "newer", "3.13"))
    assert done.returncode == 1 and ".venv has Python 3.11" in done.stderr and "is 3.13" in done.stderr


def test_what_is_said_to_type_works_in_a_checkout_too() -> None:
    extras = set(project_file()["project"]["optional-dependencies"])
    for path in [*(ROOT / "vlmfix").rglob("*.py"), *(ROOT / "evals").rglob("*.py")]:
        text = path.read_text(encoding="utf-8")
        if path.name != "errors.py":
            assert "pip install 'vlmfix" not in text, f"{path}: how_to_install says it"
        assert set(re.findall(r"how_to_install\(['\"](\w+)['\"]\)", text)) <= extras, path
    assert how_to_install("nltk") == "pip install 'vlmfix[nltk]' (in a checkout: pip install -e '.[nltk]')"
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for extra in re.findall(r"pip install 'vlmfix\[(\w+)\]'", readme):
        assert extra in extras and f"pip install -e '.[{extra}]'" in readme
