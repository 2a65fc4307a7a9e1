"""MMHal-Bench: ratings, the pluggable judge, requests without one, templates, and the official arithmetic."""

import json
import zlib
from pathlib import Path
from typing import Any

import pytest
from shared_data import DATA, needs_data, official

from vlmfix.errors import DataError
from vlmfix.evals.benchmarks.mmhal.figures import (
    TYPES,
    MmhalItem,
    MmhalTable,
    judge_prompt,
    load_mmhal,
    parse_rating,
    score_judgements,
)
from vlmfix.evals.benchmarks.mmhal.task import Judge, Mmhal
from vlmfix.evals.data.samples import Answer, Sample

ITEMS = [
    MmhalItem(i, TYPES[i % 8], f"image{i}", ("Cat", f"Thing {i}"), f"What is {i}?", f"It is {i}.") for i in range(16)
]


@pytest.mark.parametrize(
    ("text", "rating"),
    [
        ("Good. Rating: 4", 4),
        ("rating: 0, no information", 0),
        ("RATING: 6\nRating: 6", 6),
        ("Rating: 3 or Rating: 2", None),
        ("Rating:5", None),
        ("Rating: 7", None),
        ("", None),
    ],
)
def test_ratings_are_read(text, rating):
    assert parse_rating(text) == rating


def score_ratings(items: list[MmhalItem], ratings: list[int], judge: str = "unnamed") -> MmhalTable:
    return score_judgements(items, [f"Rating: {rating}" for rating in ratings], judge=judge)


def test_figures_by_hand():
    table = score_ratings(ITEMS, [6, 3, 2, 0, 5, 1, 4, 3, *[3] * 8], judge="by hand")
    assert table.counts() == {"n": 16, "rating_sum": 48, "hallucinated": 3, "unparsed": 0}
    assert table.summary() == {"average_score": 3.0, "hallucination_rate": 3 / 16}
    assert list(table.by_type().items())[:3] == [("attribute", 4.5), ("adversarial", 3.0), ("comparison", 2.5)]
    assert score_ratings(ITEMS[:2], [1, 2]).by_type() == {"attribute": 1.0, "adversarial": 2.0}


def test_unclear_judgements_are_rated_zero_and_counted():
    table = score_judgements(ITEMS[:3], ["Rating: 5", "no idea", "rating: 1 rating: 2"])
    assert table.rating.tolist() == [5, 0, 0] and table.unparsed.tolist() == [False, True, True]
    assert table.counts() == {"n": 3, "rating_sum": 5, "hallucinated": 2, "unparsed": 2}


def test_the_judge_is_pluggable(tmp_path, monkeypatch):
    monkeypatch.setenv("VLMFIX_CACHE", str(tmp_path))
    prompts = []

    def judge(prompt: str) -> str:
        prompts.append(prompt)
        return f"Rating: {len(prompts)}"

    each = tuple(Sample("mmhal", item.index, None, item.text) for item in ITEMS[:3])
    answers = {sample.key: Answer(text) for sample, text in zip(each, "abc", strict=True)}
    task = Mmhal(tuple(ITEMS[:3]), each, judge=Judge("counter", judge))
    table = task.score(answers)
    assert table is not None and table.rating.tolist() == [1, 2, 3] and table.judge == "counter"
    assert prompts[1] == judge_prompt(ITEMS[1], "b")
    for part in ("Cat, Thing 1", "What is 1?", "It is 1.", "b"):
        assert part in prompts[1]
    assert judge_prompt(ITEMS[1], "b", instruction="Rate it.").startswith("Rate it.")
    again = task.score(answers)
    assert again is not None and again.rating.tolist() == [1, 2, 3] and len(prompts) == 3, "asked for once"


def test_scoring_errors():
    with pytest.raises(DataError, match="no questions"):
        score_judgements([], [])
    with pytest.raises(DataError, match="16 questions but 1"):
        score_judgements(ITEMS, ["Rating: 1"])


# Templates.


def entry(item: MmhalItem, **more: Any) -> dict[str, Any]:
    return {
        "question_type": item.type,
        "image_id": item.image_id,
        "image_content": list(item.image_content),
        "question": item.text,
        "gt_answer": item.reference,
        "model_answer": "",
        **more,
    }


def write_template(folder: Path, rows: Any = None) -> Path:
    path = folder / "response_template.json"
    path.write_text(json.dumps([entry(item) for item in ITEMS] if rows is None else rows), encoding="utf-8")
    return path


