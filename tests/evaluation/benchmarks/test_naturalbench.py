"""NaturalBench: the parser, groups by hand, refusals, the official figures, and a run."""

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import benchmark_data
import pytest
from families.saved_llava import write_lines
from scoring import changed
from shared_data import DATA, needs_data, official

from vlmfix.errors import DataError
from vlmfix.evals.benchmarks.naturalbench.data import load_items
from vlmfix.evals.benchmarks.naturalbench.figures import ORDER, NaturalItem, is_article, parse_answer, score_answers

SAID = {1: "Yes", 0: "No", -1: "Perhaps"}


def group(number: int = 0, kind: str = "yes_no") -> list[NaturalItem]:
    return [NaturalItem(4 * number + i, kind, f"Question {q}?", label) for i, (q, _, label) in enumerate(ORDER)]


@pytest.mark.parametrize(
    ("text", "kind", "expected"),
    [
        ("No, yes", "yes_no", False),
        ("yes/no", "yes_no", True),
        ("not at all", "yes_no", None),
        ("yesterday", "yes_no", None),
        ("", "yes_no", None),
        ("AB", "multiple_choice", None),
        ("Helmet", "multiple_choice", None),
        ("It is a helmet (B)", "multiple_choice", True),  # the article is read as the option
        ("(b)", "multiple_choice", False),
    ],
)
def test_parser(text, kind, expected):
    assert parse_answer(text, kind) is expected


def test_articles():
    assert [is_article(text) for text in ("It is a helmet (B)", "A, not B", "B, a hat", "a hat")] == [
        True,
        *[False] * 3,
    ]


@pytest.mark.parametrize(
    ("read", "right", "questions", "images", "groups"),
    [
        ((1, 0, 0, 1), 4, 2, 2, 1),
        ((1, 1, 1, 1), 2, 0, 0, 0),
        ((1, 0, 1, 0), 2, 1, 0, 0),
        ((1, 1, 0, 0), 2, 0, 1, 0),
        ((1, 0, 0, -1), 3, 1, 1, 0),
        ((1, -1, 0, 1), 3, 1, 1, 0),
    ],
)
def test_groups_by_hand(read, right, questions, images, groups):
    table = score_answers(group(), [SAID[value] for value in read])
    counts = table.counts()
    assert (counts["n"], counts["questions"], counts["images"], counts["groups"]) == (4, 2, 2, 1)
    found = (counts["correct"], counts["questions_right"], counts["images_right"], counts["groups_right"])
    assert found == (right, questions, images, groups)
    letters = score_answers(group(kind="multiple_choice"), [{1: "A", 0: "B", -1: "C"}[value] for value in read])
    assert letters.counts() == counts
    backwards = score_answers(group()[::-1], [SAID[value] for value in read[::-1]])
    assert backwards.counts() == counts


def test_figures_are_in_order_and_groups_are_resampled():
    for said in itertools.product((1, 0, -1), repeat=4):
        table = score_answers([*group(0), *group(1)], [SAID[value] for value in (*said, 1, 0, 0, 1)])
        f = table.summary()
        assert f["g_acc"] <= min(f["q_acc"], f["i_acc"]) <= max(f["q_acc"], f["i_acc"]) <= f["acc"]
        assert len(set(table.image_ids.tolist())) == 2


def test_what_is_no_group_is_refused():
    with pytest.raises(DataError, match="expected answers to all of its four"):
        score_answers(group()[:3], ["Yes"] * 3)
    with pytest.raises(DataError, match="whole groups"):
        score_answers([*group(), group()[0]], ["Yes"] * 5)
    turned = [NaturalItem(item.number, item.kind, "", not item.label) for item in group()]
    with pytest.raises(DataError, match="in another order"):
        score_answers(turned, ["Yes"] * 4)


# Files and the command line.


def rows(groups: int = 2) -> list[dict[str, Any]]:
    return [
        {"Index": each.number, "Question": each.question, "Answer": each.right, "Question_Type": each.kind}
        | {"prediction": f"{each.right}."}
        for number in range(groups)
        for each in group(number, ("yes_no", "multiple_choice")[number % 2])
    ]


def questions(folder: Path) -> Path:
    return write_lines(folder / "questions.jsonl", [{**row, "prediction": "-"} for row in rows()])


def test_whole_groups_in_any_order(tmp_path, score):
    found = score("naturalbench", rows()[::-1], "--questions", questions(tmp_path))
    assert found["summary"]["g_acc"] == 1.0 and found["kinds"]["yes_no"]["counts"]["n"] == 4
    lower = [
        {"index": r["Index"], "answer": r["Answer"], "type": "mcq" if r["Index"] > 3 else "yes_no"} for r in rows()
    ]
    answers = [{**row, "prediction": "No" if row["index"] < 4 else "B"} for row in lower]
    found = score("naturalbench", answers, "--subset")  # as VLMEvalKit names them
    assert found["summary"]["acc"] == 0.5 and found["summary"]["q_acc"] == 0.0


