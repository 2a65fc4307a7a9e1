"""The fast tokenizer and tagger say what nltk's own say: on made-up tables and texts, and on real ones."""

import gzip
import json
import random
from pathlib import Path
from typing import Any

import pytest
from shared_data import DATA, needs_data

from vlmfix.evals.benchmarks.nltk_words import FastTagger, FastTokenizer, punkt_tokens

nltk = pytest.importorskip("nltk")

# What decides between sentence ends and abbreviations, between words, quotes and symbols.
PIECES = (
    "a dog the no mr st u.s. e.g. . . . , ; : ... ? ! ' \" ( ) -- - 3.5 1,000 2019 42 cannot gonna it's dogs' can't "
    "sat fig red-brown well-no \n \n\n \t \u00a0 «x» ” é x. b c. wanna p.m 10. no. table.the word- -word , and two "
    "wine glasses"
).split(" ")


def random_texts(count: int) -> list[str]:
    rng = random.Random(0)
    return [
        "".join(rng.choice(PIECES) + rng.choice(["", *"    ", "\n"]) for _ in range(rng.randint(0, 14)))
        for _ in range(count)
    ]


def real_texts() -> list[str]:
    lines = (DATA / "chair_captions/less_is_more/r1-llava1.5-7b.jsonl").read_text().splitlines()
    rows = json.loads(gzip.decompress((DATA / "chair_captions/official_outputs/llava15_vcd.json.gz").read_bytes()))
    texts = [json.loads(line)["text"] for line in lines[:100]] + [row["caption"] for row in rows["sentences"][:100]]
    references = json.loads((DATA / "coco_sample/captions_sample.json").read_text())["annotations"]
    return [text.lower() for text in (*texts, *(row["caption"] for row in references))]


def compare_tokens(sentences: Any, texts: list[str]) -> None:
    words = nltk.tokenize.NLTKWordTokenizer()
    fast = FastTokenizer(sentences, words)
    for text in texts:
        assert fast(text) == [token for sentence in sentences.tokenize(text) for token in words.tokenize(sentence)], (
            text
        )


def compare_tags(tagger: Any, tokens: list[str]) -> None:
    fast = FastTagger(tagger.model.weights, tagger.tagdict, tagger.classes)
    tags = [tag for _, tag in tagger.tag(tokens)]
    assert fast.tag(tokens) == tags, tokens
    some = fast.tag(tokens, lambda token: len(token) == 4)
    for found, tag, token in zip(some, tags, tokens, strict=True):
        assert found == tag or (found is None and len(token) != 4), tokens


def test_tokens_with_small_tables() -> None:
    parameters = nltk.tokenize.punkt.PunktParameters()
    parameters.abbrev_types = {"no", "mr", "st", "fig", "sat", "u.s", "e.g", "brown"}
    parameters.collocations = {("dog", "the"), ("##number##", "dog")}
    sentences = nltk.tokenize.punkt.PunktSentenceTokenizer(parameters)
    # Each of these would come out differently if Punkt's tables were not asked.
    assert sentences.tokenize("see the red-brown. dog") == ["see the red-brown. dog"]
    assert sentences.tokenize("a dog. the cat") == ["a dog. the cat"]
    assert sentences.tokenize("a cat. the dog") == ["a cat.", "the dog"]
    compare_tokens(sentences, ["see the red-brown. dog", "a dog. the cat", "a cat. the dog", *random_texts(3000)])


@needs_data("nltk_data")
def test_tokens_are_those_of_the_official_scripts_nltk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dashes without spaces, quotes and broken contractions: what nltk 3.8.1 said, whatever nltk is installed."""
    monkeypatch.setattr(nltk.data, "path", [str(DATA / "nltk_data")])
    tokenize = punkt_tokens()
    for text, tokens in json.loads((Path(__file__).parent / "tokens_of_nltk_3_8_1.json").read_text()):
        assert tokenize(text) == tokens, text


class Counting:
    """Stands for nltk's tokenizers where the fast one must not need them."""

    def __init__(self, inner: Any):
        self.inner, self.calls, self._params = inner, 0, getattr(inner, "_params", None)

    def tokenize(self, text: str) -> list[str]:
        self.calls += 1
        return self.inner.tokenize(text)  # type: ignore[no-any-return]


def test_plain_text_does_not_go_to_nltk() -> None:
    sentences = Counting(nltk.tokenize.punkt.PunktSentenceTokenizer(nltk.tokenize.punkt.PunktParameters()))
    words = Counting(nltk.tokenize.NLTKWordTokenizer())
    fast = FastTokenizer(sentences, words)
    assert fast("a dog, a tee-shirt.\n\ntwo cats?") == ["a", "dog", ",", "a", "tee-shirt", ".", "two", "cats", "?"]
    assert (sentences.calls, words.calls) == (0, 0)
    fast('a "dog". it cannot run.')
    assert sentences.calls == 1 and words.calls == 2


def random_tagger(seed: int) -> Any:
    rng = random.Random(seed)
    tagger = nltk.tag.PerceptronTagger(load=False)
    tagger.classes = {"NN", "NNS", "VB", "JJ", "RB"}
    tagger.model.classes = tagger.classes
    tagger.tagdict = {"the": "RB", ".": "NN"}
    words = [*PIECES, "-START-", "-START2-", "-END-", "-END2-", "!HYPHEN", "!YEAR", "!DIGITS"]
    names = ["bias"]
    for word in words:
        names += [f"i{place} word {word}" for place in ("", "-1", "-2", "+1", "+2")]
        names += [f"i{place} suffix {word[-3:]}" for place in ("", "-1", "+1")] + [f"i pref1 {word[:1]}"]
        names += [f"i-1 tag+i word {tag} {word}" for tag in tagger.classes]
    for tag in (*tagger.classes, "-START-", "-START2-"):
        names += [f"i-1 tag {tag}", f"i-2 tag {tag}"]
        names += [f"i tag+i-2 tag {tag} {other}" for other in (*tagger.classes, "-START-", "-START2-")]
    for name in names:  # Few values, so that ties occur.
        if rng.random() < 0.8:
            tagger.model.weights[name] = {t: rng.choice([-1.0, 0.5, 1.0]) for t in tagger.classes if rng.random() < 0.7}
    return tagger


def test_tags_with_random_weights() -> None:
    rng = random.Random(1)
    words = [word for word in PIECES if word.strip()]
    for seed in range(4):
        tagger = random_tagger(seed)
        for _ in range(100):
            compare_tags(tagger, [rng.choice(words) for _ in range(rng.randint(0, 20))])


@needs_data("nltk_data", "chair_captions", "coco_sample")
def test_real_tables_and_captions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nltk.data, "path", [str(DATA / "nltk_data")])
    sentences, texts = nltk.tokenize.PunktTokenizer("english"), real_texts()
    compare_tokens(sentences, [*texts, *random_texts(2000)])
    tagger, tokenize = nltk.tag.PerceptronTagger(), FastTokenizer(sentences, nltk.tokenize.NLTKWordTokenizer())
    compare_tags(tagger, [token for text in texts[::4] for token in tokenize(text)])