def test_load_template(tmp_path):
    assert load_mmhal(write_template(tmp_path)) == ITEMS


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({}, "line 1: expected an object"),
        ([5], "entry 1: expected a JSON object"),
        ([{"question": "?"}], "entry 1: expected an object"),
        ([entry(ITEMS[1])], "entry 1: expected a question of type 'attribute', found 'adversarial'"),
        ([entry(ITEMS[0], image_content="Cat")], "image_content to be a list"),
        ([*map(entry, ITEMS[:8]), entry(ITEMS[0])], "entry 9: the same question as entry 1"),
    ],
)
def test_broken_templates(tmp_path, rows, message):
    with pytest.raises(DataError, match=message) as error:
        load_mmhal(write_template(tmp_path, rows))
    assert "response_template.json" in str(error.value)


def test_missing_template(tmp_path):
    with pytest.raises(DataError, match="MMHal-Bench"):
        load_mmhal(tmp_path / "response_template.json")
    (tmp_path / "response_template.json").write_text("[{")
    with pytest.raises(DataError, match="not readable JSON"):
        load_mmhal(tmp_path / "response_template.json")


# The command line.


@pytest.fixture
def asked(tmp_path: Path) -> list[Any]:
    return ["--questions", write_template(tmp_path)]


def test_without_a_judge_requests_are_written(tmp_path, score, asked):
    answers = [entry(item, model_answer=f"Answer {item.index}") for item in ITEMS]
    assert score("mmhal", answers[::-1], *asked) == {}
    assert "not scored" in score.said and "answers.judge.jsonl" in score.said
    requests = [json.loads(line) for line in (tmp_path / "answers.judge.jsonl").read_text().splitlines()]
    assert requests == [{"index": item.index, "prompt": judge_prompt(item, f"Answer {item.index}")} for item in ITEMS]
    score("mmhal", answers, *asked, "--requests", tmp_path / "r.jsonl")
    assert (tmp_path / "r.jsonl").read_text() == (tmp_path / "answers.judge.jsonl").read_text()


def test_judgements_come_back(score, asked):
    rows = [{"index": i, "judgement": f"Fine. Rating: {i % 7}"} for i in range(16)]
    result = score("mmhal", rows[::-1], *asked, "--judge", "some-model")
    assert "judge some-model" in score.said
    assert result["counts"] == {"n": 16, "rating_sum": 43, "hallucinated": 8, "unparsed": 0}
    assert result["judge"] == "some-model" and result["types_in_order"] == list(TYPES)
    again = score("mmhal", [{"rating": i % 7} for i in range(16)], *asked, "--by-order")
    assert "--judge NAME" in score.said and again["counts"] == result["counts"]
    assert score.said.splitlines()[-1].split()[:4] == ["16", "2.69", "50.0", "0.50"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"rating": 1}], "1 answers without image_id, question"),
        ([{"rating": 7}] * 16, "line 1: expected 'rating' from 0 to 6, found 7"),
        ([{"rating": 1}] * 15 + [{"model_answer": "x"}], "line 16 has no rating or judgement"),
        ([{"rating": 1}] * 15 + [{"judgement": "rating: 1"}], "line 1: expected one of judgement"),
        ([{"rating": 1}] * 16, "are in the order of the questions, type --by-order"),
        ([{"model_answer": f"Answer {i}"} for i in range(16)], "are in the order of the questions, type --by-order"),
        ([entry(item) for item in ITEMS], "every answer is empty"),
        ([{"index": i, "rating": 1} for i in range(15)], "answers 15 of 16 questions"),
        ([{"index": 0, "rating": 1}, {"index": 0, "rating": 2}], "line 2: question 0 is answered already"),
        ([{"index": 16, "rating": 1}], "line 1: the question file has no question 16"),
    ],
)
def test_score_mismatch(score, asked, rows, message):
    assert message in score.error("mmhal", rows, *asked)


# Real data.


@needs_data("mmhal_bench", "expected.json")
def test_official_arithmetic(score):
    expected = official()["mmhal"]
    template = DATA / "mmhal_bench" / "response_template.json"
    items = load_mmhal(template)
    ratings = [zlib.crc32(str(i).encode()) % 7 for i in range(96)]
    table = score_ratings(items, ratings)
    assert table.summary() == {name: expected[name] for name in ("average_score", "hallucination_rate")}
    assert list(table.by_type().values()) == expected["by_type"]
    assert list(table.by_type()) == expected["types_in_order"]
    judged = score_judgements(items, [f"Rating: {rating}" for rating in ratings])
    assert judged.rating.tolist() == ratings and not judged.unparsed.any()

    result = score("mmhal", [{"rating": rating} for rating in ratings], "--by-order", "--questions", template)
    assert {name: result[name] for name in expected if name != "command"} == {
        name: value for name, value in expected.items() if name != "command"
    }
