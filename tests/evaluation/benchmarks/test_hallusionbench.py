"""HallusionBench: figures and diagnosis by hand, question files, the command line, and the official figures."""

import itertools
import json
import math
import zlib
from pathlib import Path
from typing import Any

import pytest
from shared_data import DATA, needs_data, official

from vlmfix.errors import DataError
from vlmfix.evals.benchmarks.hallusionbench.data import HallusionQuestion, load_hallusionbench
from vlmfix.evals.benchmarks.hallusionbench.figures import HallusionTable, score_answers, score_judgements


def question(
    category: str, figure: int, number: int = 0, *, visual: int | None = None, label: bool = False
) -> HallusionQuestion:
    if visual is None:
        visual = (0 if category == "VS" else 1) if figure == 0 else 2
    image = None if (category, figure) == ("VS", 0) else f"./{figure}.png"
    return HallusionQuestion(category, "chart", "0", str(figure), str(number), visual, "Is it?", "It is.", label, image)


# Two questions about an original and an edited figure; one question without an image, with it and edited.
QUESTIONS = [
    question("VD", 0, 0),
    question("VD", 0, 1, label=True),
    question("VD", 1, 0, label=True),
    question("VD", 1, 1),
    question("VS", 0, 0),
    question("VS", 1, 0, visual=1),
    question("VS", 2, 0, label=True),
]


def test_counts_and_figures_by_hand():
    table = score_judgements(QUESTIONS, [1, 1, 1, 0, 2, 1, 0])
    assert table.correct.tolist() == [True, True, True, False, True, True, False]  # unclear is right without an image
    counts = table.counts()
    assert (counts["total"], counts["correct"], counts["unclear"]) == (7, 5, 1)
    assert counts["consistency"] == {"total": 4, "correct": 2, "wrong": 1, "inconsistent": 1}
    assert counts["pair"] == {"total": 3, "total_q": 7, "correct": 1, "wrong": 2}
    assert [counts[f"{part}_{name}"] for part in ("easy", "hard") for name in ("total", "correct", "q")] == [
        *(3, 3, 4),
        *(3, 1, 3),
    ]
    figures = table.percentages()
    assert figures == pytest.approx({"aAcc": 500 / 7, "qAcc": 100 / 3, "fAcc": 50.0, "easy": 100.0, "hard": 100 / 3})
    # Wrong answers: a label no and a label yes. Answered yes: rows 1, 2 and, by mistake, 3; labels yes: 1, 2, 6.
    assert table.yes_no() == {"diff": 0.0, "fp": 0.5}
    assert "unparsed" not in counts


def test_unclear_with_an_image_is_wrong():
    for q in QUESTIONS:
        assert score_judgements([q], [2]).correct.tolist() == [q.category == "VS" and q.figure_id == "0"]


def test_nothing_to_count():
    table = score_judgements([question("VS", 0)], [1])
    assert math.isnan(table.percentages()["fAcc"]) and math.isnan(table.percentages()["hard"])
    assert math.isnan(table.yes_no()["fp"])


LH, VI, MIX = "LH_cg", "VI_cg", "Mix_cg"


@pytest.mark.parametrize(
    ("category", "visual", "original", "code", "same", "cause"),
    [
        ("VD", 2, 1, 0, True, MIX),
        ("VD", 2, 1, 0, False, VI),
        ("VD", 2, 1, 2, True, VI),
        ("VD", 2, 0, 0, True, VI),
        ("VD", 2, 2, 2, True, VI),
        ("VS", 1, 0, 0, True, LH),
        ("VS", 1, 0, 0, False, MIX),
        ("VS", 2, 0, 2, True, MIX),
        ("VS", 2, 2, 0, True, VI),
        ("VS", 1, 1, 0, True, VI),
        ("VS", 2, 1, 0, True, LH),
        ("VS", 2, 1, 0, False, VI),
        ("VS", 2, 1, 2, True, VI),
    ],
)
def test_diagnosis_of_a_wrong_variant(category, visual, original, code, same, cause):
    pair = [question(category, 0), question(category, 1, visual=visual)]
    found = score_judgements(pair, [original, code], same=[True, same]).counts()["pair"]
    alone = score_judgements(pair, [original, 1], same=[True, same]).counts()["pair"]
    assert isinstance(found, dict) and isinstance(alone, dict)
    assert {name: found[name] - alone[name] for name in (LH, VI, MIX) if found[name] != alone[name]} == {cause: 1}


