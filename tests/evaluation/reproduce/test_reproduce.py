"""``vlmfix reproduce``: its commands are those of this package, its figures have a source, and what it compares."""

import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from families.saved_llava import build_coco_folder, build_tiny_llava
from shared_data import DATA, needs_data

from vlmfix.calibration.calibrate import SEARCHES
from vlmfix.cli import command_parser
from vlmfix.cli import main as vlmfix_main
from vlmfix.errors import VlmfixError
from vlmfix.evals.benchmarks.chair.figures import score_captions
from vlmfix.evals.benchmarks.coco_objects import ChairMatcher
from vlmfix.evals.benchmarks.columns import figure_of
from vlmfix.evals.benchmarks.yes_no import score_labels
from vlmfix.evals.options import EvalOptions
from vlmfix.evals.reproduce.check import measured
from vlmfix.evals.reproduce.command import PLACES, command, run_commands
from vlmfix.evals.reproduce.table import LABELS, TABLES
from vlmfix.evals.run.methods import plan_methods
from vlmfix.evals.scores import counts


def commands(folder: Path) -> list[tuple[str, Any, list[str]]]:
    """Every command with its placeholders filled in, and the recipes that earlier commands of its table write."""
    options = SimpleNamespace(model=None, out=str(folder), **{name: name for name in PLACES})
    found = []
    for name, table in TABLES.items():
        for words in table.commands:
            found.append((name, table, command(words, table, options)))
    return found


def test_every_command_is_one_of_this_package(tmp_path: Path) -> None:
    checked = {"eval": 0, "score": 0, "calibrate": 0}
    for name, table, words in commands(tmp_path):
        assert words[0] == "vlmfix" and not any("{" in word.replace("{question}", "") for word in words), name
        options = command_parser().parse_args(words[1:])
        checked[words[1]] += 1
        if words[1] == "calibrate":
            assert options.method in SEARCHES
            recipe = {"method": options.method}
            options.out.write_text(json.dumps(recipe))  # for the evaluation behind it
        elif words[1] == "eval":
            specs = plan_methods(EvalOptions.from_arguments(options))
            for spec in specs:
                spec.build()  # Every parameter exists and is in range.
            assert [spec.label for spec in specs] == [row.method for row in table.rows], name
            assert options.out.parent == tmp_path and options.out.name in table.runs, name
            assert options.out == tmp_path / name or options.out.name.startswith(f"{name}-seed"), name
            assert not options.controls
        else:
            assert options.out.stem in [row.method for row in table.rows]
    assert all(checked.values())


def test_every_figure_has_a_source_and_is_one_we_measure() -> None:
    for name, table in TABLES.items():
        assert table.source and table.label in LABELS, name
        for row in (*table.rows, *table.quoted):
            assert row.figures and set(row.spread) <= set(row.figures), name
            for key, value in row.figures.items():
                figure = key.partition(".")[2]
                assert figure == "mean_f1" or figure_of(key), key
                assert 1 < value < 100 or figure == "length_words", (name, key)
        if table.model is not None:
            assert len(table.runs) == sum(words[1] == "eval" for words in table.commands)
            low, high = table.minutes
            assert 1 < low <= high < 600
            assert table.captions or table.questions, name


def test_listing_and_description(capsys: pytest.CaptureFixture[str]) -> None:
    done = subprocess.run(
        [str(Path(__file__).resolve().parents[3] / "scripts" / "reproduce")],
        capture_output=True,
        text=True,
        env={"PYTHON": sys.executable, "PATH": "/usr/bin:/bin"},
    )
    assert done.returncode == 0 and "We have run none of the evaluations" in done.stdout
    for name in TABLES:
        assert name in done.stdout
        assert vlmfix_main(["reproduce", name]) == 0
        text = capsys.readouterr().out
        assert "source: " in text and "vlmfix " in text
        assert ("An estimate, not measured" in text) == (TABLES[name].model is not None)
    assert vlmfix_main(["reproduce", "vhr-llava15-chair", "--data", "here", "--model", "there", "--out", "o"]) == 0
    text = capsys.readouterr().out
    assert "--model there --data here" in text and "--out o/vhr-llava15-chair-seed4" in text
    assert "33.32 ± 1.31" in text and "read in the paper" in text
    with pytest.raises(SystemExit):
        vlmfix_main(["reproduce", "vhr-llava16"])


