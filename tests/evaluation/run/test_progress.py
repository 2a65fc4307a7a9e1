"""What a run says while it goes: a bar on a terminal, few lines in a log, the whole run's count from one process."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest

from vlmfix.evals.run.progress import Progress
from vlmfix.evals.run.shards import Elsewhere, Shard


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def lines_of(total: int, batch: int, seconds: float, monkeypatch: pytest.MonkeyPatch, **more: Any) -> list[str]:
    """The lines of a run whose batches take ``seconds`` each."""
    said: list[str] = []
    clock = Clock()
    monkeypatch.setattr("tqdm.std.time", clock)
    with Progress(total, say=said.append, **more) as progress:
        for _ in range(total // batch):
            clock.now += seconds
            progress.begin("pope 3/12 vhr")
            progress.add(batch)
    return said


def test_a_log_gets_a_line_per_batch_that_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    said = lines_of(1000, 100, 40.0, monkeypatch)
    assert len(said) == 10
    assert said[3] == "40 %: 400 of 1000 answers,  2.50/s, 04:00 to go (pope 3/12 vhr)"
    assert said[-1].startswith("100 %: 1000 of 1000 answers,  2.50/s, 00:00 to go")


def test_a_short_run_stays_quiet(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    assert lines_of(1000, 10, 0.2, monkeypatch) == []
    assert len(lines_of(1000, 10, 1.0, monkeypatch)) == 3, "one in 30 seconds"
    assert capsys.readouterr() == ("", "")


def test_a_terminal_gets_a_bar_with_rate_and_time_to_go(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    said: list[str] = []
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with Progress(400, say=said.append) as progress:
        progress.begin("chair 1/4 none")
        progress.add(100)
        progress.add(300)
    drawn = capsys.readouterr().err
    assert not said
    last = drawn.replace("\r", "\n").strip().splitlines()[-1]
    assert re.search(r"chair 1/4 none: 100%\|.*\| 400/400 answers \[\S+<\S+, +\S+/s\]", last), last


@pytest.mark.parametrize("terminal", [True, False])
def test_other_processes_show_nothing(terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    with Progress(10, say=None) as progress:
        progress.begin("x")
        progress.add(10)
    assert capsys.readouterr() == ("", "")


def test_the_first_process_counts_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = Shard(0, 3)
    elsewhere = Elsewhere(tmp_path, shard)
    assert elsewhere() == 0
    (tmp_path / "answers.part-0.jsonl").write_text("own\nown\n", encoding="utf-8")
    (tmp_path / "answers.part-1.jsonl").write_text('{"a":1}\n{"a":', encoding="utf-8")
    assert elsewhere() == 1
    with (tmp_path / "answers.part-1.jsonl").open("a", encoding="utf-8") as file:
        file.write('2}\n{"a":3}\n')
    (tmp_path / "answers.part-2.jsonl").write_text("{}\n", encoding="utf-8")
    assert elsewhere() == 4 == elsewhere()
    said = lines_of(1000, 100, 40.0, monkeypatch, elsewhere=lambda: 500)
    assert said[0].startswith("60 %: 600 of 1000") and said[-1].startswith("100 %")
    assert Elsewhere(tmp_path, Shard())() == 0
