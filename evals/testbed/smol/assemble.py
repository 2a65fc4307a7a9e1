"""Puts ``smol`` together once: its parts become an ordinary ``from_pretrained`` folder."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any

from vlmfix.errors import DataError

from ..export import default_cache_dir
from .package import GGUF_SHA256, verified_gguf

__all__ = ["ADAPTERS", "assembled", "folder_key"]

logger = logging.getLogger("vlmfix.evals")

ADAPTERS: Mapping[str, Path] = MappingProxyType(
    {
        "smol": Path(__file__).parent / "adapter.safetensors",
        "smol-seed1": Path(__file__).parent / "adapter_seed1.safetensors",
    }
)
"""Projector and low-rank changes by the model's name, float16."""

_FORMAT = 1
"""Raised when the assembled folder of the same adapter changes."""

_NEEDED_BYTES = 450_000_000
_RECORD = "assembled.json"


def folder_key(name: str = "smol") -> str:
    """Ten hexadecimal digits over all that a folder is made from, so that no folder of another adapter is ever used.

    Args:
        name: Of the model.

    Raises:
        DataError: The adapter is missing.
    """
    adapter = ADAPTERS[name]
    if not adapter.is_file():
        raise DataError(f"this installation lacks {adapter}: install vlmfix again, or train it (scripts/train_smol.py)")
    # Tokenizer and processor files differ between major releases of transformers.
    release = version("transformers").split(".")[0]
    digest = hashlib.sha256(f"{_FORMAT} {release} {GGUF_SHA256} ".encode() + adapter.read_bytes())
    return digest.hexdigest()[:10]


def assembled(cache_dir: Path | None = None, *, yes: bool = False, name: str = "smol") -> Path:
    """The folder for ``from_pretrained`` (270 MB, bfloat16), assembled at the first call (half a minute).

    One process assembles, others wait. The folder is written beside its place and renamed, so an interrupted call
    leaves no half-written folder.

    Args:
        cache_dir: Default: ``smol`` in :func:`vlmfix.evals.testbed.default_cache_dir`.
        yes: Whether the language model may be downloaded without a question.
        name: Of the model; a key of :data:`ADAPTERS`.

    Raises:
        DataError: The language model is missing and may not or cannot be downloaded, or the folder cannot be written.
    """
    from filelock import FileLock

    root = Path(cache_dir) if cache_dir is not None else default_cache_dir() / "smol"
    target = root / f"model-{folder_key(name)}"
    if _complete(target):
        return target
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = FileLock(root / ".lock")
    except OSError as error:
        raise DataError(f"cannot write to {root}: {error}. Set VLMFIX_CACHE to a folder") from error
    with lock:
        if not _complete(target):  # else another process did it while this one waited
            gguf = verified_gguf(root, yes=yes)
            logger.info("putting %s together in %s (once; half a minute, 270 MB)", name, target)
            _write(gguf, ADAPTERS[name], target)
            own = {f"model-{folder_key(each)}" for each, adapter in ADAPTERS.items() if adapter.is_file()}
            others = [path.name for path in root.glob("model-*") if path.name not in own]
            if others:
                logger.info("%s in %s belong to other versions and may be removed", ", ".join(others), root)
    return target


def _complete(folder: Path) -> bool:
    """Whether all files are there with the sizes that were written."""
    try:
        sizes = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, AttributeError):
        return False


def _write(gguf: Path, adapter: Path, target: Path) -> None:
    """Assemble and write the folder."""
    free = shutil.disk_usage(target.parent).free
    if free < _NEEDED_BYTES:
        raise DataError(
            f"{free // 1_000_000} MB are free in {target.parent}, {_NEEDED_BYTES // 1_000_000} are needed to put smol "
            "together: free some, or set VLMFIX_CACHE to a folder elsewhere"
        )
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        _save(gguf, adapter, partial)
        sizes = {path.name: path.stat().st_size for path in partial.iterdir()}
        (partial / _RECORD).write_text(json.dumps(sizes), encoding="utf-8")
        partial.chmod(0o755)
        shutil.rmtree(target, ignore_errors=True)  # an incomplete one
        partial.rename(target)
    except OSError as error:
        raise DataError(
            f"cannot write smol to {target}: {error}. Free some space, or set VLMFIX_CACHE to a folder elsewhere"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _save(gguf: Path, adapter: Path, folder: Path) -> None:
    """Merge everything and write model and processor in the standard format."""
    import torch
    from safetensors.torch import load_file

    from .gguf import read_gguf
    from .model import build_model, build_processor, build_tokenizer, merge_adapter

    metadata, weights = read_gguf(gguf)
    model = build_model(metadata, weights)
    merge_adapter(model, load_file(adapter))
    model.to(torch.bfloat16).save_pretrained(folder)
    processor: Any = build_processor(build_tokenizer(metadata))
    processor.save_pretrained(folder)
    # What transformers 4.57 reads instead of the newer form beside it.
    processor.image_processor.save_pretrained(folder)
    for path in folder.iterdir():
        os.chmod(path, 0o644)