@pytest.mark.parametrize(("category", "code", "cause"), [("VD", 0, "VI"), ("VD", 2, "VI"), ("VS", 0, "LH")])
def test_diagnosis_of_a_wrong_original(category, code, cause):
    pair = score_judgements([question(category, 0)], [code], same=[True]).counts()["pair"]
    assert isinstance(pair, dict)
    assert {name: n for name, n in pair.items() if n and name[:2] in ("LH", "VI", "Mi")} == {cause: 1, f"{cause}_cg": 1}


def test_every_wrong_group_has_one_cause():
    for codes in itertools.product(range(3), repeat=3):
        for same in itertools.product([False, True], repeat=3):
            for rows in (QUESTIONS[4:], [question("VD", i) for i in range(3)]):
                pair = score_judgements(rows, codes, same=same).counts()["pair"]
                assert isinstance(pair, dict)
                assert pair["wrong"] == pair["LH"] + pair["VI"] + pair["Mix"]


def test_diagnosis_needs_the_original():
    with pytest.raises(DataError, match="VD/chart/0/0"):
        score_judgements([question("VD", 1)], [0], same=[True]).counts()


def test_answers_without_a_judge():
    table = score_answers(QUESTIONS[:4], ["No.", "It is", "Yes, or no", "no"])
    assert isinstance(table, HallusionTable)
    assert table.code.tolist() == [1, 2, 2, 1]
    assert table.counts()["unparsed"] == 2 and "not official" in table.judge


def test_scoring_errors():
    with pytest.raises(DataError, match="no questions"):
        score_judgements([], [])
    with pytest.raises(DataError, match="7 questions but 1 codes"):
        score_judgements(QUESTIONS, [1])
    with pytest.raises(DataError, match="code 3 of question 1"):
        score_judgements(QUESTIONS[:2], [1, 3])
    with pytest.raises(DataError, match="2 questions but 1 answers"):
        score_answers(QUESTIONS[:2], ["Yes"])


# Question files.


def entry(q: HallusionQuestion, **more: Any) -> dict[str, Any]:
    names = ("category", "subcategory", "set_id", "figure_id", "question_id")
    return {
        **dict(zip(names, q.key, strict=True)),
        "visual_input": str(q.visual_input),
        "question": q.text,
        "gt_answer_details": q.reference,
        "gt_answer": str(int(q.label)),
        "filename": q.image,
        **more,
    }


def write_questions(folder: Path, *rows: Any) -> Path:
    path = folder / "HallusionBench.json"
    path.write_text(json.dumps(list(rows) or [entry(q) for q in QUESTIONS]), encoding="utf-8")
    return path


def test_load_questions(tmp_path):
    assert load_hallusionbench(write_questions(tmp_path)) == QUESTIONS


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (5, "entry 2: expected a JSON object"),
        ({"category": "VD"}, "entry 2: expected an object"),
        (entry(QUESTIONS[0], category="VX"), "entry 2: expected category VD or VS, found 'VX'"),
        (entry(QUESTIONS[0], gt_answer="yes"), "entry 2: expected gt_answer 0 or 1"),
        (entry(QUESTIONS[0], visual_input=3), "expected visual_input"),
        (entry(QUESTIONS[1]), "entry 2: the same question as entry 1"),
    ],
)
def test_broken_questions(tmp_path, row, message):
    with pytest.raises(DataError, match=message) as error:
        load_hallusionbench(write_questions(tmp_path, entry(QUESTIONS[1]), row))
    assert "HallusionBench.json" in str(error.value)


def test_broken_files(tmp_path):
    path = tmp_path / "HallusionBench.json"
    with pytest.raises(DataError, match="tianyi-lab/HallusionBench"):
        load_hallusionbench(path)
    for text, message in (("[{", "not readable JSON"), ("{}", "line 1: expected an object"), ("[]", "an empty list")):
        path.write_text(text)
        with pytest.raises(DataError, match=message):
            load_hallusionbench(path)


