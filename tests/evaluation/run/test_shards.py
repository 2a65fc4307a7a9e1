"""One evaluation on two processes gives what one process gives; what an interrupted one left is taken up."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from run_folders import answers_of, read, timeless

from vlmfix.cli import main
from vlmfix.errors import VlmfixError
from vlmfix.evals.run.answer_log import AnswerLog
from vlmfix.evals.run.shards import Shard, merge_parts

WORDS = "--method pai --limit 6 --batch-size 4 --out"


def figures(folder: Path) -> Any:
    return timeless(read(folder))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone") / "run"
    assert main(["eval", *WORDS.split(), str(folder)]) == 0
    return folder


LAUNCHERS = {
    "torchrun": "torch.distributed.run --standalone --nproc-per-node 2",
    # On a machine without GPUs too: with --cpu, accelerate starts one process, whatever their number.
    "accelerate": "accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --main_process_port 0 "
    "--mixed_precision no --dynamo_backend no",
}


def launch(launcher: str, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *LAUNCHERS[launcher].split(), *words],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_processes_give_what_one_gives(launcher: str, alone: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    done = launch(launcher, "-m", "vlmfix.evals", *WORDS.split(), str(folder))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("2 processes share the batches") == 1
    assert done.stdout.count("written:") == 1, "only one process reports"
    assert answers_of(folder) == answers_of(alone)
    assert figures(folder) == figures(alone)
    assert not list(folder.glob("answers.part-*"))


@pytest.mark.slow
def test_processes_wait_for_each_other(tmp_path: Path) -> None:
    """The second writes only once the first is about to wait; behind the wait, the first sees it."""
    script = tmp_path / "wait.py"
    script.write_text(
        """
import sys, time
from pathlib import Path
from vlmfix.evals.run.shards import Shard
shard, folder = Shard.here(), Path(sys.argv[1])
shard.wait()
if shard.is_main:
    (folder / "first").touch()
else:
    while not (folder / "first").exists():
        time.sleep(0.05)
    (folder / "second").touch()
shard.wait()
assert (folder / "second").exists()
""",
        encoding="utf-8",
    )
    done = launch("torchrun", str(script), str(tmp_path))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ({}, Shard()),
        ({"WORLD_SIZE": "1", "RANK": "0"}, Shard()),
        ({"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1"}, Shard(3, 4, 1)),
        ({"PMI_SIZE": "2", "PMI_RANK": "1", "MPI_LOCALRANKID": "1"}, Shard(1, 2, 1)),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}, Shard(1, 2, 0)),
    ],
)
def test_who_is_who(names: dict[str, str], expected: Shard, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in names.items():
        monkeypatch.setenv(name, value)
    assert Shard.here() == expected


def test_a_process_without_a_number_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(VlmfixError, match="torchrun"):
        Shard.here()


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

    monkeypatch.setattr("vlmfix.evals.run.answering.generate_answers", never)
    assert main(["eval", *WORDS.split(), str(folder)]) == 0
    assert answers_of(folder) == answers_of(alone)
    assert figures(folder) == figures(alone)


def test_answers_that_never_came_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Any) -> None:
    """Such as those of processes on a machine that writes them to a folder of its own."""
    monkeypatch.setattr("vlmfix.evals.run.answering.generate_answers", lambda *_, **__: None)
    error = refused(["eval", *WORDS.split(), str(tmp_path / "run")])
    assert (
        "answers are not in" in error
        and "a shared one with --out DIR" in error
        and not (tmp_path / "run" / "results.json").exists()
    )


def test_leftovers_of_a_run_thrown_away_go_too(tmp_path: Path) -> None:
    (tmp_path / "answers.part-1.jsonl").write_text('{"key": "a"}\n', encoding="utf-8")
    with AnswerLog(tmp_path / "answers.jsonl") as log:
        merge_parts(tmp_path, log, keep=False)
        assert not log.records
    assert not list(tmp_path.glob("answers.part-*"))
