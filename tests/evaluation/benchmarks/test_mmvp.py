"""MMVP: both rules, pairs and corrected labels by hand, refusals, the figures of lmms-eval, and a run."""

import json
import shutil
from pathlib import Path
from typing import Any

import benchmark_data
import pytest
from scoring import changed
from shared_data import DATA, needs_data, official

from vlmfix.errors import DataError
from vlmfix.evals.benchmarks.mmvp.figures import MmvpQuestion, MmvpTable, parse_answer, score_answers
from vlmfix.evals.benchmarks.mmvp.task import Mmvp

OPTIONS = "(a) Open (b) Not open"


@pytest.mark.parametrize(
    ("text", "ours", "lmms"),
    [
        ("(a)", True, True),
        ("B", False, False),
        ("b)", False, False),
        ("The answer is (b).", False, False),
        ("I would say (b).", False, None),
        ("**A**", True, None),
        ("Open", True, None),
        ("It is not open.", False, None),
        ("(a) Not open", None, True),  # the letter and the words differ
        ("Neither (a) nor (b)", None, True),
        ("A dog", None, True),
        ("Both", None, False),
        ("Option A it is", True, True),
        ("Opened", None, None),
        ("", None, None),
    ],
)
def test_parsers(text, ours, lmms):
    assert parse_answer(text, OPTIONS) is ours
    assert parse_answer(text, OPTIONS, "lmms") is lmms


def test_unknown_parser():
    with pytest.raises(DataError, match="letter_or_text, lmms"):
        parse_answer("a", OPTIONS, "other")


def questions(truth: str) -> list[MmvpQuestion]:
    return [MmvpQuestion(i, f"Is door {(i + 1) // 2} open?", OPTIONS, a == "a") for i, a in enumerate(truth, 1)]


def counted(table: MmvpTable) -> tuple[int, ...]:
    counts = table.counts()
    return counts["correct"], counts["n"], counts["pairs_correct"], counts["pairs"]


def test_pairs_by_hand():
    asked, said = questions("abbaab"), ["(a)", "(b)", "(a)", "(a)", "B", "B"]
    assert counted(score_answers(asked, said)) == (4, 6, 1, 3)
    assert counted(score_answers(asked[::-1], said[::-1])) == (4, 6, 1, 3)
    assert counted(score_answers(asked, ["A"] * 6)) == (3, 6, 0, 3)
    assert counted(score_answers(asked[:5], said[:5])) == (3, 5, 1, 2)
    assert len(set(score_answers(asked, said).image_ids.tolist())) == 3


@pytest.mark.parametrize("labels", ["ab", "ba"])
def test_corrected_labels(labels):
    asked = [
        MmvpQuestion(number, "Are the tusks long or short?", "(a) Long (b) Short", label == "a")
        for number, label in zip((99, 100), labels, strict=True)
    ]
    table = score_answers(asked, ["(a)", "(b)"])  # whichever release the file is
    assert counted(table) == (2, 2, 1, 1)
    assert (table.counts()["correct_corrected"], table.counts()["pairs_correct_corrected"]) == (0, 0)
    others = [MmvpQuestion(99 + i, "Is it open?", OPTIONS, label == "a") for i, label in enumerate(labels)]
    table = score_answers(others, ["(a)", "(b)"])
    assert table.counts()["correct"] == table.counts()["correct_corrected"] == (2 if labels == "ab" else 0)


def test_what_is_no_pair_is_refused():
    for asked in (questions("aa"), [questions("ab")[0], MmvpQuestion(2, "Is it?", OPTIONS, False)]):
        with pytest.raises(DataError, match="opposite right answers"):
            score_answers(asked, ["a", "b"])
    with pytest.raises(DataError, match="answered twice"):
        score_answers([*questions("ab"), questions("ab")[0]], ["a", "b", "a"])


# Files and the command line.


def rows(truth: str = "abba") -> list[dict[str, Any]]:
    return [
        {"question_id": q.number, "prompt": q.text, "answer": "(a)" if q.label else "(b)"}
        | {"response": "It is open" if q.label else "b", "model_id": "none"}
        for q in questions(truth)
    ]


