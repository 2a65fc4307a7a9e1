"""Measures how well doubt tells invented objects from others: ``python scripts/testbed_doubt.py``.

For every object named in the stock captions of a split: what the word rests on (``vlmfix.probes.evidence``), the answer
to the question for it, and its doubt; then the area under the ROC curve of each of them, and precision and recall of
flags. ``DOUBT_THRESHOLD`` is the one with the best F1 on the calibration split.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from vlmfix.evals.benchmarks.chair.task import PROMPT as CHAIR_PROMPT
from vlmfix.evals.benchmarks.coco_objects import ChairMatcher
from vlmfix.evals.inspect.case import Case
from vlmfix.evals.inspect.look import context_of, word_of, word_spans
from vlmfix.evals.run.models import find_model, fitting_threads, load_model
from vlmfix.evals.stats.figures import auc
from vlmfix.evals.testbed import SPLITS
from vlmfix.evals.testbed.scenes import image_id, make_scene
from vlmfix.evals.testbed.vocabulary import SCENES
from vlmfix.observe.prompts import PromptBuilder, encode
from vlmfix.observe.words import decode, locate_mentions

MAX_NEW_TOKENS = 64
THRESHOLDS = (0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6)


class Named(NamedTuple):
    """An object that a caption names.

    Attributes:
        scene: Index of the scene.
        name: The object.
        absent: Whether the caption invents it.
        probability: Of the word; so are the next three, under changes (see ``vlmfix.probes.Evidence``).
        without_image: The image left out.
        image_hidden: The image hidden.
        context_hidden: Objects and place named before hidden.
        mass: Attention on the image.
        asked: Probability of yes to the question for it.
        doubt: See ``vlmfix.probes.doubt``.
    """

    scene: int
    name: str
    absent: bool
    probability: float
    without_image: float
    image_hidden: float
    context_hidden: float
    mass: float
    asked: float
    doubt: float


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python scripts/testbed_doubt.py", allow_abbrev=False)
    parser.add_argument("--split", choices=SPLITS[1:], default="heldout", help="default: heldout")
    parser.add_argument("--num-images", type=int, default=400, metavar="N", help="first N scenes (default: 400)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write every object named, as JSON")
    options = parser.parse_args(arguments)
    found = list(measure(options.split, range(options.num_images)))
    if options.out is not None:
        options.out.write_text(json.dumps([each._asdict() for each in found]) + "\n", encoding="utf-8")
    sys.stdout.write(report(found) + "\n")
    return 0


def measure(split: Any, scenes: Sequence[int], batch_size: int = 32) -> Iterator[Named]:
    """Look at every object named in the stock model's captions of some scenes."""
    source = find_model(None)
    model = load_model(source, dtype="float32", device="cpu")
    with fitting_threads(model):
        for start in range(0, len(scenes), batch_size):
            yield from _measure_batch(model, source.processor, split, scenes[start : start + batch_size])


def _measure_batch(model: Any, processor: Any, split: Any, indices: Sequence[int]) -> Iterator[Named]:
    from vlmfix import probes

    matcher, tokenizer = ChairMatcher("original"), processor.tokenizer
    prompts, places = PromptBuilder(processor), {word for scene in SCENES for word in scene.name.split()}
    scenes = [make_scene(image_id(split, index)) for index in indices]
    pictures = [Image.fromarray(scene.pixels) for scene in scenes]
    inputs = encode(processor, [prompts(CHAIR_PROMPT)] * len(scenes), pictures)
    answers = probes.attention_to_image(model, inputs, max_new_tokens=MAX_NEW_TOKENS).tokens
    spans, mentions, context = [], [], []
    for ids in answers:
        text = decode(tokenizer, ids)
        spans.append(word_spans(tokenizer, ids, text))
        mentions.append(locate_mentions(tokenizer, ids, matcher.as_written(text))[0])
        context.append(context_of(spans[-1], mentions[-1], places))
    rests = probes.evidence(model, inputs, answers=answers, context=context)
    for row, scene in enumerate(scenes):
        truth = {matcher.node(name) for name in scene.counts()}
        case = Case(
            model=model,
            processor=processor,
            prompts=prompts,
            picture=pictures[row],
            question=CHAIR_PROMPT,
            objects=None,
            scene_words=frozenset(),
            max_new_tokens=MAX_NEW_TOKENS,
        )
        for mention, asked in zip(mentions[row], case.ask_for([each.name for each in mentions[row]]), strict=True):
            assert asked is not None
            tokens = list(word_of(spans[row], mention.token).tokens)
            p, p0, image, words = (
                float(values[row, tokens].prod())
                for values in (rests.probability, rests.without_image, rests.image_hidden, rests.context_hidden)
            )
            mass, score = float(rests.mass[row, tokens].mean()), probes.doubt(p, p0, asked)
            absent = mention.name not in truth
            yield Named(indices[row], mention.name, absent, p, p0, image, words, mass, asked, score)


def report(found: Sequence[Named]) -> str:
    """Write the tables, in Markdown."""
    absent = [each.absent for each in found]
    signs = {
        "doubt": [each.doubt for each in found],
        "no to the question": [-each.asked for each in found],
        "low probability of the word": [-each.probability for each in found],
        "as probable without the image": [each.without_image / each.probability for each in found],
        "as probable with the image hidden": [each.image_hidden / each.probability for each in found],
        "less probable with the context hidden": [-each.context_hidden / each.probability for each in found],
        "little attention to the image": [-each.mass for each in found],
    }
    lines = [f"{len(found)} objects named, {sum(absent)} of them absent.", "", "| sign | AUC |", "|---|--:|"]
    for name, values in signs.items():
        lines.append(f"| {name} | {100 * auc(values, absent):.1f} |")
    lines += ["", "| flagged from | share flagged | precision | recall | F1 |", "|--:|--:|--:|--:|--:|"]
    for threshold in THRESHOLDS:
        flags = [each.doubt >= threshold for each in found]
        right = sum(flag and each.absent for flag, each in zip(flags, found, strict=True))
        precision, recall = right / max(sum(flags), 1), right / max(sum(absent), 1)
        f1 = 2 * precision * recall / max(precision + recall, 1e-12)
        figures = (sum(flags) / max(len(found), 1), precision, recall, f1)
        lines.append(f"| {threshold:.2f} | " + " | ".join(f"{100 * figure:.1f}" for figure in figures) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
