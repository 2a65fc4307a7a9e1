"""AMBER: descriptions and questions by hand, annotation files, the command line, and the official figures."""

import dataclasses
import difflib
import functools
import gzip
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from shared_data import DATA, needs_data, official

from vlmfix.errors import DataError, UnsupportedFeatureError
from vlmfix.evals.benchmarks.amber.data import AmberData, AmberItem, load_amber
from vlmfix.evals.benchmarks.amber.figures import score_responses
from vlmfix.evals.benchmarks.amber.objects import lemma_vocabulary, spacy_similarity, tagged_nouns
from vlmfix.evals.benchmarks.amber.task import Amber, AmberQuery
from vlmfix.evals.data.samples import Answer
from vlmfix.evals.scores.bias_curves import Thinned
from vlmfix.evals.scores.thinned import thinned_versions

RELATION = {
    "sky": [],
    "road": ["street", "ground"],
    "ground": ["floor"],
    "person": ["people", "man"],
    "dog": [],
    "cat": [],
    "light": ["lamp"],
}
ANNOTATIONS: list[dict[str, Any]] = [
    {"id": 1, "type": "generative", "truth": ["road", "ground", "person"], "hallu": ["dog", "light"]},
    {"id": 2, "type": "generative", "truth": ["sky"], "hallu": ["cat", "cat"]},
    {"id": 3, "type": "discriminative-hallucination", "truth": "no"},
    {"id": 4, "type": "discriminative-attribute-state", "truth": "yes"},
    {"id": 5, "type": "discriminative-attribute-number", "truth": "no"},
    {"id": 6, "type": "discriminative-attribute-action", "truth": "no"},
    {"id": 7, "type": "discriminative-relation", "truth": "yes"},
    {"id": 8, "type": "relation", "truth": "no"},
]
QUESTIONS = {3: "No", 4: "Yes", 5: "Yes", 6: "No", 7: "No", 8: "no."}


def write_amber(folder: Path, annotations: Any = ANNOTATIONS, relation: Any = RELATION) -> Path:
    folder.mkdir(exist_ok=True)
    for name, value in (("annotations.json", annotations), ("relation.json", relation)):
        (folder / name).write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    (folder / "safe_words.txt").write_text("lamp\n\nshoe", encoding="utf-8")
    return folder


@pytest.fixture
def data(tmp_path: Path) -> AmberData:
    return load_amber(write_amber(tmp_path / "amber"))


def words(text: str) -> list[str]:
    return text.split()


# Descriptions.


def describe(data: AmberData, first: str, second: str = "sky", **options: Any) -> dict[str, int]:
    counts = score_responses(data, {1: first, 2: second}, nouns=words, **options).counts()
    return {name: counts[name] for name in ("chair_num", "chair_score", "safe_cover_score", "hallu_cover_score")}


@pytest.mark.parametrize(
    ("first", "nouns", "hallucinated", "covered", "invented"),
    [
        ("road person", 2, 0, 2, 0),
        ("street", 1, 0, 1, 0),  # associated with "road"
        ("road street road", 3, 0, 1, 0),  # one object, three nouns
        ("ground", 1, 0, 1, 0),  # stands for "road", the first object it is associated with
        ("ground road floor", 3, 0, 2, 0),
        ("dog dog", 2, 2, 0, 1),  # repeats count as nouns, not as objects
        ("cat", 1, 1, 0, 0),  # in the vocabulary, in neither list
        ("lamp", 1, 0, 0, 0),  # safe: in the denominator, nowhere else
        ("light", 1, 1, 0, 1),
        ("unicorn Dog shoe", 0, 0, 0, 0),  # outside the vocabulary, safe or not; case is kept
        ("", 0, 0, 0, 0),
    ],
)
def test_descriptions_by_hand(data, first, nouns, hallucinated, covered, invented):
    expected = {"chair_num": nouns + 1, "chair_score": hallucinated, "safe_cover_score": covered + 1}
    assert describe(data, first) == {**expected, "hallu_cover_score": invented}


def test_similar_words_count_as_the_object(data):
    pairs = {("cat", "people"): 0.9, ("cat", "dog"): 0.81, ("dog", "ground"): 0.8}

    def similarity(first: str, second: str) -> float:
        return pairs.get((first, second), 0.0)

    counts = describe(data, "cat dog", similarity=similarity)
    # "cat" is like "people", so no hallucination, and like "dog" of the other list; "dog" is not above 0.8 of anything.
    assert counts == {"chair_num": 3, "chair_score": 1, "safe_cover_score": 2, "hallu_cover_score": 1}
    alone = describe(data, "cat", similarity=similarity)
    assert alone == {"chair_num": 2, "chair_score": 0, "safe_cover_score": 2, "hallu_cover_score": 1}
    nearer = describe(data, "cat dog", similarity=lambda first, second: similarity(first, second) + 0.01)
    assert nearer["chair_score"] == 0
    table = score_responses(data, {1: "cat", 2: ""}, nouns=words, similarity=similarity, similarity_name="mine")
    assert table.similarity == "mine"


