"""POPE: parsers, figures, question files and the published rule that makes questions."""

import json
import math

import numpy as np
import pytest
from pope_rule import check_questions, score_logits
from shared_data import DATA, needs_data, official, released_ground_truth

from vlmfix.errors import DataError
from vlmfix.evals.benchmarks.coco_objects import ChairMatcher, ground_truth
from vlmfix.evals.benchmarks.object_questions import SPLITS, PopeQuestion, build_questions, load_questions
from vlmfix.evals.benchmarks.pope.task import Pope
from vlmfix.evals.benchmarks.yes_no import (
    YesNoTable,
    is_unparsed,
    parse_answer,
    score_labels,
)
from vlmfix.evals.data.coco import CocoData
from vlmfix.evals.data.samples import Answer
from vlmfix.evals.stats.figures import auc

# answer: official, official_raw, opera, lmms, vlmeval, repope
ANSWERS = {
    "Yes": (True, True, True, True, True, True),
    "yes.": (True, True, True, None, True, True),
    "No": (False, False, False, False, False, False),
    "NO": (True, True, False, False, False, False),
    "no\n": (False, True, True, False, False, False),
    " No, there is none.": (False, False, False, None, False, False),
    "There is not a dog. Yes.": (False, False, False, None, True, True),
    "Yes. But there is no cat.": (True, True, False, None, None, True),
    "There isn't one.": (True, True, False, None, None, None),
    '"No"': (True, True, True, None, False, False),
    "none": (True, True, True, None, None, False),
    "I do not know": (False, False, False, None, None, False),
    "": (True, True, True, None, None, None),
}


@pytest.mark.parametrize("answer", ANSWERS)
def test_parsers(answer):
    parsers = ("official", "official_raw", "opera", "lmms", "vlmeval", "repope")
    assert tuple(parse_answer(answer, parser) for parser in parsers) == ANSWERS[answer]


def test_repope_finds_words_within_words_and_leaves_open_answers_out_of_all_figures():
    assert [parse_answer(text, "repope") for text in ("Yesterday", "EYES", "cannot", "noon", "No, yes", "maybe")] == [
        *(True, True, False, False, True, None),
    ]
    assert not is_unparsed("Eyes", "repope") and is_unparsed("maybe", "repope")
    labels, answers = [True, True, False], ["yes", "yes", ""]
    table = score_labels(labels, answers, image_ids=[1, 2, 3], parser="repope")
    assert table.counts() == {"n": 3, "TP": 2, "FP": 0, "TN": 0, "FN": 0, "unparsed": 1}
    figures = ("accuracy", "precision", "recall", "f1", "yes_ratio")
    assert [table.summary()[name] for name in figures] == [1, 1, 1, 1, 1]
    corrected = score_labels([False, True], ["yes", ""], image_ids=[2, 3], parser="repope").summary()
    assert [corrected[name] for name in figures] == [0, 0, 0, 0, 1], "no positive is left"


def test_vcd_reads_an_answer_by_its_label():
    assert parse_answer("I know", "vcd", label=False) is False  # "no" inside "know"
    assert parse_answer("I know", "vcd", label=True) is False
    assert parse_answer("Perhaps", "vcd", label=False) is True
    assert parse_answer("Yesterday", "vcd", label=True) is True
    with pytest.raises(DataError, match="label"):
        parse_answer("yes", "vcd")


def test_unknown_parser():
    with pytest.raises(DataError, match="official_raw"):
        parse_answer("yes", "other")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("answer", "unparsed"),
    [("Yes", ""), ("no, it is not", ""), ("NO", "official"), ("none", "official opera"), ("", "official opera vcd")],
)
def test_unparsed_answers_are_counted(answer, unparsed):
    assert [p for p in ("official", "opera", "vcd") if is_unparsed(answer, p)] == unparsed.split()  # type: ignore[arg-type]


def test_counts_and_figures_by_hand():
    labels = [True, True, True, False, False]
    answers = ["Yes", "No", "yes it is", "Yes", "No"]
    table = score_labels(labels, answers, image_ids=[1, 1, 2, 2, 3])
    assert table.counts() == {"n": 5, "TP": 2, "FP": 1, "TN": 1, "FN": 1, "unparsed": 0}
    summary = table.summary()
    assert summary["accuracy"] == 0.6
    assert summary["precision"] == summary["recall"] == summary["f1"] == pytest.approx(2 / 3)
    assert summary["yes_ratio"] == 0.6
    assert summary["mcc"] == pytest.approx((2 * 1 - 1 * 1) / math.sqrt(3 * 3 * 2 * 2))
    assert "auc" not in summary
    assert table.correct.tolist() == [True, False, True, False, True]