def table_file(folder: Path, asked: list[MmvpQuestion]) -> Path:
    """``Questions.csv``, whose first column is misspelt."""
    lines = [f"{q.number},{q.question},{q.options},{'(a)' if q.label else '(b)'}" for q in asked]
    folder.mkdir(exist_ok=True)
    path = folder / "Questions.csv"
    path.write_text("\n".join(["lndex,Question,Options,Correct Answer", *lines]) + "\n")
    return path


def test_ids_make_the_pairs(tmp_path, score):
    asked = ["--questions", table_file(tmp_path, questions("abba"))]
    assert score("mmvp", [rows()[i] for i in (2, 0, 3, 1)], *asked)["summary"]["pair_accuracy"] == 1.0
    assert "answers 3 of 4 images, and 1 of 2 pairs wholly" in score.error("mmvp", rows()[:3], *asked)
    assert score("mmvp", rows()[:3], *asked, "--subset")["counts"]["pairs"] == 1
    assert "SUBSET: 3 of 4 images, 1 of 2 pairs" in score.said
    assert "2 of 150 pairs" in score.error("mmvp", rows())


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ([*rows(), {**rows()[0], "response": "b"}], "is answered already"),
        (changed(rows(), 0, question_id=0), "expected an id from 1"),
        (changed(rows(), 0, question_id=99), "99"),
        (changed(rows(), 0, answer="(b)"), "belong to other questions"),
        (changed(rows(), 0, prompt="Is it another?"), "belong to other questions"),
        ([{k: v for k, v in row.items() if k != "response"} for row in rows()], "expected one of response"),
    ],
)
def test_refusals(tmp_path, score, answers, message):
    assert message in score.error("mmvp", answers, "--questions", table_file(tmp_path, questions("abba")))


@needs_data("expected_new.json", "new/mmvp")
def test_figures_of_lmms_eval(score):
    folder, figures = DATA / "new/mmvp", official("expected_new.json")["mmvp"]
    expected, path = figures["synthetic"], folder / "answers_synthetic.jsonl"
    for more in (["--questions", folder / "Questions_synthetic.csv"], ["--subset"]):
        found = score("mmvp", path, "--parser", "lmms", *more)
        names = {"accuracy": "mmvp_accuracy", "pair_accuracy": "mmvp_pair_accuracy"}
        assert {name: found["summary"][name] for name in names} == {name: expected[k] for name, k in names.items()}
        assert (found["counts"]["correct"], found["counts"]["pairs"]) == (expected["correct"], expected["pairs"])
    letters = {True: "A", False: "B", None: ""}
    given = [json.loads(line)["response"] for line in path.read_text().splitlines()]
    assert [letters[parse_answer(text, parser="lmms")] for text in given] == expected["letters"]
    for case in figures["parser_cases"]:
        assert letters[parse_answer(case["answer"], parser="lmms")] == case["lmms_eval"]


@needs_data("expected_new.json")
def test_the_labels_that_were_corrected():
    corrected = official("expected_new.json")["mmvp"]["corrected_labels"]
    for number, label in corrected.items():
        assert MmvpQuestion(int(number), "", "", True).corrected is (label == "(a)")
    assert [n for n in range(1, 301) if MmvpQuestion(n, "", "", True).was_corrected] == [int(n) for n in corrected]


# A run on the embedded model.


def test_a_run_and_its_files(tmp_path, score):
    folder = tmp_path / "mmvp"
    table = table_file(folder, questions("abbaab"))
    (folder / "MMVP Images").mkdir()
    for number, (path, _) in enumerate(benchmark_data.scenes(6), 1):
        shutil.copy(path, folder / "MMVP Images" / f"{number}.jpg")
    part, files = score.run("mmvp", folder, "--limit", 2)
    assert (part["counts"]["n"], part["counts"]["pairs"]) == (4, 2)
    again = score("mmvp", files / "mmvp_answers.jsonl", "--subset", "--questions", table)
    assert again["counts"] == part["counts"]
    (folder / "MMVP Images" / "3.jpg").unlink()
    with pytest.raises(DataError, match="question 3"):
        Mmvp.load(str(folder))
