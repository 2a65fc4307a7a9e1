"""MMStar: the official rule and figures by hand, refusals, the official counts, and a run."""

from typing import Any

import benchmark_data
import pytest
from shared_data import DATA, needs_data, official

from vlmfix.evals.benchmarks.mmstar.task import LETTERS, MmstarQuestion, is_right, score_answers


@pytest.mark.parametrize("text", ["C", "(C) x", "The answer is C.", "option c", " C\n", "can not say"])
def test_right(text):
    assert is_right(text, "C")


@pytest.mark.parametrize("text", ["**C**", "Answer: C", "", "the answer is: C", "D"])
def test_wrong(text):
    assert not is_right(text, "C")


def asked() -> list[MmstarQuestion]:
    places = [("math", "geometry")] * 2 + [("instance reasoning", "single-instance reasoning")]
    return [MmstarQuestion(i, f"Question {i}?\nOptions: A: x, B: y", "C", *place) for i, place in enumerate(places)]


def test_figures_by_hand():
    table = score_answers(asked(), ["C", "**C**", "c"])
    assert table.summary() == pytest.approx({"accuracy": 2 / 3, "average": 3 / 4})
    assert table.counts() == {"n": 3, "correct": 2, "unparsed": 1}
    assert score_answers(asked()[::-1], ["c", "**C**", "C"]).summary() == table.summary()


def rows() -> list[dict[str, Any]]:
    return [
        {"index": q.number, "question": q.text, "answer": q.right, "category": q.axis, "l2_category": q.sub_axis}
        | {"prediction": "C it is"}
        for q in asked()
    ]


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        (rows(), "answers 3 of 1500 questions"),
        ([{k: v for k, v in row.items() if k != "prediction"} for row in rows()], "expected one of prediction"),
        ([{**rows()[0], "answer": "E"}], "expected the right letter"),
        ([{**rows()[0], "l2_category": "recognition"}], "has no axis 'math' with 'recognition'"),
        ([{**rows()[0], "index": 1500}], "expected an index from 0 to 1499"),
        ([*rows(), {**rows()[0], "prediction": "B"}], "is answered already"),
    ],
)
def test_refusals(score, answers, message):
    assert message in score.error("mmstar", answers, *([] if "1500 q" in message else ["--subset"]))


@needs_data("expected_new.json", "new/mmstar")
def test_official_figures(score):
    figures = official("expected_new.json")["mmstar"]
    expected, path = figures["synthetic"], DATA / "new/mmstar/answers_synthetic.jsonl"
    found = score("mmstar", path, "--subset")
    assert "SUBSET: 36 of 1500" in score.said
    assert (found["counts"]["n"], found["counts"]["correct"]) == (expected["rows"], expected["official_correct"])
    assert found["counts"]["correct"] / 1500 == expected["official_final_score_constant_1500"]
    assert {k: v["correct"] / v["n"] for k, v in found["sub_axes"].items()} == expected["official_axes"]
    axes = expected["official_axes"].values()
    assert found["summary"]["average"] == pytest.approx(sum(axes) / len(axes))
    for case in figures["parser_cases"]:
        letters = [letter for letter in LETTERS if is_right(case["answer"], letter)]
        assert case["official_letter"] in (letters or [None])


def test_a_run_and_its_files(tmp_path, monkeypatch, score):
    import datasets

    from vlmfix.evals.data import source

    scenes = benchmark_data.scenes(3)
    monkeypatch.setattr(source, "default_cache_dir", lambda: tmp_path / "cache" / "testbed")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    data = datasets.Dataset.from_list(
        [{**row, "image": str(path)} for row, (path, _) in zip(rows(), scenes, strict=True)]
    )
    data.cast_column("image", datasets.Image()).to_parquet(str(tmp_path / "a.parquet"))
    part, files = score.run("mmstar", f"datasets:{tmp_path / 'a.parquet'}")
    assert part["counts"]["n"] == 3 and part["asked"] == 3
    assert score("mmstar", files / "mmstar.jsonl", "--subset")["counts"] == part["counts"]