def test_open_answers_are_wrong_and_in_no_cell():
    table = score_labels([True, True, False], ["Yes", "Perhaps", "Perhaps"], image_ids=[1, 2, 3], parser="vlmeval")
    assert table.counts() == {"n": 3, "TP": 1, "FP": 0, "TN": 0, "FN": 0, "unparsed": 2}
    assert table.summary()["accuracy"] == pytest.approx(1 / 3)
    assert table.summary()["recall"] == 0.5  # of the two positives
    assert table.summary()["yes_ratio"] == pytest.approx(1 / 3)


def test_yes_ratio_counts_predictions_not_labels():
    assert score_labels([True, False], ["No", "No"], image_ids=[1, 2]).summary()["yes_ratio"] == 0.0


def test_figures_without_any_yes_are_zero():
    summary = score_labels([False, False], ["No", "No"], image_ids=[1, 2], scores=[-1.0, -2.0]).summary()
    assert summary["accuracy"] == 1.0
    assert summary["precision"] == summary["recall"] == summary["f1"] == summary["mcc"] == 0.0
    assert math.isnan(summary["auc"])


def test_mcc_is_the_correlation_of_answers_and_labels():
    rng = np.random.default_rng(0)
    for skill in (0.1, 0.5, 0.9):
        labels = rng.random(80) < 0.4
        said = np.where(rng.random(80) < skill, labels, ~labels)
        table = score_labels(labels.tolist(), ["Yes" if yes else "No" for yes in said], image_ids=range(80))
        assert table.summary()["mcc"] == pytest.approx(np.corrcoef(labels, said)[0, 1], abs=1e-12)


def test_auc_equals_scipy():
    stats = pytest.importorskip("scipy.stats", reason="scipy is not installed")
    rng = np.random.default_rng(0)
    scores, labels = np.round(rng.normal(size=200), 1), rng.random(200) < 0.4
    pairs = labels.sum() * (~labels).sum()
    assert auc(scores, labels) == pytest.approx(stats.mannwhitneyu(scores[labels], scores[~labels]).statistic / pairs)


def test_auc_equals_the_share_of_ordered_pairs():
    rng = np.random.default_rng(0)
    for levels in (2, 5, 1000):
        scores, labels = rng.integers(0, levels, 60) / 7 - 3, rng.random(60) < 0.4
        pairs = [(p > n) + (p == n) / 2 for p in scores[labels] for n in scores[~labels]]
        assert auc(scores, labels) == pytest.approx(np.mean(pairs), abs=1e-12)
    assert auc([1, 2, 3, 4], [False, False, True, True]) == 1.0
    assert auc([0, 0, 0], [True, False, True]) == 0.5


def test_logits_decide_at_zero():
    table = score_logits([True, False, True], [0.5, 0.0, -0.5], image_ids=[1, 2, 3])
    assert table.prediction.tolist() == [1, 0, 0]
    assert score_logits([True, False, True], [0.5, 0.0, -0.5], image_ids=[1, 2, 3], bias=0.6).prediction.tolist() == [
        1,
        1,
        1,
    ]


def test_scoring_errors():
    with pytest.raises(DataError, match="no questions"):
        score_labels([], [], image_ids=[])
    with pytest.raises(DataError, match="2 questions but 1 answers"):
        score_labels([True, False], ["Yes"], image_ids=[1, 2])
    with pytest.raises(DataError, match="finite"):
        score_labels([True], ["Yes"], image_ids=[1], scores=[math.nan])


# Question files.


def write_lines(path, *rows):
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return path


def row(number=1, *, image="COCO_val2014_000000310196.jpg", text="Is there a snowboard in the image?", label="yes"):
    return {"question_id": number, "image": image, "text": text, "label": label}


def test_load_questions(tmp_path):
    path = write_lines(
        tmp_path / "coco_pope_popular.json",
        row(1),
        row("two", text="Is there an apple in the imange?", label="no"),
        "",
        row(3, text="Is there a hot dog in the image?\nAnswer the question using a single word or phrase."),
    )
    questions = load_questions(path)
    assert questions[0] == PopeQuestion(
        "1",
        310196,
        "COCO_val2014_000000310196.jpg",
        "snowboard",
        "Is there a snowboard in the image?",
        True,
        "popular",
    )
    assert [q.object for q in questions] == ["snowboard", "apple", "hot dog"]
    assert [q.question_id for q in questions] == ["1", "two", "3"]
    assert [q.label for q in questions] == [True, False, True]


