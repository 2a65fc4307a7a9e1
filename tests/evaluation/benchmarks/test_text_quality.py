"""Repetition, truncation and length-matched CHAIR against naive computations, closed forms and real captions."""

import json
import math

import numpy as np
import pytest
from declared import CHAIR_STATISTICS
from shared_data import DATA, needs_data, released_ground_truth

from vlmfix.errors import DataError
from vlmfix.evals.benchmarks.chair.figures import MENTION_COUNTS, score_captions
from vlmfix.evals.benchmarks.chair.text_quality import (
    first_words,
    is_finished,
    match_by_mentions,
    match_by_words,
    repeated_four_grams,
    score_texts,
)
from vlmfix.evals.benchmarks.coco_objects import ChairMatcher

OBJECTS = ("dog", "cat", "car", "person", "cup", "chair", "hot dog", "tree", "sky", "the", "and")
MATCHER = ChairMatcher()


def random_captions(n, seed, longest=30):
    rng = np.random.default_rng(seed)
    return {i: " ".join(rng.choice(OBJECTS, size=rng.integers(0, longest))) for i in range(n)}


def truth_of(n):
    rng = np.random.default_rng(99)
    return {i: [name for name in OBJECTS[:7] if rng.random() < 0.4] for i in range(n)}


# Repetition


@pytest.mark.parametrize(("length", "times"), [(4, 2), (5, 3), (9, 4), (20, 1)])
def test_repetition_of_a_loop_in_closed_form(length, times):
    """A phrase of L different words said k times has kL - 3 runs of four words, L of them different (if k > 1)."""
    phrase = " ".join(f"w{i}" for i in range(length))
    total = times * length - 3
    assert repeated_four_grams(" ".join([phrase] * times)) == (total, total - min(length, total))


def test_repetition_against_a_naive_count():
    for text in random_captions(60, 1).values():
        words = text.split()
        seen: list[list[str]] = []
        repeats = 0
        for i in range(len(words) - 3):
            repeats += words[i : i + 4] in seen
            seen.append(words[i : i + 4])
        assert repeated_four_grams(text) == (max(0, len(words) - 3), repeats)


@pytest.mark.parametrize("text", ["", "a dog", "a dog barks", "A cat on a mat."])
def test_short_captions_do_not_repeat(text):
    assert score_texts({1: text}).summary()["repetition"] == 0


def test_case_and_punctuation_do_not_hide_a_repeat():
    assert repeated_four_grams("A dog is here. A dog, is here!") == (5, 1)
    assert repeated_four_grams("The man's t-shirt is red; the man's t-shirt is red") == (7, 2)


def test_rates_by_hand():
    table = score_texts({2: "a b c d", 1: "x y z w " * 5, 3: "no end"}, {1: True, 2: False, 3: False})
    assert table.image_ids.tolist() == [1, 2, 3]
    assert table.counts() == {
        "captions": 3, "four_grams": 18, "repeated_four_grams": 13, "looping_captions": 1, "unfinished_captions": 3,
        "truncated_captions": 1,
    }  # fmt: skip
    assert table.summary() == pytest.approx(
        {"repetition": 13 / 17 / 3, "looping": 1 / 3, "unfinished": 1.0, "truncation": 1 / 3}
    )


def test_half_repeated_is_not_looping():
    assert score_texts({1: "a b c d " * 2}).repetition[0] == 0.2
    exactly_half = "a a a a a b c d e f"  # 7 runs: aaaa twice
    assert repeated_four_grams(exactly_half) == (7, 1)
    half = score_texts({1: "a a a a a"})  # two runs, one of them a repeat
    assert half.repetition[0] == 0.5 and not half.looping[0]
    assert score_texts({1: "a a a a a a"}).looping[0]


# Ends


@pytest.mark.parametrize(
    ("text", "finished"),
    [("A dog.", True), ("A dog. ", True), ('"A dog!"', True), ("(a dog?)", True), ("一只狗。", True), ("A dog…", True),
     ("A dog", False), ("A dog,", False), ("", False), ("Mr. Dog and", False), ("A dog:", False)],
)  # fmt: skip
def test_final_punctuation(text, finished):
    assert is_finished(text) == finished


def test_truncation_is_not_guessed():
    table = score_texts({1: "a dog and"})
    assert "truncated" not in table.columns
    assert "truncation" not in table.summary() and "truncated_captions" not in table.counts()
    assert table.summary()["unfinished"] == 1


def test_what_is_missing_is_an_error():
    with pytest.raises(DataError, match="no captions"):
        score_texts({})
    with pytest.raises(DataError, match="image 2"):
        score_texts({1: "a", 2: "b"}, {1: True})


# Equal length


def test_first_words_keep_the_text_as_it_is():
    text = " A  dog,\n and\ta cat. "
    assert first_words(text, 99) == text == first_words(text, 5)
    assert first_words(text, 3) == " A  dog,\n and"
    assert first_words(text, 0) == "" == first_words("", 3)


def naive_by_words(a, b, truth):
    tables = []
    for own, other in ((a, b), (b, a)):
        cut = {i: " ".join(own[i].split()[: min(len(own[i].split()), len(other[i].split()))]) for i in own}
        tables.append(score_captions(cut, truth, MATCHER))
    return tables


def naive_by_mentions(a, b, truth):
    """The counts (mentions, hallucinated, recalled, distinct) of each image."""
    both = []
    for own, other in ((a, b), (b, a)):
        rows = []
        for i in sorted(own):
            mine, theirs = MATCHER.match(own[i]).nodes, MATCHER.match(other[i]).nodes
            kept = [node for position, node in enumerate(mine) if position < len(theirs)]
            wrong = [node for node in kept if node not in truth[i]]
            rows.append((len(kept), len(wrong), len({*kept} & {*truth[i]}), len({*kept})))
        both.append(rows)
    return both