def test_figures_of_descriptions(data):
    table = score_responses(data, {1: "road dog cat", 2: "sky"}, nouns=words)
    # 2 of 4 nouns; 2 of 4 objects; 1 of 2 responses; 1 of 4 likely inventions (duplicates count).
    assert table.figures() == {"Generative Task": {"CHAIR": 50.0, "Cover": 50.0, "Hal": 50.0, "Cog": 25.0}}
    assert table.hallucinated.tolist() == [2, 0] and table.items == ("1", "2")
    assert table.counts()["empty"] == 0 and table.official_score() is None
    assert score_responses(data, {1: " ", 2: "sky"}, nouns=words).counts()["empty"] == 1


# Questions.


def test_questions_by_hand(data):
    table = score_responses(data, QUESTIONS)
    counts = table.counts()
    assert {n: c for n, c in counts.items() if n.startswith("qa_")} == {
        "qa_correct_num": 6,
        "qa_correct_score": 3,
        "qa_no_num": 4,
        "qa_no_score": 2,
        "qa_ans_no_num": 3,
        "qa_ans_no_score": 2,
    }
    assert counts["unparsed"] == 1  # "no." is not "No"
    assert (counts["asso_qa_correct_num"], counts["asso_qa_correct_score"], counts["asso_qa_no_num"]) == (2, 0, 1)
    assert table.splits == ("existence", "state", "number", "action", "relation", "relation")
    figures = table.figures()
    assert figures["Descriminative Task"] == {"Accuracy": 50.0, "Precision": 66.6, "Recall": 50.0, "F1": 57.1}
    assert figures["Exsitence"] == {"Accuracy": 99.9, "Precision": 99.9, "Recall": 99.9, "F1": 99.9}
    assert figures["Relation"]["F1"] == 0.0
    assert "Generative Task" not in figures


def test_small_terms_of_the_denominators(data):
    right = {i: "Yes" if data.items[i].label else "No" for i in QUESTIONS}
    figures = score_responses(data, right).figures()
    accuracy = {name: group["Accuracy"] for name, group in figures.items()}
    # 6 / 6.001, 3 / 3.003 (three counters, each from 0.001), 1 / 1.001
    assert (accuracy["Descriminative Task"], accuracy["Attribute"], accuracy["State"]) == (100.0, 99.9, 99.9)


@pytest.mark.parametrize(("task", "f1"), [("existence", 66.6), ("state", 66.7)])
def test_f1_of_existence_has_a_larger_term(task, f1):
    items = {i: AmberItem(i, task, label=False) for i in range(1, 5)}
    answers = {i: "No" if i <= 2 else "Yes" for i in items}
    figures = score_responses(AmberData(items, {}, frozenset()), answers).figures()
    assert figures[{"existence": "Exsitence", "state": "State"}[task]]["F1"] == f1


def test_one_dimension_alone(data):
    figures = score_responses(data, {3: "Yes"}).figures()
    assert figures == {"Exsitence": {"Accuracy": 0.0, "Precision": 0.0, "Recall": 0.0, "F1": 0.0}}


def test_dimensions_without_a_question_are_no_part_of_a_group(data):
    kept = dataclasses.replace(data, items={i: data.items[i] for i in (3, 4, 6)})
    figures = score_responses(kept, {3: "No", 4: "No", 6: "No"}).figures()
    assert list(figures) == ["Descriminative Task", "Exsitence", "Attribute", "State", "Action"]
    # 2 / 3.001; 1 / 2.002 (two counters, each from 0.001)
    assert (figures["Descriminative Task"]["Accuracy"], figures["Attribute"]["Accuracy"]) == (66.6, 50.0)
    figures = score_responses(data, {3: "No", 4: "No", 6: "No"}).figures()
    assert "Descriminative Task" not in figures and "Attribute" not in figures, "5, 7 and 8 were left out"