def test_the_matrix_of_the_independent_rerun_is_printed_cell_by_cell(capsys: pytest.CaptureFixture[str]) -> None:
    assert vlmfix_main(["reproduce", "--matrix"]) == 0
    text = capsys.readouterr().out
    rows = {tuple(line.split()[:2]): line.split()[2:] for line in text.splitlines() if line[:3] in ("ins", "lla")}
    assert len(rows) == 12, "three models, the stock model and three methods with figures"
    published = [46.6, 14.8, 79.6, 88.1, 7.4, 48.7, 31.3, 3.4, 32.13, 2.19, 60]
    assert [float(cell) for cell in rows["llava15", "none"]] == published
    assert [float(cell) for cell in rows["llavanext", "m3id"]] == [40.8, 12.3, 65.2, 189.6, 13.4, 60.4, 61.3, 5.5]
    assert [float(cell) for cell in rows["instructblip", "(agla)"]] == [
        51,
        13.5,
        72.4,
        106.1,
        7.5,
        54,
        35.1,
        3.8,
        1.9,
        62,
    ]
    assert max(map(len, text.splitlines())) <= 120
    assert vlmfix_main(["reproduce", "assess-llava15-chair"]) == 0
    said = capsys.readouterr().out
    assert "(agla)" in said and "--method vcd m3id" in said and "sampled" in said


