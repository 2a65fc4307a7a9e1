"""``vlmfix score`` in a test: what it wrote, what it said, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from families.saved_llava import write_lines
from run_folders import read

from vlmfix.cli import main


def changed(rows: Sequence[dict[str, Any]], place: int, **fields: Any) -> list[dict[str, Any]]:
    """Rows of which one has other fields."""
    return [{**row, **fields} if number == place else row for number, row in enumerate(rows)]


class Scorer:
    """Runs ``vlmfix score NAME ...``; rows among its words are written to a file first.

    Attributes:
        folder: Where rows and results are written.
        said: What the last run printed.
    """

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self.said, self._capsys = folder, "", capsys

    def __call__(self, *words: Any) -> dict[str, Any]:
        """Score, and return the result; empty if none is written, because a judge is needed."""
        out = self.folder / "scores.json"
        out.unlink(missing_ok=True)
        assert self._run(*words, "--out", out) == 0
        self.said = self._capsys.readouterr().out
        return json.loads(out.read_text()) if out.exists() else {}

    def error(self, *words: Any) -> str:
        """What is said of words that are refused."""
        self._capsys.readouterr()
        assert self._run(*words) == 2
        return self._capsys.readouterr().err

    def run(self, name: str, data: object, *more: Any) -> tuple[dict[str, Any], Path]:
        """Ask a benchmark of the embedded model, and return the baseline's results and exported files."""
        out = self.folder / "run"
        words = ["eval", "--benchmark", name, "--benchmark-data", f"{name}={data}", "--method", "none", "--out", out]
        assert main([str(word) for word in (*words, *more)]) == 0
        return read(out)["methods"][0][name], out / "official" / "none"

    def _run(self, *words: Any) -> int:
        rows = self.folder / "answers.jsonl"
        return main(["score", *(str(write_lines(rows, word) if isinstance(word, list) else word) for word in words)])
