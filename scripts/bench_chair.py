"""Time CHAIR on 500 long captions in both modes: python scripts/bench_chair.py [--captions FILE].

Without a file the captions are drawn from made-up sentences (220 words each). ``nltk`` needs the data that
``python -m nltk.downloader punkt_tab averaged_perceptron_tagger_eng`` fetches, or NLTK_DATA.
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path

from vlmfix.errors import VlmfixError
from vlmfix.evals.benchmarks.chair.figures import score_captions
from vlmfix.evals.benchmarks.chair.task import read_captions
from vlmfix.evals.benchmarks.coco_objects import ChairMatcher, ChairMode, objects_by_word
from vlmfix.evals.data.answers import AnswerFile

SENTENCES = (
    "The image features a {} standing next to a {}, and several other people are walking nearby.",
    "In the background there is a {}, placed on top of a wooden {} in the middle of the room.",
    "Two {}s can be seen on the left side, while a man is sitting on the {} and looking at them.",
    "There's also a {}, which isn't far from the {}; it adds to the lively atmosphere of the scene.",
)


def made_up(count: int = 500, words: int = 220, seed: int = 0) -> dict[int, str]:
    """Captions of at least ``words`` words, image id -> caption."""
    rng, names = random.Random(seed), sorted(set(objects_by_word()))
    captions = {}
    for image_id in range(count):
        parts: list[str] = []
        while sum(len(part.split()) for part in parts) < words:
            parts.append(rng.choice(SENTENCES).format(rng.choice(names), rng.choice(names)))
        captions[image_id] = " ".join(parts)
    return captions


def main() -> None:
    """Print one line per mode."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--captions", type=Path, metavar="FILE", help="captions of your own")
    options = parser.parse_args()
    captions = (
        made_up()
        if options.captions is None
        else {i: given.text for i, given in read_captions(AnswerFile(options.captions)).items()}
    )
    mean = sum(len(text.split()) for text in captions.values()) / len(captions)
    print(f"{len(captions)} captions, {mean:.0f} words on average, one thread")
    modes: tuple[ChairMode, ...] = ("original", "nltk")
    for mode in modes:
        start = time.perf_counter()
        try:
            matcher = ChairMatcher(mode)
        except VlmfixError as error:
            print(f"{mode}: {error}")
            continue
        loaded = time.perf_counter()
        score_captions(captions, {image_id: frozenset() for image_id in captions}, matcher)
        print(f"{mode}: tables {loaded - start:.2f} s, scoring {time.perf_counter() - loaded:.2f} s")


if __name__ == "__main__":
    main()