def test_descriptions_are_ended_where_their_cover_is_the_methods(data, monkeypatch):
    """By hand: item 1 loses "person" and the invented dog at a bias of 1, item 2 everything at 3."""
    monkeypatch.setattr("vlmfix.evals.benchmarks.amber.task.tagged_nouns", lambda: words)
    queries = tuple(AmberQuery(data.items[i], f"AMBER_{i}.jpg", Path("x.jpg"), "Describe.") for i in (1, 2))
    kept = dataclasses.replace(data, items={i: data.items[i] for i in (1, 2)})
    task = Amber(queries, kept, (), "{question}", (9, 9))
    task = dataclasses.replace(task, samples=tuple(map(task.sample, queries)))

    def decode(ids):
        return " ".join({10: "road", 11: "person", 12: "dog", 20: "sky", 21: "cat"}[i] for i in ids)

    answers = {
        sample.key: Answer(decode(ids), ids, False, gaps, None, 0.0)
        for sample, ids, gaps in zip(
            task.samples, ((10, 11, 12), (20, 21)), ((5.0, 1.0, 4.0, 0.0), (3.0, 4.0, 0.0)), strict=True
        )
    }
    curve = Thinned(thinned_versions(task, answers, decode)["early stop"])
    cover, chair = (Amber.figure(name).statistic for name in ("cover", "chair"))
    assert curve.points(cover, [chair])[:3] == [(0.0, 0.75, 0.4), (1.0, 0.5, 1 / 3), (3.0, 0.25, 0.0)]
    place = curve.nearest(cover, 0.5)
    assert curve.biases[place] == 1.0 and sorted(curve.table(place).nouns.tolist()) == [1, 2]


def test_amber_score(data):
    table = score_responses(data, {1: "road dog", 2: "sky", **QUESTIONS}, nouns=words)
    assert table.official_score() == pytest.approx((100 - 33.3 + 57.1) / 2)


@pytest.mark.parametrize(
    ("responses", "message"),
    [
        ({}, "no responses"),
        ({99: "Yes"}, "no item 99"),
        ({1: "a road"}, "1 of the 2 generative items .* id 2"),
        ({7: "Yes"}, "relation items .* id 8"),
    ],
)
def test_incomplete_responses(data, responses, message):
    with pytest.raises(DataError, match=message):
        score_responses(data, responses, nouns=words)


def test_lemmas_are_known_for_the_released_vocabulary_only(tmp_path):
    other = load_amber(write_amber(tmp_path / "amber", relation={**RELATION, "unicorn": []}))
    with pytest.raises(DataError, match="unicorn"):
        score_responses(other, {1: "", 2: ""})


# Annotation files.


@pytest.mark.parametrize(
    ("annotations", "message"),
    [
        ("[{", "not readable JSON"),
        ("{}", "expected a JSON list"),
        ([{"id": 1}], "entry 1: expected an object with id, type and truth"),
        ([{"id": "1", "type": "relation", "truth": "no"}], "integer id"),
        ([ANNOTATIONS[0], {"id": 2, "type": "poetry", "truth": "no"}], "entry 2: unknown type 'poetry'"),
        ([{"id": 1, "type": "relation", "truth": "maybe"}], "'maybe'"),
        ([{"id": 1, "type": "generative", "truth": ["sky"]}], "truth and hallu"),
        ([{"id": 1, "type": "generative", "truth": ["unicorn"], "hallu": []}], "'unicorn' has no row"),
        ([ANNOTATIONS[2], ANNOTATIONS[2]], "entry 2: id 3 occurs twice"),
    ],
)
def test_broken_annotations(tmp_path, annotations, message):
    with pytest.raises(DataError, match=message) as error:
        load_amber(write_amber(tmp_path / "amber", annotations))
    assert "annotations.json" in str(error.value)


def test_broken_or_missing_files(tmp_path):
    with pytest.raises(DataError, match="junyangwang0410/AMBER"):
        load_amber(tmp_path)
    with pytest.raises(DataError, match=r"relation\.json"):
        load_amber(write_amber(tmp_path / "a", relation={"sky": "cloud"}))
    folder = write_amber(tmp_path / "b")
    (folder / "safe_words.txt").unlink()
    with pytest.raises(DataError, match=r"safe_words\.txt"):
        load_amber(folder)


def test_packed_files(tmp_path, data):
    folder = write_amber(tmp_path / "packed")
    path = folder / "annotations.json"
    (folder / "annotations.json.gz").write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()
    assert load_amber(folder) == data
    (folder / "annotations.json.gz").write_bytes(b"no gzip")
    with pytest.raises(DataError, match="not readable JSON"):
        load_amber(folder)
    assert data.items[4] == AmberItem(4, "state", label=True)
    assert data.safe_words == {"lamp", "shoe"} and "street" in data.vocabulary


