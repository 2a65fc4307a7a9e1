"""counts.json: what is kept of a run's tables, and what of a folder it is refused with."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from declared import STATISTICS

from vlmfix.errors import DataError
from vlmfix.evals.benchmarks.chair.figures import score_captions
from vlmfix.evals.benchmarks.chair.text_quality import score_texts
from vlmfix.evals.benchmarks.coco_objects import ChairMatcher
from vlmfix.evals.benchmarks.yes_no import score_labels
from vlmfix.evals.scores import counts

CAPTIONS = ({1: "a dog and a cat", 2: "a cup", 3: "a car. a car"}, {1: "a dog", 2: "a tree", 3: "a bus"})
TRUTH = {1: ["dog"], 2: ["cup", "cat"], 3: ["bus"]}


def tables(benchmark: str) -> dict[str, Any]:
    if benchmark == "chair":
        return {name: score_captions(c, TRUTH, ChairMatcher()) for name, c in zip("ab", CAPTIONS, strict=True)}
    if benchmark == "text":
        return {name: score_texts(c, dict.fromkeys(c, name == "a")) for name, c in zip("ab", CAPTIONS, strict=True)}
    labels, ids = [True, False, True], [1, 1, 2]
    said = (["yes", "no", "perhaps"], ["no", "no", "no"])
    return {
        name: score_labels(labels, words, image_ids=ids, parser="vlmeval", scores=[0.1, -2.0, float(i)])
        for i, (name, words) in enumerate(zip("ab", said, strict=True))
    }


def write_run(folder: Path, parts: dict[str, Any], **more: Any) -> Path:
    folder.mkdir(exist_ok=True)
    results = {"methods": [], "settings": {}, "settings_digest": "d", "command": "vlmfix eval --out x", **more}
    (folder / "results.json").write_text(json.dumps(results))
    counts.write_counts(folder / counts.COUNTS, "d", {1: "0" * 64}, parts)
    return folder


@pytest.mark.parametrize("benchmark", ["chair", "pope", "text"])
def test_statistics_read_what_is_loaded_as_they_read_the_table(benchmark: str, tmp_path: Path) -> None:
    made = tables(benchmark)
    part = counts.benchmark_counts(made, {"a": {"control": made["b"]}})
    loaded = counts.load_run(write_run(tmp_path / "run", {benchmark: part})).benchmarks[benchmark]
    assert list(loaded.methods) == ["a", "b"]
    for name, statistic in STATISTICS[benchmark].items():
        for label, table in made.items():
            assert statistic.of(loaded.methods[label]) == pytest.approx(statistic.of(table), nan_ok=True), name
        assert statistic.of(loaded.controls["a"]["control"]) == pytest.approx(statistic.of(made["b"]), nan_ok=True)
        stored = statistic.difference(loaded.methods["a"], loaded.methods["b"])
        direct = statistic.difference(made["a"], made["b"])
        assert repr(stored) == repr(direct)
    assert loaded.methods["a"].differs(loaded.methods["b"]) and not loaded.methods["a"].differs(loaded.methods["a"])


def test_rows_keep_what_they_are_about(tmp_path: Path) -> None:
    told = {"splits": ("s", "s", "t"), "items": ("dog?", "cat?", "dog?")}
    part = counts.benchmark_counts({name: replace(table, **told) for name, table in tables("pope").items()})
    loaded = counts.load_run(write_run(tmp_path / "run", {"pope": part}))
    table = loaded.benchmarks["pope"].methods["a"]
    assert table.keys == [(1, "s", "dog?"), (1, "s", "cat?"), (2, "t", "dog?")]
    assert table.truth == ("yes", "no", "yes") and loaded.images == {1: "0" * 16}
    taken = table.take([2, 0])
    assert taken.keys == [(2, "t", "dog?"), (1, "s", "dog?")] and taken.prediction.tolist() == [-1, 1]
    assert taken.label.dtype == np.bool_ and "label" in part["common"] and "prediction" not in part["common"]
    with pytest.raises(AttributeError, match="no column 'mentions'"):
        _ = table.mentions


def broken(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / counts.COUNTS).read_text())
    return found


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "results.json").unlink(), "no finished run: expected results.json"),
        (lambda f: (f / "results.json").write_text("{"), r"results\.json line 1: not readable JSON"),
        (lambda f: (f / "results.json").write_text("[]"), "expected a JSON object, found list"),
        (lambda f: (f / "results.json").write_text("{}"), "expected 'methods'"),
        (lambda f: (f / counts.COUNTS).unlink(), r"no counts.json .*Score it again.*vlmfix eval --out x --rescore"),
        (lambda f: (f / counts.COUNTS).write_bytes(b"\xff\xfe"), r"counts\.json line 1: expected UTF-8"),
        (lambda f: (f / counts.COUNTS).write_text("{}"), "another run"),
        (
            lambda f: (f / counts.COUNTS).write_text(json.dumps(broken(f) | {"benchmarks": {"pope": {}}})),
            "broken .*vlmfix eval --out x",
        ),
        (
            lambda f: (f / counts.COUNTS).write_text((f / counts.COUNTS).read_text().replace('"kind":"bool"', '"k":1')),
            "broken",
        ),
    ],
)
def test_broken_folders_say_what_to_do(damage: Any, message: str, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", {"pope": counts.benchmark_counts(tables("pope"))})
    counts.load_run(folder)
    damage(folder)
    with pytest.raises(DataError, match=message):
        counts.load_run(folder)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such run folder"):
        counts.load_run(tmp_path / "nothing")


def test_columns_of_another_length_are_broken(tmp_path: Path) -> None:
    part = counts.benchmark_counts(tables("pope"))
    part["methods"]["a"]["prediction"]["values"].pop()
    with pytest.raises(DataError, match="'prediction' has"):
        counts.load_run(write_run(tmp_path / "run", {"pope": part}))
