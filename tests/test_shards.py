"""One evaluation on two processes gives what one process gives; what an interrupted one left is taken up."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from vlmfix.cli import main
from vlmfix.evals.cache import AnswerLog
from vlmfix.evals.shards import Shard, merge_parts

WORDS = "--method pai --limit 6 --batch-size 4 --out"


def answers(folder: Path) -> dict[str, Any]:
    lines = (folder / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    assert len({record["key"] for record in records}) == len(records)
    return {record["key"]: {k: v for k, v in record.items() if k != "seconds"} for record in records}


def figures(folder: Path) -> Any:
    def without_times(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: without_times(v) for k, v in value.items() if k not in ("seconds", "pace", "command")}
        return [without_times(each) for each in value] if isinstance(value, list) else value

    return without_times(json.loads((folder / "results.json").read_text(encoding="utf-8")))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone") / "run"
    assert main(["eval", *WORDS.split(), str(folder)]) == 0
    return folder


@pytest.mark.slow
def test_two_processes_give_what_one_gives(alone: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launch, "-m", "vlmfix.evals", *WORDS.split(), str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("2 processes share the batches") == 1
    assert done.stdout.count("written:") == 1, "only one process reports"
    assert answers(folder) == answers(alone)
    assert figures(folder) == figures(alone)
    assert not list(folder.glob("answers.part-*"))


def test_every_batch_has_one_owner() -> None:
    shards = [Shard(rank, 3) for rank in range(3)]
    assert all(sum(shard.owns(batch) for shard in shards) == 1 for batch in range(20))
    assert Shard(1, 2, 1).device("cuda") == "cuda:1"
    assert Shard(1, 2, 1).device("cpu") == "cpu"
    assert Shard().device("cuda") == "cuda"


def test_what_an_interrupted_run_left_is_not_generated_again(
    alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All answers lie in the files of two processes, one of them torn."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.json").write_bytes((alone / "config.json").read_bytes())
    (folder / "answers.jsonl").write_bytes(b"")
    lines = (alone / "answers.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "answers.part-0.jsonl").write_bytes(b"".join(lines[::2]) + b'{"key": "torn')
    (folder / "answers.part-1.jsonl").write_bytes(b"".join(lines[1::2]))

    def never(*_: Any) -> None:
        raise AssertionError("nothing is missing")

    monkeypatch.setattr("vlmfix.evals.runner.generate_answers", never)
    assert main(["eval", *WORDS.split(), str(folder)]) == 0
    assert answers(folder) == answers(alone)
    assert figures(folder) == figures(alone)


def test_leftovers_of_a_run_thrown_away_go_too(tmp_path: Path) -> None:
    (tmp_path / "answers.part-1.jsonl").write_text('{"key": "a"}\n', encoding="utf-8")
    with AnswerLog(tmp_path / "answers.jsonl") as log:
        merge_parts(tmp_path, log, keep=False)
        assert not log.records
    assert not list(tmp_path.glob("answers.part-*"))
