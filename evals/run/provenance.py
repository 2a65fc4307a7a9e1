"""Where answers come from: versions and the machine."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import vlmfix

from ..data.write import digest
from ..options import EvalOptions
from .models import placement


def versions() -> dict[str, str]:
    """Return the versions that can change an answer, and a digest of vlmfix's source (an editable install changes)."""
    packages = ("torch", "transformers", "tokenizers", "pillow", "torchvision")
    found = {"vlmfix": vlmfix.__version__, "vlmfix_source": source_digest()}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def source_digest() -> str:
    """Return the first 16 hex digits of SHA-256 over the plugin's source files (the command line aside)."""
    root = Path(vlmfix.__file__).parent
    hasher = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if name not in ("cli.py", "__main__.py") and not name.startswith("evals/"):
            hasher.update(f"{name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return hasher.hexdigest()[:16]


def runtime_info(options: EvalOptions, batch_size: int, model: Any) -> dict[str, Any]:
    """Return what is worth knowing about a run without being part of its identity: command, machine, batch size."""
    return {
        "command": options.command_line,
        "batch_size": batch_size,
        "device": placement(model),
        "model_class": type(model).__name__,
        "attn_implementation": model.config._attn_implementation,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "platform": platform.platform(terse=True),
    }


def run_name(model: str, settings: Mapping[str, Any]) -> str:
    """Return the default name of a run folder: the model's name and the first eight digits of the settings' digest."""
    stem = "".join(c if c.isalnum() or c in "._-" else "-" for c in Path(model).name) or "model"
    return f"{stem}-{digest(settings)[:8]}"
