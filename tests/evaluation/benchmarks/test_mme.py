"""MME, hallucination subset: parsers, scores by hand and the command line, all on made-up questions."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from vlmfix.errors import DataError
from vlmfix.evals.benchmarks.mme.figures import TASKS, MmeQuestion, MmeTable, parse_answer, score_answers
from vlmfix.evals.benchmarks.mme.task import load_results

Answered = tuple[MmeQuestion, str]


@pytest.mark.parametrize(
    ("answer", "official", "lmms"),
    [
        ("Yes", True, True),
        ("NO", False, False),
        ("Yes, there is.", True, True),
        ("no\n", False, False),
        (" no", False, False),
        ("I know", None, None),
        ("   no", None, False),  # "no" begins too late for the official rule
        ("y", None, True),
        ("N.", None, False),
        ("Not yes", False, False),
        ("oyes", True, True),
        ("", None, None),
        ("Maybe", None, None),
    ],
)
def test_parsers(answer, official, lmms):
    assert parse_answer(answer) is official
    assert parse_answer(answer, "lmms") is lmms


def test_unknown_parser():
    with pytest.raises(DataError, match="official, lmms"):
        parse_answer("yes", "other")  # type: ignore[arg-type]


def pair(image: str, first: str, second: str, task: str = "count") -> list[Answered]:
    asked = MmeQuestion(task, image, "Is it so?", True), MmeQuestion(task, image, "Is it not?", False)
    return [(asked[0], first), (asked[1], second)]


def scored(answers: Sequence[Answered]) -> MmeTable:
    return score_answers([question for question, _ in answers], [text for _, text in answers])


def test_scores_by_hand():
    answers = [*pair("a", "Yes", "No"), *pair("b", "Yes", "Yes"), *pair("c", "Perhaps", "No")]
    answers = answers[::2] + answers[1::2]  # the questions of an image need not follow each other
    table = scored(answers).tasks()["count"]
    assert table.images.tolist() == [True, True, True, False, False, False]  # the first questions of a, b and c
    assert table.correct.tolist() == [True, True, False, True, False, True]
    assert table.both_correct.tolist() == [True, False, False, False, False, False]
    assert table.counts() == {"n": 6, "correct": 4, "images": 3, "both_correct": 1, "yes": 3, "unparsed": 1}
    expected = {"accuracy": 4 / 6, "accuracy_plus": 1 / 3, "yes_ratio": 0.5, "score": 100.0}
    assert table.summary() == pytest.approx(expected)


def test_total_needs_all_four_tasks():
    tasks = {task: pair("a", "Yes", "No", task) for task in TASKS}
    table = scored([answer for rows in tasks.values() for answer in rows][::-1])
    assert list(table.tasks()) == list(TASKS) and table.total() == 800.0
    assert scored([answer for task in TASKS[:3] for answer in tasks[task]]).total() is None


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ([], "no answer belongs"),
        (pair("a", "Yes", "No")[:1], "image a: .* found 1 answers to 1"),
        (pair("a", "Yes", "No")[:1] * 2, "found 2 answers to 1"),
        ([*pair("a", "Yes", "No"), *pair("a", "Yes", "No")], "found 4 answers to 2"),
    ],
)
def test_broken_answers(answers, message):
    with pytest.raises(DataError, match=message):
        scored(answers)


# Files and the command line.


def whole(tasks: Sequence[str] = TASKS, answers: tuple[str, str] = ("Yes", "No.")) -> list[Answered]:
    return [a for task in tasks for i in range(30) for a in pair(f"{i}.jpg", *answers, task)]


def as_row(answered: Answered, **more: Any) -> dict[str, Any]:
    question, answer = answered
    label = "Yes" if question.label else "No"
    row = {"task": question.task, "image": question.image, "question": question.text, "label": label}
    return {**row, "answer": answer, **more}


def write_folder(folder: Path, answers: Sequence[Answered]) -> Path:
    folder.mkdir()
    for task in {q.task for q, _ in answers}:
        rows = [(q.image, q.text, "Yes" if q.label else "No", text) for q, text in answers if q.task == task]
        (folder / f"{task}.txt").write_text("".join("\t".join(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def test_load_results(tmp_path):
    answers = [*pair("a", "Yes", "no dog"), *pair("b", "", "x")]
    assert load_results(write_folder(tmp_path / "r", [*answers, *pair("a", "No", "No", "OCR")])) == answers


def test_score_mme(tmp_path, score):
    result = score("mme", write_folder(tmp_path / "r", whole()))
    assert score.said.splitlines()[-1] == "total (800): 800.00"
    assert result["tasks"]["color"]["counts"] == {
        "n": 60,
        "correct": 60,
        "images": 30,
        "both_correct": 30,
        "yes": 30,
        "unparsed": 0,
    }
    again = score("mme", [as_row(a) for a in whole()][::-1])
    assert again["tasks"] == result["tasks"] and again["total"] == 800.0


def test_score_one_task_with_the_other_parser(score):
    rows = [
        {"category": q.task, "question_id": q.image, "question": q.text, "label": "yes" if q.label else "no"}
        | {"response": text}
        for q, text in whole(["count"], ("Y", "Y"))
    ]
    score("mme", rows, "--parser", "lmms")
    assert score.said.splitlines()[-1].split() == "count 60 50.0 0.0 50.00 100.0 0".split()
    assert score("mme", rows)["total"] is None
    assert score.said.splitlines()[-1].split()[-1] == "60"  # unparsed


def test_other_tasks_are_left_out_and_a_task_must_be_complete(score):
    others = [as_row(a) for a in pair("1.jpg", "No", "No", "OCR")]
    assert list(score("mme", [*others, *(as_row(a) for a in whole(["count"]))])["tasks"]) == ["count"]
    assert "no answer belongs" in score.error("mme", others)
    rows = [as_row(a) for a in pair("1.jpg", "Yes", "No")]
    assert "answers to 1 of 30 images of count: answer them all" in score.error("mme", rows)
    assert score("mme", rows, "--subset")["answered"] == {"images of count": {"answered": 1, "of": 30}}
    assert "SUBSET: 1 of 30 images of count" in score.said


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.jpg\tIs it so?\tYes\n", "count.txt line 1: expected four columns"),
        ("a.jpg\tIs it so?\tYes\tNo\n\na.jpg\tIs it?\tTrue\tNo\n", "count.txt line 3: expected the label"),
        ("", "count.txt is empty"),
    ],
)
def test_broken_results(tmp_path, score, text, message):
    (tmp_path / "count.txt").write_text(text)
    assert message in score.error("mme", tmp_path)


def test_missing_results(tmp_path, score):
    assert "existence.txt" in score.error("mme", tmp_path)