# The command line.


@pytest.fixture
def asked(tmp_path: Path) -> list[Any]:
    return ["--questions", write_questions(tmp_path)]


def test_score_by_order_and_by_key(score, asked):
    codes = [1, 1, 1, 0, 2, 1, 0]
    first = score("hallusionbench", [{"judge": code, "same": 1} for code in codes], *asked, "--by-order")
    assert first["counts"]["pair"]["correct"] == 1 and first["counts"]["pair"]["Mix"] == 1
    rows = [entry(q, gpt4v_output_gpt_check=str(c), same="1") for q, c in zip(QUESTIONS, codes, strict=True)]
    again = score("hallusionbench", rows[::-1], *asked)
    assert again["counts"] == first["counts"] and again["figures"] == first["figures"]
    assert score.said.splitlines()[-1].split() == "7 71.4 33.3 50.0 100.0 33.3 1 0.000 0.500".split()


def test_score_without_a_judge(score, asked):
    answers = [{"answer": text} for text in ("No", "Yes", "Yes", "No", "Perhaps", "No", "Yes")]
    assert score("hallusionbench", answers, *asked, "--by-order")["counts"]["unparsed"] == 1
    assert "not official" in score.said and "unparsed: 1 of 7" in score.said


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"judge": 1}], "1 answers without category"),
        ([{"judge": 5}] * 7, "line 1: expected 'judge' from 0 to 2, found 5"),
        ([{"judge": 1}] * 6 + [{"answer": "Yes"}], "line 7: expected 'judge'"),
        ([{"answer": "Yes"}] * 6 + [{"judge": 1}], "line 7 has a judge code and"),
        ([{"answer": "Yes"}] * 6 + [{"answer": None}], "line 7: 'answer' is null"),
        ([{"judge": 1, "same": 1}] * 6 + [{"judge": 1}], "line 7: expected 'same'"),
        ([{"judge": 1}] * 7, "are in the order of the questions, type --by-order"),
        ([{"answer": "Yes"}] * 7, "are in the order of the questions, type --by-order"),
        ([entry(q, judge=1) for q in QUESTIONS[:6]], "answers 6 of 7 questions"),
        (
            [entry(QUESTIONS[0], judge=1), entry(QUESTIONS[0], judge=2)],
            "line 2: question VD/chart/0/0/0 is answered already",
        ),
        ([entry(question("VD", 9), judge=1)], "line 1: the question file has no question VD/chart/0/9/0"),
        ([entry(QUESTIONS[0], judge=1), {"judge": 1}], "line 2: expected category"),
        (["x"], "line 1: expected a JSON object"),
    ],
)
def test_score_mismatch(score, asked, rows, message):
    assert message in score.error("hallusionbench", rows, *asked)


# Real data.


def official_judgements(n: int) -> tuple[list[int], list[bool]]:
    hashes = [zlib.crc32(str(i).encode()) for i in range(n)]
    codes = [0 if h % 5 == 0 else 2 if h % 5 == 1 and h % 3 == 0 else 1 for h in hashes]
    return codes, [h // 11 % 2 == 1 for h in hashes]


@needs_data("hallusionbench", "expected.json")
def test_official_figures(score):
    expected = official()["hallusionbench"]
    path = DATA / "hallusionbench" / "HallusionBench.json"
    questions = load_hallusionbench(path)
    assert [sum(q.category == name for q in questions) for name in ("VD", "VS")] == [591, 538]
    codes, same = official_judgements(len(questions))
    table = score_judgements(questions, codes, same=same)
    for name in ("consistency", "pair", "easy_total", "hard_total", "easy_q", "hard_q"):
        assert table.counts()[name] == expected[name], name
    assert table.percentages() == {name: expected[name] for name in ("aAcc", "qAcc", "fAcc", "easy", "hard")}
    assert table.yes_no() == expected["yes_no"]

    rows = [{"judge": code, "same": int(agrees)} for code, agrees in zip(codes, same, strict=True)]
    result = score("hallusionbench", rows, "--by-order", "--questions", path)
    assert result["counts"] == table.counts() and result["figures"] == table.percentages()
