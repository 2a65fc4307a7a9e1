"""ScienceQA: the official rule and figures by hand, refusals, the official cases, and a run."""

import json
from typing import Any

import benchmark_data
import pytest
from shared_data import DATA, needs_data

from vlmfix.evals.benchmarks.scienceqa.task import LETTERS, ScienceQuestion, read_letter, score_answers


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        *(("B", "B"), ("B. two", "B"), ("I think. The answer is B.", "B"), ("The answer is B, of course", "B")),
        *(("b", None), ("B\n", None), ("(B)", None), ("B.", None), ("The answer is B", None), ("", None)),
        *(("The answer is A. The answer is B.", None), ("The answer is Z.", "Z"), ("E. five", "E")),
    ],
)
def test_the_official_rule(text, letter):
    assert read_letter(text) == letter


def asked() -> list[ScienceQuestion]:
    choices = (("one", "two"), ("one", "two", "three"), ("one", "two"))
    return [ScienceQuestion(str(i), f"Which, {i}?", "", each, 1, i != 2) for i, each in enumerate(choices)]


def test_figures_by_hand():
    table = score_answers(asked(), ["B", "C", "B. two"])
    assert table.summary() == pytest.approx({"accuracy": 2 / 3, "image_accuracy": 1 / 2})
    counts = {"n": 3, "correct": 2, "with_image": 2, "correct_with_image": 1, "unparsed": 0}
    assert table.counts() == counts
    assert score_answers(asked()[::-1], ["B. two", "C", "B"]).summary() == table.summary()
    assert score_answers(asked(), ["(B)", "C", "E"]).counts()["unparsed"] == 1, "a letter without a choice is read"


@needs_data("expected_new.json")
def test_official_cases():
    for case in json.loads((DATA / "expected_new.json").read_text())["scienceqa"]["parser_cases"]:
        letter = read_letter(case["answer"])
        place = LETTERS.index(letter) if letter in tuple(LETTERS[: case["choices"]]) else -1
        assert place == case["llava_index"], case


def problems(**changes: Any) -> dict[str, Any]:
    made = {
        q.id: {"question": q.question, "choices": q.choices, "answer": q.right, "hint": "Look."}
        | {"image": "image.png" if q.has_image else None, "split": "test"}
        for q in asked()
    }
    return {**made, "9": {**made["0"], "split": "train"}, **changes}


@pytest.fixture
def questions(tmp_path):
    """``problems.json`` with some problems changed, as words of the command line."""

    def write(**changes: Any) -> tuple[str, str]:
        path = tmp_path / "problems.json"
        path.write_text(json.dumps(problems(**changes)))
        return "--questions", str(path)

    return write


def rows() -> list[dict[str, str]]:
    return [{"question_id": q.id, "prompt": f"<image>\n{q.question}\nOptions", "text": "B. two"} for q in asked()]


def test_llavas_rows_are_scored_with_the_problems(score, questions):
    found = score("scienceqa", rows(), *questions())
    assert found["counts"] == {"n": 3, "correct": 3, "with_image": 2, "correct_with_image": 2, "unparsed": 0}
    assert "ScienceQA: 3 questions, 2 with an image" in score.said
    assert score("scienceqa", rows()[1:], *questions(), "--subset")["counts"]["n"] == 2
    assert "SUBSET: 2 of 3 questions" in score.said


@pytest.mark.parametrize(
    ("answers", "changes", "message"),
    [
        (rows()[1:], {}, "answers 2 of 3 questions"),
        ([*rows(), {**rows()[0], "text": "A"}], {}, "is answered already"),
        (rows(), {"0": {**problems()["0"], "answer": 2}}, "the place of the right choice, from 0 to 1"),
        (rows(), {"0": {**problems()["0"], "choices": ["one"]}}, "expected two to five choices"),
        (rows(), {i: {"split": "val"} for i in "012"}, "holds no problem of the split test"),
    ],
)
def test_refusals(score, questions, answers, changes, message):
    assert message in score.error("scienceqa", answers, *questions(**changes))


def test_a_file_that_holds_no_problems(score, tmp_path):
    (tmp_path / "p.json").write_text("[1]")
    assert "expected problems.json" in score.error("scienceqa", rows(), "--questions", tmp_path / "p.json")


def test_a_run_and_its_files(tmp_path, monkeypatch, score):
    import datasets

    from vlmfix.evals.data import source

    scenes = benchmark_data.scenes(2)
    monkeypatch.setattr(source, "default_cache_dir", lambda: tmp_path / "cache" / "testbed")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    pictures = [*(str(path) for path, _ in scenes), None]
    given = [{**problems()[str(i)], "image": path} for i, path in enumerate(pictures)]
    data = datasets.Dataset.from_list(given)
    data.cast_column("image", datasets.Image()).to_parquet(str(tmp_path / "a.parquet"))
    part, files = score.run("scienceqa", f"datasets:{tmp_path / 'a.parquet'}")
    assert part["counts"]["n"] == 3 and part["counts"]["with_image"] == 2
    written = ("--questions", files / "problems.json")
    assert score("scienceqa", files / "scienceqa.jsonl", *written)["counts"] == part["counts"]
    (prompt, *_) = [json.loads(line)["prompt"] for line in (files / "scienceqa.jsonl").read_text().splitlines()]
    assert prompt == "<image>\nContext: Look.\nWhich, 0?\nA. one\nB. two"
