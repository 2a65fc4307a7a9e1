"""Faults of grammar in captions, found by rules: what leaving words out could break.

    python scripts/grammar.py --captions RUN/answers.jsonl     # per method of a run of vlmfix eval
    python scripts/grammar.py --training 500                   # the embedded models' training captions: there is none

The rules were written before any answer was counted. They do not parse: they know what an edit may leave behind.

* *unfinished*: a sentence or a clause ends in a word that asks for another ("with.", "a and", "includes.").
* *doubled*: two articles, conjunctions or marks in a row ("and and", ", .", two spaces, a space before a mark).
* *opening*: a sentence begins with a small letter, a mark or "and".
* *end*: a caption ends without a full stop.
* *article*: "a" before a vowel, "an" before a consonant.
* *number*: subject and verb disagree ("A dog are", "There are a dog", "A dog and a cat is").
* *reference*: "the dog", or "they" in the first sentence, where nothing before has named one.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from vlmfix.evals.testbed.captions import detailed_caption
from vlmfix.evals.testbed.scenes import image_id, make_scene
from vlmfix.evals.testbed.smol.captions import caption as smol_caption
from vlmfix.evals.testbed.smol.facts import things
from vlmfix.verification import lexicon
from vlmfix.verification.leave_out import leave_out
from vlmfix.verification.phrases import NounPhrase, Sentence, read_sentences

_ARTICLES = frozenset(("a", "an", "the"))
_CONJUNCTIONS = frozenset(("and", "or", "but"))
_NEEDS_MORE = (
    _ARTICLES
    | _CONJUNCTIONS
    | lexicon.BE
    | frozenset(
        "with of from at into for to next containing including includes include shows show contains contain features "
        "feature depicts depict captures presents reveals has have its their his her this some several".split()
    )
)
"""Words behind which a clause cannot end. "Close by," and "is turned on." can, so that these are not here."""

_VOWEL_SOUND = re.compile(r"(?!u(?:ni|se|s[aeiu]|tensil)|one\b|eu)[aeiou]|hour|honest", re.IGNORECASE)
_POINTS_BACK = frozenset("they them their these those he she his her".split())
_DEFINITE = frozenset(("the", "this", "that", "these", "those"))


def faults(text: str) -> list[str]:
    """Return the names of the rules that a caption breaks, once for each place."""
    if not text:
        return []  # nothing is said, and nothing wrong
    found = ["doubled" for _ in re.finditer(r"\S {2,}\S|\s[,.;:!?]|[,;:]\s*[,.;:!?]|[.!?]\s+[,.;:!?]|\.\.(?!\.)", text)]
    found += [] if re.search(r"[.!?][\"')]*$", text.rstrip()) else ["end"]
    named: set[str] = set()
    for number, sentence in enumerate(read_sentences(text)):
        words = [token.word for token in sentence.tokens]
        opening = text[sentence.start]
        if not (opening.isupper() or opening.isdigit()) or (words and words[0] in _CONJUNCTIONS):
            found.append("opening")
        found += _pairs(words)
        found += ["number" for _ in _disagreements(sentence, words)]
        found += ["reference" for word in words[:1] if number == 0 and word in _POINTS_BACK]
        for phrase in sentence.phrases:
            # Whatever follows "this" or "the" must have been named; a part of a picture or a place need not.
            points_back = words[phrase.first] in _DEFINITE and not phrase.measure
            head = phrase.name.split()[-1]
            found += ["reference"] if phrase.is_object and points_back and head not in named else []
            named.add(head)
    return found


def _pairs(words: Sequence[str]) -> Iterator[str]:
    """Find what is wrong between neighbouring words."""
    has_verb = False
    for at, (word, following) in enumerate(zip(words, [*words[1:], "."], strict=True)):
        ends = not following[0].isalnum() and following not in "\"'("
        adverb_ends = following in lexicon.ADVERBS and words[at + 2 : at + 3] in ([], ["."])
        if (word in _ARTICLES and following in _ARTICLES) or (word == following and word in _NEEDS_MORE):
            yield "doubled"
        elif word in _NEEDS_MORE and (ends or following in _CONJUNCTIONS):
            yield "unfinished"
        elif word in _CONJUNCTIONS and (adverb_ends or (_is_verb(following) and not has_verb)):
            yield "unfinished"  # "a cat and nearby.", "a cup and can be seen"
        elif word in ("where", "since", "because", "while") and _is_verb(following):
            yield "unfinished"
        elif word in lexicon.BE and words[max(at - 1, 0)] == "there" and following in lexicon.PREPOSITIONS | {"as"}:
            yield "unfinished"  # "There is in the middle."
        elif word in ("a", "an") and (word == "an") != bool(_VOWEL_SOUND.match(following)):
            yield "article"
        has_verb = has_verb or _is_verb(word)


def _is_verb(word: str) -> bool:
    """Whether a word is a verb in a form that a clause can do with."""
    return word in lexicon.AUXILIARIES or (lexicon.is_plural(word) and lexicon.verb_of(word) is not None)


def _disagreements(sentence: Sentence, words: Sequence[str]) -> Iterator[int]:
    """Find verbs whose number is not that of what is named before them, or behind "there is"."""
    for phrases in _lists(sentence, words):
        first, last = phrases[0], phrases[-1]
        is_plural = len(phrases) > 1 or first.is_plural
        if len(phrases) == 1 and first.name.split()[-1] in lexicon.ONE_FORM and words[first.first] in _DEFINITE:
            continue  # "the sheep" may be one or two
        at = last.last + 1
        while at < len(words) and lexicon.is_adverb(words[at]):
            at += 1
        number = _number(words[at]) if first.first == 0 and at < len(words) and not first.measure else None
        if first.first == 0 and last.last > last.name_first and words[last.last] in lexicon.VERBS:
            if not first.measure and not any(map(_is_verb, words[at:])):
                number = True  # "A dog sit near", where the verb passes for a noun
        if number is not None and number != is_plural:
            yield at
        before = _number(words[first.first - 1]) if first.first > 1 and words[first.first - 1] in lexicon.BE else None
        names_first = not any(phrase.last < first.first for phrase in sentence.phrases if phrase.first == 0)
        if before is not None and (words[first.first - 2] == "there" or names_first) and before != first.is_plural:
            yield first.first - 1


def _lists(sentence: Sentence, words: Sequence[str]) -> list[list[NounPhrase]]:
    """Group phrases that stand in one list: "a car, a bus and a dog"."""
    groups: list[list[NounPhrase]] = []
    for phrase in sentence.phrases:
        if groups and "".join(words[groups[-1][-1].last + 1 : phrase.first]) in ("and", ",", ",and"):
            groups[-1].append(phrase)
        else:
            groups.append([phrase])
    return groups


def _number(verb: str) -> bool | None:
    """Return whether a verb's form is the plural's; None for what has one form or is no verb that is known."""
    if verb in ("is", "are", "was", "were", "has", "have"):
        return verb in ("are", "were", "have")
    base = lexicon.verb_of(verb)
    return None if base is None else verb == base


def training_captions(count: int) -> Iterator[str]:
    """Yield the captions of both embedded models about scenes of their training split, long and short."""
    for index in range(count):
        scene, rng = make_scene(image_id("train", index)), random.Random(index)
        yield detailed_caption(scene.kind, scene.counts(), rng)
        yield smol_caption(scene.kind, things(scene), "medium", rng)
        yield smol_caption(scene.kind, things(scene), "long", rng)


def cut(text: str, rng: random.Random) -> str:
    """Return a caption that lacks the words of one noun phrase, with nothing done about the rest."""
    phrases = [(s, phrase) for s in read_sentences(text) for phrase in s.phrases if phrase.is_object]
    sentence, phrase = rng.choice(phrases)
    left = text[: sentence.tokens[phrase.first].start] + text[sentence.tokens[phrase.last].end :]
    return re.sub(r" ([,.])", r"\1", re.sub(" +", " ", left)).strip()  # white space alone gives nothing away


def left_out(text: str, rng: random.Random) -> str:
    """Return a caption as verification edits it when it doubts one to three of its objects, whichever they are."""
    names = sorted({phrase.name for s in read_sentences(text) for phrase in s.phrases if phrase.is_object})
    doubted = rng.sample(names, min(rng.randint(1, 3), len(names)))
    return leave_out(text, lambda phrase: phrase.name in doubted)


def share(captions: Iterable[str], of: Callable[[str], Sequence[str]] = faults) -> tuple[int, int, Counter[str]]:
    """Return how many captions there are, how many have a fault, and the faults."""
    each = [of(text) for text in captions]
    return len(each), sum(map(bool, each)), Counter(fault for found in each for fault in found)


def row_of(name: str, captions: Iterable[str]) -> str:
    """Return a row of the table."""
    count, broken, kinds = share(captions)
    listed = ", ".join(f"{kind} {number}" for kind, number in kinds.most_common()) or "none"
    return f"| {name} | {count} | {broken} | {listed} |"


def captions_of(answers: Path) -> dict[str, list[str]]:
    """Return the captions in a run's ``answers.jsonl``, by method."""
    found: dict[str, list[str]] = defaultdict(list)
    for line in answers.read_text(encoding="utf-8").splitlines():
        answer = json.loads(line)
        if answer["benchmark"] == "chair":
            found[answer["method"]].append(answer["text"])
    return found


def main() -> None:
    """Count as asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--captions", nargs="+", type=Path, default=[], metavar="FILE", help="answers.jsonl of runs")
    parser.add_argument(
        "--training", type=int, default=0, metavar="SCENES", help="check captions of the training split"
    )
    options = parser.parse_args()
    print("| captions | n | with a fault | faults |\n|---|--:|--:|---|")
    if options.training:
        written, rng = list(training_captions(options.training)), random.Random(0)
        print(row_of("training", written))
        print(row_of("the same, one noun phrase cut out", [cut(text, rng) for text in written]))
        print(row_of("the same, objects left out by verification", [left_out(text, rng) for text in written]))
    for path in options.captions:
        for method, captions in captions_of(path).items():
            print(row_of(f"{path.parent.name} `{method}`", captions))


if __name__ == "__main__":
    main()
