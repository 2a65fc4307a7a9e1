"""DASH-B: figures by hand, which image an answer is about, refusals, the official figures, and a run."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import benchmark_data
import pytest
from families.saved_llava import write_lines
from shared_data import DATA, needs_data, official

from vlmfix.errors import DataError
from vlmfix.evals.benchmarks.dashb.data import DashImage, load_images
from vlmfix.evals.benchmarks.dashb.task import DashTable, score_answers
from vlmfix.evals.benchmarks.yes_no import parse_answer

# The same names of files on both sides, for both objects, and one object of two sources.
NEGATIVES = {"coco": {"kettle": ["0.jpg", "1.jpg"]}, "other": {"scissors": ["0.jpg"], "kettle": ["9.jpg"]}}
POSITIVES = {"coco": {"kettle": ["0.jpg", "1.jpg"]}, "other": {"scissors": ["0.jpg"], "kettle": ["0.jpg"]}}


def scored(negatives: list[str], positives: list[str]) -> DashTable:
    sides = [(False, text) for text in negatives], [(True, text) for text in positives]
    images = [DashImage(label, "coco", "kettle", f"{i}.jpg") for side in sides for i, (label, _) in enumerate(side)]
    return score_answers(images, [text for side in sides for _, text in side])


@pytest.mark.parametrize(
    ("negatives", "positives", "tnr", "tpr", "accuracy", "mean", "unparsed"),
    [
        (["no", "No.", "yes", "Unclear"], ["yes", "No", "YES.", ""], 0.5, 0.5, 0.5, 0.5, 2),
        (["yes"] * 3, ["yes"] * 3, 0.0, 1.0, 0.5, 0.0, 0),
        (["no"] * 3, ["no"] * 3, 1.0, 0.0, 0.5, 0.0, 0),
        (["maybe"] * 2, ["maybe"] * 2, 0.0, 0.0, 0.0, None, 4),
        (["no", "no"], ["yes"], 1.0, 1.0, 1.0, 1.0, 0),
        (["no", "no", "no"], ["no"], 1.0, 0.0, 0.75, 0.0, 0),  # of all images, not the mean of the halves
    ],
)
def test_figures_by_hand(negatives, positives, tnr, tpr, accuracy, mean, unparsed):
    table = scored(negatives, positives)
    figures = table.summary()
    assert (figures["tnr"], figures["tpr"], figures["accuracy"]) == (tnr, tpr, accuracy)
    assert figures["harmonic_mean"] == pytest.approx(math.nan if mean is None else mean, nan_ok=True)
    assert table.counts()["unparsed"] == unparsed


def test_mean_of_objects():
    images = [DashImage(False, "s", name, f"{i}.png") for i, name in enumerate(("a", "a", "a", "b"))]
    assert score_answers(images, ["no", "no", "yes", "no"]).tnr_of_objects() == pytest.approx((2 / 3 + 1) / 2)


def test_an_image_counts_once():
    image = DashImage(True, "coco", "kettle", "0.jpg")
    with pytest.raises(DataError, match=r"pos/coco/kettle/0\.jpg twice"):
        score_answers([image, image], ["yes", "no"])


# Files and the command line.


@pytest.fixture
def lists(tmp_path: Path) -> list[str]:
    (tmp_path / "dash_benchmark_neg.json").write_text(json.dumps(NEGATIVES))
    (tmp_path / "dash_benchmark_pos.json").write_text(json.dumps(POSITIVES))
    return ["--questions", *(str(tmp_path / f"dash_benchmark_{side}.json") for side in ("neg", "pos"))]


def rows() -> list[dict[str, Any]]:
    return [
        {"dataset": source, "img_id": file, "object_name": name, "gt": gt, "response": f"{gt}, it is", "answer": gt}
        for gt, sources in (("no", NEGATIVES), ("yes", POSITIVES))
        for source, objects in sources.items()
        for name, files in objects.items()
        for file in files
    ]


def test_answers_in_any_order_find_their_images(score, lists):
    answers = rows()
    answers[-1] |= {"response": "no", "answer": "no"}
    answers[0] |= {"response": "Well", "answer": None}
    found = score("dashb", answers[::-1], *lists)
    assert found["counts"] | {"n": 8, "TN": 3, "FN": 1, "TP": 3, "FP": 0, "unparsed": 1} == found["counts"]
    assert found["breakdown"]["kettle"] == pytest.approx({"TNR": 200 / 3, "TPR": 200 / 3})


def changed(place: int, **fields: Any) -> list[dict[str, Any]]:
    answers = rows()
    answers[place] = {key: value for key, value in (answers[place] | fields).items() if value != "-"}
    return answers


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        (changed(4, dataset="-"), "2 images of the question file fit"),  # kettle 0.jpg of two sources
        (changed(0, img_id="7.jpg"), "no images of the question file fit"),
        (changed(0, gt="yes"), "is answered already"),
        (changed(0, gt="perhaps"), "expected yes or no under 'gt'"),
        (changed(0, object_name="-"), "nothing says which image"),
        (changed(0, answer="yes"), "'response' and 'answer' differ"),
        (rows()[:-1], "answers 7 of 8"),
        ([*rows(), {**rows()[0], "response": "no"}], "is answered already"),
        ([{key: value for key, value in row.items() if key != "response"} for row in rows()], "'answer' is the right"),
    ],
)
def test_refusals(score, lists, answers, message):
    assert message in score.error("dashb", answers, *lists)


def test_subsets_say_so(score, lists):
    score("dashb", rows()[:-1], *lists, "--subset")
    assert "SUBSET: 7 of 8" in score.said and "the halves are not equal" in score.said
    assert "of 1341 each" in score.error("dashb", rows())
    assert score("dashb", rows(), "--subset")["summary"]["accuracy"] == 1.0


def test_rows_of_the_data_set_are_questions_and_no_answers(tmp_path, score):
    questions = [
        {"question_id": i, "dataset": row["dataset"], "object": row["object_name"], "answer": row["gt"]}
        | {"question": "Can you see it?", "img_id": row["img_id"]}
        for i, row in enumerate(rows())
    ]
    file = write_lines(tmp_path / "rows.jsonl", questions)
    assert "'answer' is the right answer" in score.error("dashb", questions, "--questions", file)
    answers = [{"question_id": i, "response": "No"} for i in reversed(range(8))]
    summary = score("dashb", answers, "--questions", file)["summary"]
    assert summary["tnr"] == 1.0 and summary["tpr"] == 0.0
    other = [*answers[1:], {**answers[0], "object": "boat"}]
    assert "object_name 'boat'" in score.error("dashb", other, "--questions", file)


@needs_data("expected_new.json", "new/dashb")
def test_official_figures(score):
    folder, figures = DATA / "new/dashb", official("expected_new.json")["dashb"]
    lists = [folder / f"synthetic_{side}.json" for side in ("neg", "pos")]
    hub = folder / "hf_rows_synthetic.jsonl"
    for path, questions in ((folder / "answers_synthetic.json", lists), (hub, [hub])):
        found, expected = score("dashb", path, "--questions", *questions), figures["synthetic"]
        summary = found["summary"]
        assert [summary[name] for name in ("accuracy", "tnr", "tpr", "harmonic_mean")] == [
            expected[name] for name in ("ACC", "TNR", "TPR", "Harmonic Mean")
        ]
        cells = {"TN": "no->no", "FP": "no->yes", "FN": "yes->no", "TP": "yes->yes"}
        assert {cell: found["counts"][cell] for cell in cells} == {c: expected["counts"][n] for c, n in cells.items()}
        assert found["counts"]["unparsed"] == expected["counts"]["no->None"] + expected["counts"]["yes->None"]
    for case in figures["parser_cases"]:
        assert parse_answer(case["answer"], "repope") is {"yes": True, "no": False, None: None}[case["dashb"]]


# A run on the embedded model.


def release(folder: Path) -> Path:
    """The layout of the repository, with pictures of the testbed."""
    lists: dict[str, dict[str, dict[str, list[str]]]] = {"neg": {"coco": {}}, "pos": {"coco": {}}}
    for number, (path, objects) in enumerate(benchmark_data.scenes(6)):
        side = "pos" if number % 2 else "neg"
        name = objects[0] if number % 2 else next(word for word in benchmark_data.WORDS if word not in objects)
        files = lists[side]["coco"].setdefault(name, [])
        target = folder / "images" / side / "coco" / name / f"{len(files)}{path.suffix}"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
        files.append(target.name)
    for side, value in lists.items():
        (folder / "images" / f"dash_benchmark_{side}.json").write_text(json.dumps(value))
    return folder


def test_a_run_and_its_files(tmp_path, score):
    folder = release(tmp_path / "dash")
    assert [image.label for image in load_images(str(folder))] == [False] * 3 + [True] * 3
    part, files = score.run("dashb", folder, "--limit", 2)
    assert (part["counts"]["negatives"], part["counts"]["positives"]) == (2, 2)
    asked = [folder / "images" / f"dash_benchmark_{side}.json" for side in ("neg", "pos")]
    again = score("dashb", files / "dashb_answers.json", "--subset", "--questions", *asked)
    assert again["counts"] == part["counts"]
    shutil.rmtree(folder / "images" / "pos")
    with pytest.raises(DataError, match="has no image pos/coco/"):
        load_images(str(folder))