def columns(table):
    names = ("mentions", "hallucinated", "recalled", "distinct")
    return list(zip(*(getattr(table, name).tolist() for name in names), strict=True))


def test_equal_words_against_cutting_and_scoring_again():
    a, b, truth = random_captions(80, 1), random_captions(80, 2), truth_of(80)
    tables = [score_captions(captions, truth, MATCHER) for captions in (a, b)]
    for found, expected in zip(match_by_words(a, b, *tables, truth, MATCHER), naive_by_words(a, b, truth), strict=True):
        assert columns(found) == columns(expected)
        assert found.gt_objects.tolist() == expected.gt_objects.tolist()
        assert found.sums(MENTION_COUNTS).items() <= expected.counts().items()
    assert found.mentions.sum() < tables[1].mentions.sum(), "something was cut"


def test_equal_mentions_against_a_naive_count():
    a, b, truth = random_captions(80, 1), random_captions(80, 2), truth_of(80)
    tables = [score_captions(captions, truth, MATCHER) for captions in (a, b)]
    found = match_by_mentions(*tables, truth)
    assert [columns(table) for table in found] == naive_by_mentions(a, b, truth)
    assert (found[0].mentions == found[1].mentions).all()
    assert (found[0].mentions == np.minimum(tables[0].mentions, tables[1].mentions)).all()


def both_ways(a, b, truth):
    tables = [score_captions(captions, truth, MATCHER) for captions in (a, b)]
    return match_by_words(a, b, *tables, truth, MATCHER), match_by_mentions(*tables, truth)


def test_identical_captions_have_identical_and_unchanged_scores():
    a, truth = random_captions(50, 3), truth_of(50)
    full = score_captions(a, truth, MATCHER)
    for pair in both_ways(a, dict(a), truth):
        for table in pair:
            assert columns(table) == columns(full)
            for name in ("chair_s", "chair_i", "recall", "precision", "f1"):
                assert CHAIR_STATISTICS[name].of(table) == pytest.approx(full.summary()[name])


def test_a_method_that_only_shortens_has_no_gain_left():
    """Objects invented late: stopping earlier lowers CHAIR_i, and nothing remains of that at equal length."""
    rng = np.random.default_rng(0)
    truth = {i: ["dog", "cat"] for i in range(60)}
    long = {i: "a dog and a cat" + " and a car" * int(rng.integers(1, 4)) for i in range(60)}
    short = {i: " ".join(text.split()[: int(rng.integers(2, 7))]) + "." for i, text in long.items()}
    tables = [score_captions(captions, truth, MATCHER) for captions in (short, long)]
    chair_i = CHAIR_STATISTICS["chair_i"]
    assert chair_i.difference(*tables).high < -0.1
    for pair in both_ways(short, long, truth):
        assert columns(pair[0]) == columns(pair[1])
        found = chair_i.difference(*pair)
        assert (found.estimate, found.low, found.high, found.p_value) == (0, 0, 0, 1)


def test_a_better_method_of_the_same_length_keeps_its_gain():
    truth = {i: ["dog"] for i in range(40)}
    good = {i: "a dog and a dog" for i in range(40)}
    bad = {i: "a dog and a cat" if i % 2 else "a cat and a dog" for i in range(40)}
    for pair in both_ways(good, bad, truth):
        assert CHAIR_STATISTICS["chair_i"].difference(*pair).estimate == -0.5


def test_a_shorter_but_worse_method_is_exposed():
    """One invented object against one right and one invented: the early invention counts fully at equal length."""
    worse, base = {1: "a car", 2: "a dog"}, {1: "a dog, a car, a cup", 2: "a dog, a car, a cup"}
    for pair in both_ways(worse, base, {1: ["dog"], 2: ["dog"]}):
        assert [CHAIR_STATISTICS["chair_i"].of(table) for table in pair] == [0.5, 0.0]


def test_an_empty_caption_leaves_nothing_to_compare():
    for pair in both_ways({1: ""}, {1: "a dog"}, {1: ["dog"]}):
        assert all(math.isnan(CHAIR_STATISTICS["chair_i"].of(table)) for table in pair)
        assert pair[1].sums(MENTION_COUNTS)["mentions"] == 0


def test_other_images_are_refused():
    one, two = {1: "a dog"}, {2: "a dog"}
    truth = {1: ["dog"], 2: ["dog"]}
    first, second = (score_captions(captions, truth, MATCHER) for captions in (one, two))
    with pytest.raises(DataError, match="same images"):
        match_by_mentions(first, second, truth)
    with pytest.raises(DataError, match="same images"):
        match_by_words(one, two, first, second, truth, MATCHER)
    with pytest.raises(DataError, match="same ids"):
        match_by_words(two, one, first, first, truth, MATCHER)


# Real captions


def released(name):
    lines = (DATA / f"chair_captions/opera/{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return {int(row["image_id"]): str(row["caption"]) for row in map(json.loads, lines)}


@needs_data("chair_captions/opera", "chair_gt")
def test_released_captions_of_llava():
    a, b = released("llava-1.5_ours"), released("llava-1.5_greedy")
    truth = {i: released_ground_truth("pattern")[i] for i in b}
    tables = [score_captions(captions, truth, MATCHER) for captions in (a, b)]
    found = match_by_words(a, b, *tables, truth, MATCHER)
    for table, expected in zip(found, naive_by_words(a, b, truth), strict=True):
        assert columns(table) == columns(expected)
    quality = score_texts(b)
    assert quality.counts()["captions"] == 500 and quality.summary()["repetition"] < 0.2
    assert quality.four_grams.sum() < tables[1].words.sum()