@pytest.mark.parametrize(
    ("name", "image", "image_id"),
    [
        ("aokvqa_pope_seem_popular.jsonl", "COCO_val2014_000000000042.jpg", 42),
        ("gqa_pope_seem_popular.jsonl", "2300042.jpg", 2300042),
    ],
)
@pytest.mark.parametrize("as_list", [False, True])
def test_questions_on_other_image_sets(tmp_path, name, image, image_id, as_list):
    """The A-OKVQA and GQA variants, also as one list: objects outside COCO's 80, images with names of their own."""
    rows = [row(1, image=image, text="Is there a sky in the image?"), row(2, image=image, label="no")]
    path = write_lines(tmp_path / name, *([json.dumps(rows)] if as_list else rows))
    questions = load_questions(path)
    split = f"{name.partition('_')[0]}_popular"
    assert [(q.object, q.image_id, q.split) for q in questions] == [
        ("sky", image_id, split),
        ("snowboard", image_id, split),
    ]
    table = score_labels([q.label for q in questions], ["Yes", "Yes"], image_ids=[q.image_id for q in questions])
    assert table.counts() == {
        "n": 2, "TP": 1, "FP": 1, "TN": 0, "FN": 0, "unparsed": 0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["{broken"], "line 1"),
        ([row(1), {"question_id": 2, "text": "Is there a dog in the image?"}], "line 2"),
        (["[1, 2]"], "line 1"),
        ([row(1, text="What is this?")], "What is this"),
        ([row(1, image="photo.jpg")], "photo.jpg"),
        ([row(1, label="maybe")], "maybe"),
        ([row(1), row(1)], "line 2: the question id 1 is used already"),
        ([], "empty"),
    ],
)
def test_broken_question_files(tmp_path, lines, message):
    with pytest.raises(DataError, match=message) as error:
        load_questions(write_lines(tmp_path / "pope.json", *lines))
    assert "pope.json" in str(error.value)


def test_missing_question_file(tmp_path):
    with pytest.raises(DataError, match="RUCAIBox/POPE"):
        load_questions(tmp_path / "none.json")


# The published rule.

TRUTH = {
    1: ["dog", "person", "ball"],
    2: ["dog", "person", "car", "cat"],
    3: ["person", "car", "cup"],
    4: ["zebra", "tree", "bird", "person"],
    5: ["dog"],  # too few objects: neither asked about nor counted
}


@pytest.mark.parametrize("split", SPLITS)
def test_questions_alternate_and_never_repeat(split):
    questions = build_questions(TRUTH, split)
    assert len(questions) == 4 * 6
    assert [q.label for q in questions] == [True, False] * 12
    assert [q.question_id for q in questions] == [str(i + 1) for i in range(24)]
    for image_id in (1, 2, 3, 4):
        mine = [q for q in questions if q.image_id == image_id]
        assert [q.object for q in mine if q.label] == TRUTH[image_id][:3]
        assert len({q.object for q in mine}) == 6
        assert all((q.object in TRUTH[image_id]) == q.label for q in mine)
        assert {q.image for q in mine} == {f"COCO_val2014_{image_id:012d}.jpg"}
    assert {q.split for q in questions} == {split}


def test_popular_and_adversarial_negatives_by_hand():
    # Frequencies: person 4, dog 2, car 2, then ball, cat, cup, zebra, tree, bird 1, in the order of first occurrence.
    popular = [q.object for q in build_questions(TRUTH, "popular") if q.image_id == 1 and not q.label]
    assert popular == ["car", "cat", "cup"]
    # Image 3: person goes most often with dog (2, as with car, which is there); car then with cat; cup with nothing.
    adversarial = [q.object for q in build_questions(TRUTH, "adversarial") if q.image_id == 3 and not q.label]
    assert adversarial[:2] == ["dog", "cat"]
    assert adversarial[2] not in {"person", "car", "cup", "dog", "cat"}


def test_text_of_questions():
    texts = {
        q.object: q.text for q in build_questions({1: ["apple", "skis", "hot dog"], 2: ["cup", "owl", "tie"]}, "random")
    }
    assert texts["apple"] == "Is there an apple in the image?"
    assert texts["skis"] == "Is there a skis in the image?"


def test_building_is_a_function_of_the_seed():
    truth = {i: frozenset(names) for i, names in TRUTH.items()}
    first = build_questions(truth, "random", seed=3)
    assert first == build_questions(truth, "random", seed=3)
    assert first != build_questions(truth, "random", seed=4)
    positives = [[q.object for q in build_questions(truth, split, seed=3) if q.label] for split in SPLITS]
    assert positives[0] == positives[1] == positives[2]  # every split asks for the same positives