def test_incomplete_groups(tmp_path, score):
    asked = ["--questions", questions(tmp_path)]
    assert "1 of 2 groups wholly; group 1 lacks" in score.error("naturalbench", rows()[:-1], *asked)
    assert score("naturalbench", rows()[:-1], *asked, "--subset")["counts"]["n"] == 4
    assert "SUBSET: 1 of 2 groups" in score.said and "1 groups lack answers and are in no figure" in score.said
    assert "no group wholly" in score.error("naturalbench", rows()[:3], *asked, "--subset")
    assert "2 of 1900 groups" in score.error("naturalbench", rows())


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ([*rows(), {**rows()[0], "prediction": "No"}], "is answered already"),
        (changed(rows(), 0, Index="first"), "expected 'Index'"),
        (changed(rows(), 0, Index=99), "99"),
        (changed(rows(), 0, Answer="No"), "belong to other questions"),
        (changed(rows(), 0, Question="Is it another?"), "belong to other questions"),
        ([{k: v for k, v in row.items() if k != "prediction"} for row in rows()], "expected one of prediction"),
    ],
)
def test_refusals(tmp_path, score, answers, message):
    assert message in score.error("naturalbench", answers, "--questions", questions(tmp_path))


def test_another_order_is_refused(score):
    answers = [{**row, "Index": number} for number, row in enumerate(rows()[::-1])]
    answers[0], answers[1] = {**answers[1], "Index": 0}, {**answers[0], "Index": 1}
    assert "in another order than the benchmark's" in score.error("naturalbench", answers, "--subset")


@needs_data("expected_new.json", "new/naturalbench")
def test_official_figures(score):
    folder, figures = DATA / "new/naturalbench", official("expected_new.json")["naturalbench"]
    path, expected = folder / "answers_synthetic.jsonl", figures["synthetic"]
    for more in (["--questions", folder / "hf_rows_synthetic.jsonl"], ["--subset"]):
        found = score("naturalbench", path, *more)
        names = {"g_acc": "G_Acc", "q_acc": "Q_Acc", "i_acc": "I_Acc", "acc": "Acc"}
        assert {name: found["summary"][name] for name in names} == {name: expected[key] for name, key in names.items()}
        assert found["counts"]["groups"] == expected["groups"]
    given = [json.loads(line) for line in path.read_text().splitlines()]
    read_as = {True: 1, False: 0, None: -1}
    assert [read_as[parse_answer(r["prediction"], r["Question_Type"])] for r in given] == expected["extracted"]
    for case in figures["parser_cases"]:
        assert read_as[parse_answer(case["answer"], case["type"])] == case["official"]


# A run on the embedded model.


def release(folder: Path, groups: int = 3) -> Path:
    """``test_set.json`` with pictures of the testbed."""
    folder.mkdir()
    scenes = benchmark_data.scenes(2 * groups)
    rows = []
    for number in range(groups):
        pair = [path for path, _ in scenes[2 * number : 2 * number + 2]]
        for path in pair:
            shutil.copy(path, folder / path.name)
        for question, image, label in ORDER:
            asked = f"Is there a {benchmark_data.WORDS[question]} in the image?Please answer Yes or No."
            rows.append([asked, pair[image].name, "Yes" if label else "No", "yes_no"])
    (folder / "test_set.json").write_text(json.dumps(rows))
    return folder


def test_a_run_and_its_files(tmp_path, score):
    folder = release(tmp_path / "nb")
    assert load_items(str(folder))[0].text == "Is there a dog in the image? Please answer Yes or No."
    part, files = score.run("naturalbench", folder, "--limit", 2)
    assert part["counts"]["n"] == 8 and part["counts"]["groups"] == 2
    again = score("naturalbench", files / "naturalbench.jsonl", "--questions", folder / "test_set.json", "--subset")
    assert again["counts"] == part["counts"]
    next(folder.glob("*.png" if list(folder.glob("*.png")) else "*.jpg")).unlink()
    with pytest.raises(DataError, match="no image"):
        load_items(str(folder))


def test_groups_of_a_data_set(tmp_path):
    from datasets import Dataset, Image

    (first, _), (second, _) = benchmark_data.scenes(2)
    row = {"Index": 7, "Question_0": "Is it?", "Question_1": "Is it not?", "Question_Type": "yes_no"}
    row |= {f"Image_{i}_Question_{q}": "Yes" if label else "No" for q, i, label in ORDER}
    data = Dataset.from_list([{**row, "Image_0": str(first), "Image_1": str(second)}])
    data.cast_column("Image_0", Image()).cast_column("Image_1", Image()).to_parquet(str(tmp_path / "a.parquet"))
    items = load_items(f"datasets:{tmp_path / 'a.parquet'}")
    assert [item.number for item in items] == [28, 29, 30, 31]
    assert [item.path.read_bytes() for item in items if item.path] == [p.read_bytes() for p in (first, second) * 2]