# The command line.


def test_score_amber(tmp_path, score):
    rows = [{"id": i, key: text} for (i, text), key in zip(QUESTIONS.items(), ["response", "answer"] * 3, strict=True)]
    result = score("amber", rows, "--data", write_amber(tmp_path / "amber"))
    assert "word similarity none" in score.said and "unparsed: 1 of 6" in score.said
    assert "All 50.0 66.6 50.0 57.1".split() in [line.split() for line in score.said.splitlines()]
    assert result["counts"]["qa_correct_score"] == 3 and result["figures"]["Descriminative Task"]["F1"] == 57.1
    assert result["similarity"] == "none"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"id": 99, "response": "No"}], "line 1: expected 'id', an item of AMBER's annotations, found 99"),
        ([{"response": "No"}], "found None"),
        ([{"id": 3}], "line 1: expected one of response"),
        ([{"id": 3, "response": None}], "line 1: 'response' is null"),
        ([{"id": 7, "response": "No"}], "first: id 8"),
    ],
)
def test_score_amber_mismatch(tmp_path, score, rows, message):
    assert message in score.error("amber", rows, "--data", write_amber(tmp_path / "amber"))


# Word vectors are the user's.


def test_spacy_is_plugged_in(monkeypatch):
    class Doc:
        def __init__(self, text: str):
            self.text = text

        def similarity(self, other: "Doc") -> float:
            return float(self.text[0] == other.text[0])

    module = types.ModuleType("spacy")
    module.load = lambda name: Doc  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "spacy", module)
    similarity = spacy_similarity()
    assert (similarity("dog", "door"), similarity("dog", "cat")) == (1.0, 0.0)


def test_missing_spacy_is_an_error(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "spacy", None)
    with pytest.raises(UnsupportedFeatureError, match="spacy download en_core_web_lg"):
        spacy_similarity()


# Real data.


def test_missing_nltk_is_an_error(monkeypatch):
    nltk = pytest.importorskip("nltk")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "nltk", None)
        with pytest.raises(UnsupportedFeatureError, match=r"vlmfix\[nltk\]"):
            tagged_nouns()
    monkeypatch.setattr(nltk.data, "path", [])
    with pytest.raises(DataError, match="punkt_tab"):
        tagged_nouns()


def test_nouns(nltk_data):
    nouns = tagged_nouns()
    assert nouns("Two dogs run on the beaches near the shelves and children.") == "dog beach shelf child".split()
    # WordNet knows "men", "vas" and "sunglass": these words are lost in the official script too.
    assert not {"man", "vase", "sunglasses"} & set(nouns("The men hold vases and sunglasses."))
    assert nouns("The women see TV.") == ["woman", "TV"]


@functools.cache
def released() -> AmberData:
    return load_amber(DATA / "amber")


@functools.cache
def responses() -> dict[int, str]:
    return {
        r["id"]: r["response"]
        for r in json.loads(gzip.decompress((DATA / "amber/responses_synthetic.json.gz").read_bytes()))
    }


@needs_data("amber")
def test_released_annotations():
    items = released().items.values()
    tasks = [item.task for item in items]
    assert {task: tasks.count(task) for task in set(tasks)} == {
        "generative": 1004,
        "existence": 4924,
        "state": 4764,
        "number": 2072,
        "action": 792,
        "relation": 975 + 689,
    }
    assert sum(item.label is True for item in items) == 4789 and sum(item.label is False for item in items) == 9427
    assert released().vocabulary == lemma_vocabulary()


@needs_data("amber", "expected.json")
@pytest.mark.parametrize("name", ["similarity_zero", "similarity_difflib"])
def test_official_figures(name, nltk_data):
    similarity = None
    if name == "similarity_difflib":
        similarity = lambda a, b: difflib.SequenceMatcher(None, a, b).ratio()  # noqa: E731
    expected = official()["amber"]["synthetic"][name]
    assert score_responses(released(), responses(), similarity=similarity).figures() == expected


@needs_data("amber", "expected.json")
def test_score_amber_gives_the_official_figures(score, nltk_data):
    rows = [{"id": i, "response": text} for i, text in responses().items()]
    result = score("amber", rows, "--data", DATA / "amber")
    expected = official()["amber"]["synthetic"]["similarity_zero"]
    assert result["figures"] == expected
    assert result["counts"].items() >= {"chair_num": 5166, "non_hallu_num": 1004, "qa_correct_num": 14216}.items()