def test_building_errors():
    with pytest.raises(DataError, match="3 objects or more"):
        build_questions({1: ["dog"]}, "random")
    with pytest.raises(DataError, match="no object besides those that are in image 1"):
        build_questions({1: ["dog", "cat", "cup"]}, "random")
    with pytest.raises(DataError, match="popular"):
        build_questions(TRUTH, "frequent")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="num_positive"):
        build_questions(TRUTH, "random", num_positive=0)


def test_check_questions_finds_contradictions():
    questions = build_questions(TRUTH, "popular")
    assert check_questions(questions, TRUTH)["inconsistent"] == 0
    moved = {**TRUTH, 1: ["dog", "ball", "car"]}  # "person" is asked as a yes, "car" as a no
    found = check_questions(questions, moved)
    assert (found["yes_not_in_gt"], found["no_but_in_gt"]) == (1, 1)
    with pytest.raises(DataError, match="image 4"):
        check_questions(questions, {i: TRUTH[i] for i in (1, 2, 3)})


# Real data.


@needs_data("expected.json")
def test_official_parser_cases():
    word = {True: "yes", False: "no", None: "unknown"}
    for case in official()["pope"]["parser_cases"]:
        answer = case["answer"]
        assert word[parse_answer(answer, "official_raw")] == case["official"], answer
        assert word[parse_answer(answer, "opera")] == case["opera_pai"], answer
        assert word[parse_answer(answer, "vlmeval")] == case["vlmevalkit_no_judge"], answer
        exact = case["lmms_eval_exact"]
        assert word[parse_answer(answer, "lmms")] == (exact if exact in ("yes", "no") else "unknown"), answer
        if answer == answer.strip():
            assert parse_answer(answer) == parse_answer(answer, "official_raw"), answer


@needs_data("expected.json", "pope", "chair_gt")
@pytest.mark.parametrize("mode", ["pattern", "nltk"])
@pytest.mark.parametrize("split", SPLITS)
def test_official_questions_follow_the_rule(split, mode):
    questions = load_questions(DATA / f"pope/questions_3000/coco_pope_{split}.json")
    assert (len(questions), sum(q.label for q in questions)) == (3000, 1500)
    assert {q.split for q in questions} == {split}
    found = check_questions(questions, released_ground_truth(mode))
    wanted = official()["pope"]["builder_check"][f"gt_{mode}"][split]
    assert {name: count for name, count in found.items() if count or name in wanted} == wanted


@needs_data("pope")
@pytest.mark.parametrize(("split", "total"), [("random", 2910), ("popular", 3000), ("adversarial", 3000)])
def test_first_release_has_the_same_labels(split, total):
    first = load_questions(DATA / f"pope/questions_2910/coco_pope_{split}.json")
    current = load_questions(DATA / f"pope/questions_3000/coco_pope_{split}.json")
    assert (len(first), sum(q.label for q in first)) == (total, 1500)
    labels = {(q.image_id, q.object): q.label for q in current}
    assert all(labels.get((q.image_id, q.object), q.label) == q.label for q in first)


@needs_data("pope", "chair_gt")
@pytest.mark.parametrize("split", SPLITS)
def test_built_questions_follow_the_rule_on_the_same_images(split):
    images = {q.image_id for q in load_questions(DATA / f"pope/questions_3000/coco_pope_{split}.json")}
    truth = {i: released_ground_truth("pattern")[i] for i in sorted(images)}
    questions = build_questions(truth, split)
    assert len(questions) == 3000
    found = check_questions(questions, truth)
    assert found["yes_not_in_gt"] == found["no_but_in_gt"] == found["inconsistent"] == 0


@needs_data("coco_sample")
def test_questions_from_annotations_of_real_photographs():
    coco = CocoData.load(DATA / "coco_sample")
    truth = ground_truth(coco, coco.present_ids(), ChairMatcher())
    questions = build_questions(truth, "adversarial")
    assert questions and all(coco.image(q.image_id).file_name == q.image for q in questions)


def test_score_takes_labels_and_images_from_the_questions():
    questions = tuple(build_questions(TRUTH, "random"))
    task = Pope(questions, (), "{question}", 4)
    answers = {("pope", q.image_id, q.text): Answer("Yes", (), False, (), 0.0, 0.0) for q in questions}
    table = task.score(answers)
    assert isinstance(table, YesNoTable)
    assert table.counts() == {"n": 24, "TP": 12, "FP": 12, "TN": 0, "FN": 0, "unparsed": 0}
    assert table.image_ids.tolist() == [q.image_id for q in questions]
    assert table.question_ids[0] == f"random:{questions[0].text}" and table.truth[:2] == ("yes", "no")
    assert table.summary()["auc"] == 0.5
