"""The demo notebook runs top to bottom where vlmfix is not installed, as in Colab: from a wheel or a checkout."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from builds import ROOT, build, copy_of_the_sources, fresh_environment

NOTEBOOK = ROOT / "scripts" / "colab_demo.ipynb"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of the sources as they are."""
    folder = tmp_path_factory.mktemp("wheel")
    return build(copy_of_the_sources(folder / "sources"), "wheel", folder)


@pytest.fixture
def python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The interpreter of an environment without vlmfix, in which pip asks no index and needs no other packages."""
    for name, value in {
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "IPYTHONDIR": os.fspath(tmp_path / "ipython"),
        "JUPYTER_PATH": os.fspath(tmp_path / "jupyter"),
        "PIP_NO_INDEX": "1",
        "PIP_NO_BUILD_ISOLATION": "0",  # pip reads this option the other way round
    }.items():
        monkeypatch.setenv(name, value)
    found = fresh_environment(tmp_path / "environment")
    lacks = subprocess.run(
        [found, "-c", "import torch, transformers, pip; import vlmfix"], cwd=tmp_path, capture_output=True, text=True
    )
    assert "No module named 'vlmfix'" in lacks.stderr
    kernel = tmp_path / "jupyter" / "kernels" / "fresh"
    kernel.mkdir(parents=True)
    started = [str(found), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (kernel / "kernel.json").write_text(json.dumps({"argv": started, "display_name": "fresh", "language": "python"}))
    return found


@pytest.mark.slow
def test_the_demo_notebook_runs_from_an_uploaded_wheel(tmp_path: Path, python: Path, wheel: Path) -> None:
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    pytest.importorskip("matplotlib")
    content = tmp_path / "content"
    content.mkdir()
    shutil.copy(wheel, content)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert all(not cell.get("outputs") for cell in notebook.cells), "outputs are not kept"
    words = {"kernel_name": "fresh", "resources": {"metadata": {"path": content}}}
    nbclient.NotebookClient(notebook, timeout=300, **words).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    text = "".join(output.get("text", "") for output in outputs)
    assert f"installing vlmfix from the wheel {content / wheel.name}" in text
    assert "vhr: " in text
    assert "head rows edited" in text
    assert "CHAIR_i" in text
    assert any("image/png" in output.get("data", {}) for output in outputs)


@pytest.mark.slow
def test_the_notebook_installs_a_checkout_beside_or_around_it(tmp_path: Path, python: Path) -> None:
    code = "".join(json.loads(NOTEBOOK.read_text())["cells"][1]["source"])
    content = tmp_path / "content"
    content.mkdir()

    def first_cell(folder: Path) -> str:
        more = "import vlmfix.evals; print(vlmfix.__file__)"
        done = subprocess.run([python, "-c", f"{code}\n{more}"], cwd=folder, capture_output=True, text=True)
        return done.stdout + done.stderr.splitlines()[-1] if done.returncode else done.stdout

    assert "no wheel vlmfix-*.whl and no checkout in" in first_cell(content)
    checkout = copy_of_the_sources(content / "vlmfix")
    said = first_cell(content)
    assert f"installing vlmfix from the checkout {checkout}" in said
    assert "/environment/" in said.splitlines()[-1], "the folder named vlmfix is not taken for the package"
    assert "is installed already" in first_cell(checkout / "scripts")
