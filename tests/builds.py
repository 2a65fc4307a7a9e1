"""What installs vlmfix elsewhere: copies of the sources, what is built of them, and an environment that lacks it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def copy_of_the_sources(folder: Path) -> Path:
    """What is under version control or would be, and no build's leftovers: a build writes beside the sources."""
    left_out = ("__pycache__", "*.egg-info", "build", "dist", "runs", ".git", ".venv", ".*_cache", ".device")
    return Path(shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*left_out)))


def build(folder: Path, kind: str, out: Path) -> Path:
    """Build a wheel or an sdist of a folder of sources; skips where setuptools is too old."""
    setuptools = pytest.importorskip("setuptools", minversion="77", reason="the build needs setuptools 77")
    code = f"import setuptools.build_meta as b; print(b.build_{kind}({str(out)!r}))"
    path = os.pathsep.join([str(Path(setuptools.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return out / done.stdout.splitlines()[-1]


def fresh_environment(folder: Path) -> Path:
    """Make an environment with everything that this one has installed, pip too, but vlmfix; return its interpreter."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (own,) = folder.glob("lib/python*/site-packages")
    shared = folder / "shared"
    shared.mkdir()
    for site in (Path(path) for path in sys.path if path.endswith("site-packages")):
        for path in site.iterdir():
            is_ours = path.name.startswith(("vlmfix", "__editable__"))
            if not is_ours and path.suffix != ".pth" and not (shared / path.name).exists():
                (shared / path.name).symlink_to(path)
    (own / "shared.pth").write_text(f"{shared}\n")
    return folder / "bin" / "python"
