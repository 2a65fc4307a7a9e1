"""vlmfix compare: pairs by hand, closed forms, runs that share little or nothing, and what it prints and writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vlmfix.cli import main
from vlmfix.errors import DataError
from vlmfix.evals.benchmarks.chair.figures import score_captions
from vlmfix.evals.benchmarks.coco_objects import ChairMatcher
from vlmfix.evals.benchmarks.yes_no import score_labels
from vlmfix.evals.compare.compare import compare_runs
from vlmfix.evals.scores import counts
from vlmfix.evals.stats.table import Table
from vlmfix.evals.stats.tests import holm

MATCHER = ChairMatcher()
VERSIONS = {"vlmfix": "0.1.0", "torch": "2.13.0"}


def write(
    folder: Path, settings: dict[str, Any], parts: dict[str, Any], rows: list[dict[str, Any]], **more: Any
) -> Path:
    """A run folder with hand-made tables."""
    folder.mkdir()
    settings = {"seed": 0, "versions": VERSIONS, **settings}
    results = {
        "methods": rows,
        "settings": settings,
        "settings_digest": "d",
        "command": f"vlmfix eval --out {folder.name}",
        "model": "m",
        "data": "c",
        **more,
    }
    (folder / "results.json").write_text(json.dumps(results))
    images = more.get("images", {i: f"file {i}" for i in range(1, 1000)})
    counts.write_counts(folder / counts.COUNTS, "d", images, parts)
    return folder


def entry(label: str, role: str = "method", **more: Any) -> dict[str, Any]:
    return {"label": label, "describe": label, "role": role, "parent": None, "params": {"method": label}, **more}


def chair_run(
    folder: Path,
    captions: dict[str, dict[int, str]],
    truth: dict[int, list[str]],
    *,
    prompt: str = "Describe.",
    mode: str = "original",
    controls: dict[str, dict[int, str]] | None = None,
    **more: Any,
) -> Path:
    tables = {label: score_captions(said, truth, MATCHER) for label, said in captions.items()}
    ids = sorted(next(iter(captions.values())))
    stopped = {label: {"early stop": score_captions(c, truth, MATCHER)} for label, c in (controls or {}).items()}
    settings = {"chair": {"prompt": prompt, "mode": mode, "max_new_tokens": 64, "image_ids": ids, "ground_truth": "x"}}
    first = next(iter(captions))
    entries = [entry(label, "baseline" if label == first else "method", chair={"changed": 1}) for label in captions]
    return write(folder, settings, {"chair": counts.benchmark_counts(tables, stopped)}, entries, **more)


def pope_run(folder: Path, said: dict[str, list[str]], questions: list[tuple[int, str, bool]], **more: Any) -> Path:
    labels = [label for *_, label in questions]
    ids = [image_id for image_id, *_ in questions]
    told = {"image_ids": ids, "splits": ["random"] * len(ids), "items": [q for _, q, _ in questions]}
    tables = {name: score_labels(labels, answers, **told) for name, answers in said.items()}
    first = next(iter(said))
    entries = [
        entry(name, "baseline" if name == first else "method", pope={"changed": 1, "parser": "official"})
        for name in said
    ]
    settings = {"pope": {"prompt": "{question}", "max_new_tokens": 4, "image_ids": ids, "questions": folder.name}}
    return write(folder, settings, {"pope": counts.benchmark_counts(tables)}, entries, **more)


def compared(*folders: Path, **more: Any) -> dict[str, Any]:
    return compare_runs([counts.load_run(folder) for folder in folders], **more)


def by_label(found: dict[str, Any]) -> dict[str, Any]:
    return {row["label"]: row for row in found["methods"]}


TRUTH = {1: ["dog"], 2: ["cat"], 3: ["cup"], 4: ["car"]}
NONE = {1: "a dog and a cat", 2: "a cat", 3: "a cup and a dog", 4: "a car"}
GOOD = {1: "a dog", 2: "a cat", 3: "a cup", 4: "a car"}


# By hand


def test_differences_by_hand(tmp_path: Path) -> None:
    a = chair_run(tmp_path / "a", {"none": NONE, "m": GOOD}, TRUTH)
    b = chair_run(tmp_path / "b", {"none": NONE, "n": {**GOOD, 4: "a truck"}}, TRUTH)
    rows = by_label(compared(a, b))
    assert list(rows) == ["A:none", "A:m", "B:none", "B:n"]
    assert rows["A:none"]["chair"]["summary"]["chair_s"] == 0.5 and "differences" not in rows["A:none"]
    assert rows["A:none"]["chair"]["summary"]["chair_i"] == pytest.approx(2 / 6)
    assert rows["A:m"]["differences"]["chair.chair_s"]["estimate"] == -0.5
    assert rows["B:n"]["differences"]["chair.chair_s"]["estimate"] == -0.25
    assert rows["B:n"]["differences"]["chair.chair_i"]["estimate"] == pytest.approx(1 / 4 - 2 / 6)
    assert rows["B:n"]["differences"]["chair.recall"]["estimate"] == -0.25
    assert rows["B:none"]["chair"]["changed"] == 0, "the same captions are no difference"


def test_any_row_can_be_the_reference(tmp_path: Path) -> None:
    a = chair_run(tmp_path / "a", {"none": NONE, "m": GOOD}, TRUTH)
    b = chair_run(tmp_path / "b", {"none": NONE, "m": {**GOOD, 4: "a truck"}}, TRUTH)
    found = compared(a, b, against="B:m")
    assert found["reference"] == "B:m"
    assert by_label(found)["A:m"]["differences"]["chair.chair_s"]["estimate"] == -0.25
    assert "differences" not in by_label(found)["B:m"]
    assert list(by_label(compared(a, methods=["m"]))) == ["A:none", "A:m"]
    with pytest.raises(DataError, match=r"--against C:m: there is no such row; choose one of A:none, A:m"):
        compared(a, against="C:m")
    assert list(by_label(compared(a, methods=["A:m"]))) == ["A:none", "A:m"]
    assert list(by_label(compared(a, b, methods=["B:m"]))) == ["A:none", "B:none", "B:m"]
    assert list(by_label(compared(a, b, methods=["B:m"], against="A:m"))) == ["A:none", "A:m", "B:none", "B:m"]
    for unknown in ("x", "B:m"):
        with pytest.raises(DataError, match=f"no run has a method '{unknown}'; they have A:none, A:m"):
            compared(a, methods=[unknown])


def test_only_shared_images_count(tmp_path: Path) -> None:
    a = chair_run(tmp_path / "a", {"none": NONE}, TRUTH)
    fewer = {i: NONE[i] for i in (3, 1)}
    b = chair_run(tmp_path / "b", {"none": {**fewer, 9: "a dog"}}, {**TRUTH, 9: []})
    found = compared(a, b)
    assert found["shared"]["chair"] == {"rows": 2, "images": 2, "rows_of_runs": {"A": 4, "B": 3}, "notes": []}
    assert by_label(found)["A:none"]["chair"]["summary"]["chair_s"] == 1.0


def test_questions_are_paired_by_image_and_text_whatever_their_order(tmp_path: Path) -> None:
    questions = [(1, "dog?", True), (1, "cat?", False), (2, "dog?", False), (3, "cup?", True)]
    a = pope_run(tmp_path / "a", {"none": ["yes", "no", "no", "no"]}, questions)
    order = [3, 1, 0]
    b = pope_run(tmp_path / "b", {"none": ["yes", "yes", "yes"]}, [questions[i] for i in order])
    found = compared(a, b)
    row = by_label(found)["B:none"]
    assert by_label(found)["A:none"]["pope"]["summary"]["accuracy"] == pytest.approx(2 / 3)
    assert row["differences"]["pope.accuracy"]["estimate"] == 0.0
    mcnemar = row["pope"]["paired"]["mcnemar"]
    assert mcnemar == {"questions": 3, "only_method": 1, "only_baseline": 1, "p_value": 1.0, "p_holm": 1.0}
    assert found["shared"]["pope"]["notes"] == ["66.7 % of the shared questions have the answer yes, 50.0 % of A's"], (
        "what is shared is a selection, and says so"
    )


def test_interval_and_p_of_a_mean_difference_in_closed_form(tmp_path: Path) -> None:
    """Words per caption: the bootstrap of a paired mean is nearly normal with variance var(d) / n."""
    n, rng = 600, np.random.default_rng(0)
    lengths = rng.integers(1, 9, size=(2, n))
    truth: dict[int, list[str]] = {i: [] for i in range(1, n + 1)}
    said = [{i: " ".join(["word"] * row[i - 1]) for i in truth} for row in lengths]
    a = chair_run(tmp_path / "a", {"none": said[0]}, truth)
    b = chair_run(tmp_path / "b", {"none": said[1]}, truth)
    interval = by_label(compared(a, b))["B:none"]["differences"]["chair.length_words"]
    d = lengths[1] - lengths[0]
    assert interval["estimate"] == pytest.approx(d.mean())
    half = 1.959964 * d.std() / np.sqrt(n)
    assert (interval["high"] - interval["low"]) / 2 == pytest.approx(half, rel=0.08)


def test_holm_counts_the_rows_that_changed_something(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    truth = {i: ["dog"] for i in range(1, 41)}

    def said(rate: float) -> dict[int, str]:
        return {i: "a dog and a cat" if rng.random() < rate else "a dog" for i in truth}

    none = said(0.6)
    a = chair_run(tmp_path / "a", {"none": none, "p": said(0.3), "q": said(0.45)}, truth)
    b = chair_run(tmp_path / "b", {"none": none, "r": said(0.4)}, truth)
    found = compared(a, b)
    rows = by_label(found)
    family = [rows[name]["differences"]["chair.chair_i"] for name in ("A:p", "A:q", "B:r")]
    assert [f["p_holm"] for f in family] == pytest.approx(holm([f["p_value"] for f in family]))
    assert found["corrections"]["rows"] == 3


def test_the_whole_of_it_equals_scipy_and_statsmodels(tmp_path: Path) -> None:
    """McNemar and Holm of rows from two run folders, from the answers alone."""
    tables = pytest.importorskip("statsmodels.stats.contingency_tables", reason="statsmodels is not installed")
    multitest = pytest.importorskip("statsmodels.stats.multitest", reason="statsmodels is not installed")
    rng = np.random.default_rng(3)
    questions = [(i, "dog?", bool(rng.random() < 0.5)) for i in range(1, 121)]
    right = {name: rng.random(120) < rate for name, rate in (("none", 0.6), ("p", 0.8), ("q", 0.7), ("r", 0.62))}

    def said(name: str) -> list[str]:
        return ["yes" if label == ok else "no" for (*_, label), ok in zip(questions, right[name], strict=True)]

    a = pope_run(tmp_path / "a", {name: said(name) for name in ("none", "p", "q")}, questions)
    b = pope_run(tmp_path / "b", {name: said(name) for name in ("none", "r")}, questions)
    rows = by_label(compared(a, b))
    tests = [rows[label]["pope"]["paired"]["mcnemar"] for label in ("A:p", "A:q", "B:r")]
    expected = []
    for name in ("p", "q", "r"):
        own, other = right[name], right["none"]
        cells = [[(own & other).sum(), (own & ~other).sum()], [(~own & other).sum(), (~own & ~other).sum()]]
        expected.append(tables.mcnemar(cells, exact=True).pvalue)
    assert [test["p_value"] for test in tests] == pytest.approx(expected, rel=1e-9)
    corrected = multitest.multipletests(expected, method="holm")[1]
    assert [test["p_holm"] for test in tests] == pytest.approx(corrected.tolist(), rel=1e-9)


# Controls


def test_controls_and_words_are_those_of_the_own_run(tmp_path: Path) -> None:
    truth = {i: ["dog", "cup"] for i in range(1, 61)}
    none = {i: "a dog and a cat" for i in truth}
    better = {i: "a dog" if i % 4 else "a dog and a cat" for i in truth}
    a = chair_run(tmp_path / "a", {"none": none, "m": better}, truth, controls={"m": none})
    b = chair_run(tmp_path / "b", {"none": better, "m": better}, truth, controls={"m": better})
    found = compared(a, b)
    lines = {(line["method"], line["metric"]): line for line in found["controls"]}
    assert lines["A:m", "chair.chair_i"]["verdict_holm"] == "better"
    assert lines["A:m", "chair.chair_i"]["matched"] == "recall 50.0, 50.0"
    assert lines["B:m", "chair.chair_i"]["verdict_holm"] == "same"
    words = {row["label"]: row["verdict"] for row in found["methods"]}
    assert words == {"A:none": "", "A:m": "better", "B:none": "", "B:m": "unclear"}
    assert by_label(found)["B:m"]["differences"]["chair.chair_i"]["estimate"] < 0, "compared with A's baseline"


# What cannot be compared


def test_other_ground_truth_or_image_files_are_other_rows(tmp_path: Path) -> None:
    a = chair_run(tmp_path / "a", {"none": NONE}, TRUTH)
    b = chair_run(tmp_path / "b", {"none": NONE}, {**TRUTH, 2: ["dog"]})
    found = compared(a, b)
    assert found["shared"]["chair"]["rows"] == 3
    assert found["shared"]["chair"]["notes"] == [
        "1 rows have one id but another image file or ground truth in the runs: left out"
    ]
    c = chair_run(tmp_path / "c", {"none": NONE}, TRUTH, images={1: "file 1", 2: "other", 3: "file 3", 4: "other"})
    assert compared(a, c)["shared"]["chair"]["rows"] == 2
    d = chair_run(tmp_path / "d", {"none": NONE}, TRUTH, images={i: "other" for i in TRUTH})
    with pytest.raises(DataError, match=r"the runs share no row \(A 4, B 4\) \(4 rows have one id but"):
        compared(a, d)


def test_images_that_are_shared_in_part_are_left_out_where_rows_belong_together(tmp_path: Path) -> None:
    def run(name: str, rows: list[tuple[int, str]]) -> Path:
        ones = np.ones(len(rows), dtype=np.bool_)
        columns = {name: ones for name in ("label", "prediction", "correct", "unparsed", "images", "both_correct")}
        ids = np.array([image for image, _ in rows], dtype=np.int64)
        table = Table(ids, columns, ("count",) * len(rows), tuple(text for _, text in rows))
        part = counts.benchmark_counts({"none": table})
        entries = [entry("none", "baseline", mme={"changed": 1})]
        return write(tmp_path / name, {"mme": {"prompt": "{question}"}}, {"mme": part}, entries)

    a, b = run("a", [(1, "x"), (1, "y"), (2, "x"), (2, "y")]), run("b", [(1, "x"), (1, "y"), (2, "x"), (2, "z")])
    shared = compared(a, b)["shared"]["mme"]
    assert shared["rows"] == 2
    assert shared["notes"] == ["1 shared rows are of images with others that not all runs have: left out"]


def test_no_image_in_common(tmp_path: Path) -> None:
    a = chair_run(tmp_path / "a", {"none": {1: NONE[1]}}, TRUTH)
    b = chair_run(tmp_path / "b", {"none": {2: NONE[2]}}, TRUTH)
    with pytest.raises(DataError, match=r"nothing can be compared.*\n  chair: the runs share no row \(A 1, B 1\)"):
        compared(a, b)


def test_prompts_and_modes_must_agree(tmp_path: Path) -> None:
    a = chair_run(tmp_path / "a", {"none": NONE}, TRUTH)
    b = chair_run(tmp_path / "b", {"none": GOOD}, TRUTH, prompt="What is this?")
    with pytest.raises(DataError, match=r"different settings 'prompt': A 'Describe.', B 'What.*--across-prompts"):
        compared(a, b)
    found = compared(a, b, across_prompts=True)
    assert by_label(found)["B:none"]["differences"]["chair.chair_s"]["estimate"] == -0.5
    assert found["differing_settings"]["chair.prompt"] == {"A": "Describe.", "B": "What is this?"}
    c = chair_run(tmp_path / "c", {"none": NONE}, TRUTH, mode="nltk")
    with pytest.raises(DataError, match="different settings 'mode'"):
        compared(a, c, across_prompts=True)


def test_a_benchmark_that_one_run_lacks_is_left_out_with_the_reason(tmp_path: Path) -> None:
    question = [(1, "dog?", True)]
    both = chair_run(tmp_path / "a", {"none": NONE}, TRUTH)
    stored = json.loads((both / counts.COUNTS).read_text())
    pope = pope_run(tmp_path / "p", {"none": ["yes"]}, question)
    stored["benchmarks"] |= json.loads((pope / counts.COUNTS).read_text())["benchmarks"]
    (both / counts.COUNTS).write_text(json.dumps(stored))
    other = chair_run(tmp_path / "b", {"none": GOOD}, TRUTH)
    found = compared(both, other)
    assert found["left_out"] == {"pope": "B did not run it"} and list(found["shared"]) == ["chair"]
    with pytest.raises(DataError, match=r"chair: B did not run it\n  pope: A did not run it"):
        compared(other, pope)


# The verb


def test_what_it_prints_and_writes(tmp_path: Path, capsys: Any) -> None:
    a = chair_run(tmp_path / "a", {"none": NONE, "m": GOOD}, TRUTH, controls={"m": NONE})
    b = chair_run(tmp_path / "b", {"none": {1: NONE[1], 2: NONE[2], 9: "a dog"}}, {**TRUTH, 9: []})
    results = json.loads((b / "results.json").read_text())
    results["settings"]["versions"] = {**VERSIONS, "torch": "2.14.0"}
    (b / "results.json").write_text(json.dumps(results))
    assert main(["compare", str(a), str(b), "--out", str(tmp_path / "out")]) == 0
    text = capsys.readouterr().out
    for part in (
        f"A is {a}: m on c",
        "differs: versions.torch: 2.13.0 in A, 2.14.0 in B",
        "CHAIR on 2 captions about 2 images, those that all runs share (A has 4, B has 3)",
        "- A:none",
        "B:none",
        "early stop",
        "written:",
    ):
        assert part in text
    assert max(map(len, text.splitlines())) <= 120 + len(str(tmp_path))
    stored = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert stored["reference"] == "A:none" and len(stored["methods"]) == 3
    markdown = (tmp_path / "out" / "compare.md").read_text()
    assert "| `versions.torch` | 2.13.0 | 2.14.0 |" in markdown and "A: vlmfix eval --out a" in markdown
    assert main(["compare", str(a), "--out", str(tmp_path / "only.md")]) == 0
    assert (tmp_path / "only.md").is_file() and not (tmp_path / "only.json").exists()


def test_errors_are_one_line(tmp_path: Path, capsys: Any) -> None:
    a = chair_run(tmp_path / "a", {"none": NONE}, TRUTH)
    assert main(["compare", str(a), str(tmp_path / "nothing")]) == 2
    assert "no such run folder" in capsys.readouterr().err
    assert main(["compare", str(a / "results.json")]) == 2
    assert "vlmfix score" in capsys.readouterr().err
    (a / counts.COUNTS).unlink()
    assert main(["compare", str(a)]) == 2
    assert "Score it again, which generates nothing: vlmfix eval --out a --rescore" in capsys.readouterr().err
