"""NaturalBench: the parser, groups by hand, refusals, the official figures, and a run."""

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import benchmark_data
import pytest
from families.saved_llava import write_lines
from run_folders import read
from shared_data import DATA, needs_data

from vlmfix.cli import main
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


def score(folder: Path, answers: list[dict[str, Any]], *more: str) -> int:
    path = write_lines(folder / "answers.jsonl", answers)
    return main(["score", "naturalbench", str(path), "--out", str(folder / "o.json"), *more])


def result(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "o.json").read_text())
    return found


def questions(folder: Path) -> str:
    return str(write_lines(folder / "questions.jsonl", [{**row, "prediction": "-"} for row in rows()]))


def test_whole_groups_in_any_order(tmp_path):
    assert score(tmp_path, rows()[::-1], "--questions", questions(tmp_path)) == 0
    assert result(tmp_path)["summary"]["g_acc"] == 1.0 and result(tmp_path)["kinds"]["yes_no"]["counts"]["n"] == 4
    lower = [
        {"index": r["Index"], "answer": r["Answer"], "type": "mcq" if r["Index"] > 3 else "yes_no"} for r in rows()
    ]
    answers = [{**row, "prediction": "No" if row["index"] < 4 else "B"} for row in lower]
    assert score(tmp_path, answers, "--subset") == 0  # as VLMEvalKit names them
    assert result(tmp_path)["summary"]["acc"] == 0.5 and result(tmp_path)["summary"]["q_acc"] == 0.0


def test_incomplete_groups(tmp_path, capsys):
    asked = ["--questions", questions(tmp_path)]
    assert score(tmp_path, rows()[:-1], *asked) == 2
    assert "1 of 2 groups wholly; group 1 lacks" in capsys.readouterr().err
    assert score(tmp_path, rows()[:-1], *asked, "--subset") == 0
    out = capsys.readouterr().out
    assert "SUBSET: 1 of 2 groups" in out and "1 groups lack answers and are in no figure" in out
    assert result(tmp_path)["counts"]["n"] == 4
    assert score(tmp_path, rows()[:3], *asked, "--subset") == 2
    assert "no group wholly" in capsys.readouterr().err
    assert score(tmp_path, rows()) == 2
    assert "2 of 1900 groups" in capsys.readouterr().err


def changed(place: int, **fields: Any) -> list[dict[str, Any]]:
    answers = rows()
    answers[place] |= fields
    return answers


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ([*rows(), {**rows()[0], "prediction": "No"}], "is answered already"),
        (changed(0, Index="first"), "expected 'Index'"),
        (changed(0, Index=99), "99"),
        (changed(0, Answer="No"), "belong to other questions"),
        (changed(0, Question="Is it another?"), "belong to other questions"),
        ([{k: v for k, v in row.items() if k != "prediction"} for row in rows()], "expected one of prediction"),
    ],
)
def test_refusals(tmp_path, capsys, answers, message):
    assert score(tmp_path, answers, "--questions", questions(tmp_path)) == 2
    assert message in capsys.readouterr().err


def test_another_order_is_refused(tmp_path, capsys):
    answers = [{**row, "Index": number} for number, row in enumerate(rows()[::-1])]
    answers[0], answers[1] = {**answers[1], "Index": 0}, {**answers[0], "Index": 1}
    assert score(tmp_path, answers, "--subset") == 2
    assert "in another order than the benchmark's" in capsys.readouterr().err


@needs_data("expected_new.json", "new/naturalbench")
def test_official_figures(tmp_path):
    folder, official = DATA / "new/naturalbench", json.loads((DATA / "expected_new.json").read_text())["naturalbench"]
    path, expected = folder / "answers_synthetic.jsonl", official["synthetic"]
    words = ["score", "naturalbench", str(path), "--out", str(tmp_path / "o.json")]
    for more in (["--questions", str(folder / "hf_rows_synthetic.jsonl")], ["--subset"]):
        assert main([*words, *more]) == 0
        summary = result(tmp_path)["summary"]
        names = {"g_acc": "G_Acc", "q_acc": "Q_Acc", "i_acc": "I_Acc", "acc": "Acc"}
        assert {name: summary[name] for name in names} == {name: expected[key] for name, key in names.items()}
        assert result(tmp_path)["counts"]["groups"] == expected["groups"]
    given = [json.loads(line) for line in path.read_text().splitlines()]
    read_as = {True: 1, False: 0, None: -1}
    assert [read_as[parse_answer(r["prediction"], r["Question_Type"])] for r in given] == expected["extracted"]
    for case in official["parser_cases"]:
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


def test_a_run_and_its_files(tmp_path):
    folder = release(tmp_path / "nb")
    assert load_items(str(folder))[0].text == "Is there a dog in the image? Please answer Yes or No."
    out = tmp_path / "run"
    words = ["eval", "--benchmark", "naturalbench", "--benchmark-data", f"naturalbench={folder}", "--limit", "2"]
    assert main([*words, "--method", "none", "--out", str(out)]) == 0
    part = read(out)["methods"][0]["naturalbench"]
    assert part["counts"]["n"] == 8 and part["counts"]["groups"] == 2
    answers = out / "official" / "none" / "naturalbench.jsonl"
    again = ["score", "naturalbench", str(answers), "--out", str(tmp_path / "o.json"), "--questions"]
    assert main([*again, str(folder / "test_set.json"), "--subset"]) == 0
    assert result(tmp_path)["counts"] == part["counts"]
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
