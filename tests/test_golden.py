"""Every verb gives what it gave before: the outputs on file in ``golden/``, and what older versions wrote still opens.

``python tests/golden/make.py`` writes the files anew and says which figures changed.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("nltk")
pytest.importorskip("matplotlib")
pytest.importorskip("optuna")

from golden.bench import HERE, Bench, Said, as_json, lacking, on_file, read, say
from golden.cases import CASES, NEED_SHARED
from golden.compare import DROPPABLE, differences
from golden.surface import REFUSED

import vlmfix

OLD_RUN = ("--limit", 3, "--method", "vhr", "--no-controls")
"""What the run in ``golden/old_run`` was asked."""


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    folder = tmp_path_factory.mktemp("golden")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLMFIX_CACHE", str(folder / "cache"))
        yield Bench(folder)


@pytest.mark.parametrize("name", CASES)
def test_outputs_are_those_on_file(name: str, bench: Bench) -> None:
    if name in NEED_SHARED and (reason := lacking()) is not None:
        pytest.skip(reason)
    changed = differences(on_file(name), as_json(CASES[name](bench)))
    assert not changed, f"{len(changed)} changed, see golden/make.py:\n" + "\n".join(changed[:40])


@pytest.mark.parametrize("command", REFUSED)
def test_bad_commands_are_refused_with_what_is_wrong(
    command: str, bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    said = say(*command.split())
    assert said.status == 2 and "Traceback" not in said.err
    assert not [word for word in REFUSED[command] if word not in said.err], said.err
    assert not list(tmp_path.rglob("*.html")), "nothing is written"


def test_changed_figures_are_seen() -> None:
    before = {"a": {"seconds": 1}, "b": [0.25, 3, True], "text": "x"}
    assert differences(before, {**before, "new": 1}) == []
    assert differences(before, {**before, "b": [0.25 + 1e-14, 3, True]}) == []
    for after in ([0.2500001, 3, True], [0.25, 4, True], [0.25, 3, 1], [0.25, 3], [0.25, 3.0, None]):
        assert len(differences(before, {**before, "b": after})) == 1, after
    assert differences(before, {"a": 1, "b": before["b"]}) == [".a is 1, not {'seconds': 1}", ".text is gone"]


# What the version before wrote.


def opens(said: Said) -> bool:
    """Whether something old was opened; what is refused must say what to do."""
    if said.status == 2:
        assert re.search(r"again|type:?|write|start afresh|--no-resume|version", said.err), said.err
    else:
        assert said.status == 0, said.err
    return said.status == 0


@pytest.fixture
def old_run(tmp_path: Path) -> Path:
    return Path(shutil.copytree(HERE / "old_run", tmp_path / "old"))


def test_an_old_run_is_compared_and_drawn(old_run: Path, bench: Bench, tmp_path: Path) -> None:
    results = read(old_run / "results.json")
    said = say("compare", old_run, "--out", tmp_path / "c.json")
    if opens(said):
        none, vhr = read(tmp_path / "c.json")["methods"]
        for method, own in zip((none, vhr), results["methods"], strict=True):
            assert {"chair_s", "chair_i", "recall", "f1"} <= method["chair"]["summary"].keys()
            assert differences(method["chair"]["summary"], own["chair"]["summary"]) == []
            assert differences(method["pope"]["all"]["summary"], own["pope"]["all"]["summary"]) == []
        assert differences(results["methods"][1]["differences"], vhr["differences"]) == []
    if opens(say("compare", old_run, bench.run, "--out", tmp_path / "both.json")):
        labels = {method["label"] for method in read(tmp_path / "both.json")["methods"]}
        assert {"A:vhr", "B:vhr"} <= labels
    if opens(say("plot", old_run, "--out", tmp_path / "plots")):
        assert {path.name for path in (tmp_path / "plots").iterdir()} >= {"intervals.png"}
    if opens(said := say("power", old_run)):
        assert "vhr" in said.out


def test_an_old_run_is_scored_again(old_run: Path, bench: Bench) -> None:
    before, kept = read(old_run / "results.json"), (old_run / "answers.jsonl").read_bytes()
    if opens(say("eval", *OLD_RUN, "--out", old_run, "--rescore")):
        after = read(old_run / "results.json")
        assert differences(bench.tidy(before["methods"]), bench.tidy(after["methods"])) == []
    assert (old_run / "answers.jsonl").read_bytes() == kept, "answers are never lost"


@pytest.mark.parametrize("name", ["old_recipe", "old_calibration"])
def test_an_old_recipe_opens(name: str, bench: Bench, tmp_path: Path) -> None:
    written = json.loads((HERE / f"{name}.json").read_text())
    found = vlmfix.load_recipe(HERE / f"{name}.json")
    assert [method.to_dict()["method"] for method in found] == [method["method"] for method in written["methods"]]
    for method, old in zip(found, written["methods"], strict=True):
        known = {key: value for key, value in old.items() if key not in DROPPABLE}
        assert differences(known, as_json(method.to_dict())) == []
    vlmfix.save_recipe(tmp_path / "again.json", found)
    assert vlmfix.load_recipe(tmp_path / "again.json") == found
