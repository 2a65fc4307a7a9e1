"""What a run is before any weights are loaded: its methods, its questions, and the settings that identify it."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import vlmfix
from vlmfix.observe.prompts import PromptBuilder

from ..benchmarks.registry import Tasks, make_tasks
from ..data.samples import Sample
from ..data.write import SCHEMA_VERSION, digest
from ..options import EvalOptions
from .batch_size import choose_batch_size
from .methods import MethodSpec, expand_all, plan_methods, strengths_on
from .models import ModelSource, find_model, resolve_device, resolve_dtype

RUNS = Path("runs")


@dataclass(frozen=True)
class EvalRun:
    """A planned run.

    Attributes:
        options: As typed.
        methods: Rows of the result table, ``none`` first.
        source: The model, not loaded.
        tasks: What is asked.
        settings: Everything that identifies the run.
        device: Device of the model.
        batch_size: Samples per batch.
        folder: Run folder.
        notes: What the reader must know, for the report.
    """

    options: EvalOptions
    methods: tuple[MethodSpec, ...]
    source: ModelSource
    tasks: Tasks
    settings: dict[str, Any]
    device: str
    batch_size: int
    folder: Path
    notes: tuple[str, ...]

    @property
    def total(self) -> int:
        """Number of answers of the whole run."""
        return len(self.methods) * sum(1 for _ in self.tasks.samples())

    def is_asked_about(self, sample: Sample) -> bool:
        """Whether the unpatched model is asked for the objects that its answer names, for self-verification."""
        options = self.options
        verifies = options.controls and options.self_verification and any(s.role == "method" for s in self.methods)
        return verifies and sample.records == "gaps" and sample.path is not None


def plan_run(options: EvalOptions, methods: Sequence[MethodSpec] | None = None) -> EvalRun:
    """Resolve the options into a run without loading any weights.

    Args:
        options: As typed.
        methods: The rows, the baseline first; by default what the options name, with controls.

    Raises:
        VlmfixError: Something the run needs is missing or contradictory; nothing was written.
    """
    source = find_model(options.model, yes=options.yes)
    notes: list[str] = []
    if methods is None:
        strengths, notes = strengths_on(options.model)
        names, left_out = expand_all(options.methods, source.config, strengths)
        methods = plan_methods(replace(options, methods=names), strengths)
        idle = strengths.keys() - {spec.params["method"] for spec in methods}
        notes = [note for note in [*notes, *left_out] if note.partition(":")[0] not in idle]
    tasks = make_tasks(options)
    first = next(tasks.samples())
    PromptBuilder(source.processor, use_template=options.chat_template)(first.question, image=first.path is not None)
    device = resolve_device(options.device)
    settings = {
        "schema_version": SCHEMA_VERSION,
        "model": {
            **source.identity,
            "dtype": resolve_dtype(options.dtype, device, source.config),
            "attn_implementation": source.attention(options.attn_implementation, device) or "default",
            "chat_template": digest(source.processor.chat_template) if options.chat_template else None,
        },
        "methods": {spec.label: dict(spec.params) for spec in methods},
        "decoding": {"do_sample": False, "num_beams": 1},
        **tasks.settings(),
        "seed": options.seed,
        "versions": versions(),
    }
    settings = json.loads(json.dumps(settings))
    batch_size = choose_batch_size(
        options.batch_size,
        source,
        tasks.samples(),
        dtype=settings["model"]["dtype"],
        device=device,
        template=options.chat_template,
    )
    folder = options.out or RUNS / run_name(source.name, settings)
    return EvalRun(options, tuple(methods), source, tasks, settings, device, batch_size, folder, (*notes, *tasks.notes))


def with_methods(run: EvalRun, methods: Sequence[MethodSpec]) -> EvalRun:
    """Return the same run with other rows, the baseline first."""
    params = {spec.label: dict(spec.params) for spec in methods}
    return replace(run, methods=tuple(methods), settings={**run.settings, "methods": params})


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


def run_name(model: str, settings: Mapping[str, Any]) -> str:
    """Return the default name of a run folder: the model's name and the first eight digits of the settings' digest."""
    stem = "".join(c if c.isalnum() or c in "._-" else "-" for c in Path(model).name) or "model"
    return f"{stem}-{digest(settings)[:8]}"
