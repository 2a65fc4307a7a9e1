"""Types commands, and holds what several cases need: runs, recipes and folders that are made once."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from golden import data
from golden.compare import figures, normalised
from vlmfix.cli import main

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]
SHARED = Path(os.environ.get("VLMFIX_TEST_DATA", REPOSITORY / ".." / "shared" / "data")).resolve()
CALIBRATED = ("act", "adhh", "adaiat", "allpath", "iri", "vaf", "var")


@dataclass(frozen=True)
class Said:
    """What a command gave back: its exit status and both streams."""

    status: int
    out: str
    err: str


def say(*words: object) -> Said:
    """Type a command; a parser's exit is a status as well."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main([str(word) for word in words])
        except SystemExit as exit_:
            status = int(exit_.code or 0)
    return Said(status, out.getvalue(), err.getvalue())


def done(*words: object) -> str:
    """Type a command that must succeed, and return what it printed."""
    said = say(*words)
    assert said.status == 0, f"vlmfix {' '.join(map(str, words))}: {said.err}"
    return said.out


def read(path: Path) -> Any:
    """The content of a JSON file, or of JSON lines."""
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else json.loads(text)


class Bench:
    """A folder in which the commands run; what several of them need is made once.

    Args:
        folder: Empty; ``VLMFIX_CACHE`` must name a folder below it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def tidy(self, value: Any) -> Any:
        """Normalise a value, without the folders of this machine."""
        folders = {str(self.folder): "<folder>", str(SHARED): "<shared>", str(REPOSITORY): "<repository>"}
        return normalised(value, {**folders, sys.executable: "python"})

    @cached_property
    def coco(self) -> Path:
        """Four scenes of the testbed as a COCO folder; an evaluation writes them into the cache."""
        words = ("--split", "heldout2", "--limit", 4, "--benchmark", "chair", "--method", "none")
        done("eval", *words, "--out", self.folder / "scenes")
        (found,) = (p.parent for p in self.folder.rglob("instances_val2014.json") if "heldout2-4" in p.parent.name)
        return found

    @cached_property
    def run(self) -> Path:
        """A run with controls."""
        words = ("--limit", 4, "--method", "none", "vhr", "vcd")
        (self.folder / "run.txt").write_text(done("eval", "--verbose", *words, "--out", self.folder / "run"))
        return self.folder / "run"

    @cached_property
    def other_run(self) -> Path:
        """A run on the same images without controls, on more images than the first."""
        words = ("--limit", 5, "--method", "pai", "--set", "alpha=0.5", "--no-controls", "--benchmark", "pope", "chair")
        done("eval", *words, "--out", self.folder / "other")
        return self.folder / "other"

    @cached_property
    def benchmark_data(self) -> dict[str, Path]:
        """Where the benchmarks' own data are."""
        root, found = self.folder / "data", data.pictures(self.coco)
        described = {"amber": data.amber(root / "amber", found, described=False)}
        makers = {"mme": data.mme, "hallusionbench": data.hallusionbench, "mmhal": data.mmhal, "custom": data.custom}
        return described | {name: make(root / name, found) for name, make in makers.items()}

    @cached_property
    def benchmarks(self) -> Path:
        """A run of every benchmark but CHAIR and POPE, with a judge that likes long questions."""
        judge = self.folder / "judge.py"
        judge.write_text("import sys, zlib\nprint('Rating:', zlib.crc32(sys.stdin.read().encode()) % 7)\n")
        given = [f"{name}={path}" for name, path in self.benchmark_data.items()]
        words = ["--limit", 3, "--method", "pai", "--set", "alpha=0.5", "--batch-size", 5, "--max-new-tokens", 24]
        words += ["--benchmark", "sycophancy", *self.benchmark_data, "--benchmark-data", *given]
        words += ["--judge", f"{sys.executable} {judge}", "--judge-name", "a checksum"]
        text = done("eval", "--verbose", *words, "--out", self.folder / "benchmarks")
        (self.folder / "benchmarks.txt").write_text(text)
        return self.folder / "benchmarks"

    def calibrated(self, name: str) -> Path:
        """A recipe that ``vlmfix calibrate`` wrote."""
        path = self.folder / f"{name}.json"
        if not path.exists():
            (self.folder / f"{name}.txt").write_text(done("calibrate", name, "--limit", 4, "--out", path))
        return path

    def scores(self, *words: object) -> Any:
        """What ``vlmfix score`` writes, with the figures it prints; long lists by their digest."""
        out = self.folder / "scores.json"
        text = done("score", *words, "--out", out)
        return {"shown": once(figures(text)), **self.tidy(digested(read(out)))}


def digested(value: Any) -> Any:
    """Lists of more than 24 objects as their length, a few entries and a digest of their integers and texts."""
    if isinstance(value, dict):
        return {k: digested(v) for k, v in value.items()}
    if isinstance(value, list) and len(value) > 24 and isinstance(value[0], (dict, list)):
        whole = re.sub(r"\d+\.\d+(e-\d+)?", "", json.dumps(value, sort_keys=True))
        return {"entries": len(value), "some": value[:: len(value) // 2], "digest": digest(whole)}
    return value


def once(shown: Iterable[str]) -> dict[str, bool]:
    """Figures that must be shown, in whatever order and layout."""
    return dict.fromkeys(sorted(set(shown), key=lambda text: (abs(float(text)), text)), True)


def digest(text: str) -> str:
    """A short name of a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def on_file(name: str) -> Any:
    """What a case gave before."""
    return read(HERE / f"{name}.json")


def as_json(value: Any) -> Any:
    """A value as JSON gives it back, with 12 digits of a float, which is more than is compared."""
    return json.loads(json.dumps(value), parse_float=lambda text: float(f"{float(text):.12g}"))


def lacking(names: Iterable[str] = ("chair_captions", "chair_gt", "nltk_data", "pope", "amber")) -> str | None:
    """Why cases on real data cannot run, or None."""
    missing = [name for name in names if not (SHARED / name).exists()]
    return f"test data {', '.join(missing)} not found in {SHARED}" if missing else None
