"""An evaluation killed at 20 random moments, and resumed after each, ends as if nothing had happened."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

import pytest
from run_folders import read, timeless

from vlmfix.cli import main
from vlmfix.evals import testbed
from vlmfix.evals.run import models
from vlmfix.evals.run.answer_log import AnswerLog

WORDS = "eval --method pai --set alpha=0.6 --no-controls --limit 6 --batch-size 4 --max-new-tokens 24"
KILLS = 20


class Life:
    """A run in a process of its own, forked from this one, that kills itself after some Python calls.

    Calls, not seconds: the moments are then the same on every machine, and they fall everywhere, between two steps of
    decoding, two writes or two lines of the report.
    """

    def __init__(self, folder: Path, calls: int | None) -> None:
        self.words = [*WORDS.split(), "--out", str(folder)]
        reader, writer = os.pipe()
        pid = os.fork()
        if not pid:
            os.close(reader)
            self._live(writer, calls)
        os.close(writer)
        with os.fdopen(reader) as told:
            self.told = told.read()
        _, status = os.waitpid(pid, 0)
        self.was_killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        self.ended_well = os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0

    def _live(self, writer: int, calls: int | None) -> None:
        count, begun = 0, 0
        append = AnswerLog.append

        def note_first(log: AnswerLog, records: Any) -> None:
            nonlocal begun
            begun = begun or count
            append(log, records)

        def die_in_time(frame: Any, event: str, argument: Any) -> None:
            nonlocal count
            count += event == "call"
            if count == calls:
                os.kill(os.getpid(), signal.SIGKILL)

        code = 1
        try:
            sys.stdout = open(os.devnull, "w", encoding="utf-8")
            AnswerLog.append = note_first  # type: ignore[method-assign]  # in this process alone
            sys.setprofile(die_in_time)
            code = main(self.words)
            sys.setprofile(None)
            os.write(writer, f"{begun} {count}".encode())
        except BaseException:
            os.write(writer, traceback.format_exc().encode())
        finally:
            os._exit(code)


def without_times(folder: Path) -> dict[str, bytes]:
    """What a run leaves, but for wall times (``seconds``, ``pace``), and the command, which names the folder."""

    results = timeless(read(folder))
    lines = (folder / "answers.jsonl").read_bytes().splitlines(keepends=True)
    assert all(line.endswith(b"}\n") and b',"seconds":' in line for line in lines)
    return {
        "results.json": json.dumps(results, indent=1).encode(),
        "answers.jsonl": b"\n".join(line.rpartition(b',"seconds":')[0] for line in lines),
        "counts.json": (folder / "counts.json").read_bytes(),
    }


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_20_random_moments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = models.load_model(models.find_model(testbed.MODEL_DIR), dtype="float32", device="cpu")
    monkeypatch.setattr("vlmfix.evals.run.answering.load_model", lambda *_, **__: model)
    whole = Life(tmp_path / "whole", None)
    assert whole.ended_well, whole.told
    begun, total = map(int, whole.told.split())
    rng = random.Random(4)
    folder, kills, answers = tmp_path / "killed", 0, []
    while kills < KILLS:
        # Half of them fall around the next answers, the others anywhere.
        near = kills < KILLS // 2
        life = Life(folder, rng.randrange(begun * 9 // 10, begun * 5 // 4) if near else rng.randrange(total // 2))
        assert life.was_killed or life.ended_well, life.told
        kills += life.was_killed
        log = folder / "answers.jsonl"
        answers.append(log.read_bytes().count(b"\n") if log.is_file() else 0)
    assert answers == sorted(answers), "no answer is ever lost"
    assert len(set(answers)) > 4, f"kills fell between different answers: {answers}"
    last = Life(folder, None)
    assert last.ended_well, last.told
    assert without_times(folder) == without_times(tmp_path / "whole")
    assert {path.name for path in folder.iterdir()} == {path.name for path in (tmp_path / "whole").iterdir()}