def test_nothing_runs_before_everything_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started: list[list[str]] = []

    def start(words: list[str]) -> SimpleNamespace:
        started.append(words)
        return SimpleNamespace(returncode=3 if len(started) == 2 else 0)

    monkeypatch.setattr(subprocess, "run", start)
    assert vlmfix_main(["reproduce", "vhr-llava15-pope", "--model", str(tmp_path / "none"), "--run"]) == 2
    message = capsys.readouterr().err
    for part in ("--data DIR", "--pope DIR", f"the checkpoint {tmp_path / 'none'}"):
        assert part in message
    data = build_coco_folder(tmp_path / "c", num_images=2)
    model = build_tiny_llava(tmp_path / "m")
    words = ["vhr-llava15-pope", "--model", str(model), "--data", str(data), "--run", "--pope"]
    assert vlmfix_main(["reproduce", *words, str(tmp_path / "absent")]) == 2
    assert "there is no such folder" in capsys.readouterr().err
    assert vlmfix_main(["reproduce", *words, str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert "there is no coco_pope_popular.json" in message and "--data" not in message and "checkpoint" not in message
    assert not started
    for split in ("random", "popular", "adversarial"):
        (tmp_path / f"coco_pope_{split}.json").write_text("{}")
    assert vlmfix_main(["reproduce", *words, str(tmp_path)]) == 0
    assert started[0][:4] == [sys.executable, "-m", "vlmfix", "eval"] and len(started) == 1
    with pytest.raises(VlmfixError, match="the command above ended with status 3"):
        run_commands([["vlmfix", "methods"]] * 3, needs_gpu=False, show=str)
    assert len(started) == 2, "nothing runs behind a command that failed"


TRUTH = {i: ["dog"] if i % 2 else ["cup", "cat"] for i in range(40)}


def write_run(
    folder: Path, *, chair: dict[str, dict[int, str]] | None = None, pope: dict[str, list[str]] | None = None
) -> Path:
    """A run folder with what ``--check`` reads."""
    folder.mkdir(parents=True)
    results = {"methods": [], "settings": {}, "settings_digest": "d", "command": "vlmfix eval"}
    (folder / "results.json").write_text(json.dumps(results))
    parts = {}
    if chair is not None:
        tables = {name: score_captions(captions, TRUTH, ChairMatcher()) for name, captions in chair.items()}
        parts["chair"] = counts.benchmark_counts(tables)
    if pope is not None:
        labels, ids = [True, False] * 20, [i // 4 for i in range(40)]
        splits = ["random"] * 10 + ["popular"] * 30
        answered = {name: score_labels(labels, texts, image_ids=ids, splits=splits) for name, texts in pope.items()}
        parts["pope"] = counts.benchmark_counts(answered)
    counts.write_counts(folder / counts.COUNTS, "d", {}, parts)
    return folder


def test_check_of_one_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    captions = {
        "none": {i: "A dog and a car." if i % 4 else "A dog." for i in TRUTH},
        "vhr": {i: "A dog." for i in TRUTH},
        "eah": {i: "A dog and a bus." for i in TRUTH},
    }
    folder = write_run(tmp_path / "r", chair=captions)
    assert vlmfix_main(["reproduce", "vhr-llava15-chair", "--check", str(folder)]) == 0
    out = capsys.readouterr().out.splitlines()
    line = next(line for line in out if line.startswith("vhr ") and "chair.chair_s" in line)
    assert "33.32 ± 1.31" in line and " 50.0 [" in line  # every second image has no dog
    line = next(line for line in out if line.startswith("vhr - none") and "chair.chair_s" in line)
    assert "-16.36" in line and " -50.0 [" in line
    line = next(line for line in out if line.startswith("none") and "length_words" in line)
    assert "83.06" in line and " 4.2 [" in line and line.endswith("outside")


def test_check_of_several_runs_and_of_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed in range(5):
        texts = {i: "A dog." if i % 2 or i > 2 * seed else "A cup." for i in TRUTH}
        write_run(tmp_path / f"vhr-llava15-chair-seed{seed}", chair={"none": texts, "vhr": texts, "eah": texts})
    assert vlmfix_main(["reproduce", "vhr-llava15-chair", "--out", str(tmp_path), "--check"]) == 0
    rates = [100 * (19 - seed) / 40 for seed in range(5)]
    expected = f"{np.mean(rates):.1f} ± {np.std(rates, ddof=1):.1f}"
    assert expected in capsys.readouterr().out
    assert vlmfix_main(["reproduce", "vhr-llava15-chair", "--check", str(tmp_path / "absent")]) == 2
    assert "no such run folder" in capsys.readouterr().err
    folder = write_run(tmp_path / "r", chair={"none": dict.fromkeys(TRUTH, "A dog.")})
    assert vlmfix_main(["reproduce", "vhr-llava15-chair", "--check", str(folder)]) == 2
    assert "has no method 'vhr'" in capsys.readouterr().err


def test_mean_f1_of_the_splits(tmp_path: Path) -> None:
    answers = {"none": ["Yes"] * 40, "vhr": ["Yes", "No"] * 10 + ["Yes"] * 20}
    folder = write_run(tmp_path / "r", pope=answers)
    table = TABLES["vhr-llava15-pope"]
    found = measured(table, [folder], "pope.mean_f1", "vhr")
    popular = 2 * 15 / (25 + 15)  # of 30 questions 15 are yes, and 25 answers
    assert found.value == pytest.approx(100 * (1 + popular) / 2)
    assert found.low < found.value < found.high
    assert measured(table, [folder], "pope.mean_f1", "none").value == pytest.approx(100 * 2 / 3)
    difference = measured(table, [folder], "pope.mean_f1", "vhr", "none")
    assert difference.value == pytest.approx(100 * ((1 + popular) / 2 - 2 / 3)) and not math.isnan(difference.low)


@needs_data("chair_captions/opera", "chair_gt", "nltk_data")
def test_the_released_captions_give_the_printed_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    nltk = pytest.importorskip("nltk")
    monkeypatch.setattr(nltk.data, "path", [str(DATA / "nltk_data")])
    monkeypatch.setattr(subprocess, "run", lambda words: SimpleNamespace(returncode=vlmfix_main(words[3:])))
    for name in ("greedy", "beam5", "ours"):
        (tmp_path / f"{name}.jsonl").symlink_to(DATA / f"chair_captions/opera/llava-1.5_{name}.jsonl")
    truth = DATA / "chair_gt/chair_gt_pattern_trainval2014.json.gz"
    words = [
        "opera-released-captions",
        "--captions",
        str(tmp_path),
        "--data",
        str(truth),
        "--out",
        str(tmp_path / "out"),
    ]
    assert vlmfix_main(["reproduce", *words, "--run"]) == 0
    capsys.readouterr()
    assert vlmfix_main(["reproduce", *words, "--check"]) == 0
    out = capsys.readouterr().out
    assert out.count("  same") == 6 and "differs" not in out
