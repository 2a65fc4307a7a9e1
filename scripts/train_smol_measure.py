"""Measures the unpatched ``smol`` for its model card.

    python scripts/train_smol_measure.py --split heldout --num-images 200

Beside the figures of ``testbed_measure.py``: captions of three lengths, questions beyond existence (with the image and
with a blank one), repeated sentences, and ordinary chat. Prints one JSON object. 100 scenes take about five minutes on
one core.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from testbed_measure import Reader, measure, reader_of

from vlmfix.evals.benchmarks.chair.figures import score_captions
from vlmfix.evals.benchmarks.coco_objects import ChairMatcher, ground_truth
from vlmfix.evals.data.coco import CocoData
from vlmfix.evals.testbed import SPLITS, prepare
from vlmfix.evals.testbed.scenes import IMAGE_SIZE, RenderedScene, image_id, make_scene
from vlmfix.evals.testbed.smol.captions import INSTRUCTIONS
from vlmfix.evals.testbed.smol.facts import things
from vlmfix.evals.testbed.smol.questions import Question, other_questions

CHATS = (
    "What is the capital of Italy?",
    "Why do birds sing?",
    "Write a sentence about a lighthouse.",
    "Is ice cold?",
    "Name three animals that live in the sea.",
    "How do I make tea?",
)
"""Texts without an image; none of them is in the training."""

_MAX_NEW_TOKENS = 192


def captions_by_length(reader: Reader, folder: Path, scenes: Sequence[RenderedScene]) -> dict[str, Any]:
    """CHAIR, words and repetition of the captions that each first instruction of a length gets."""
    coco, matcher = CocoData.load(folder), ChairMatcher()
    truth = ground_truth(coco, list(coco.image_ids), matcher)
    pictures = [Image.fromarray(scene.pixels) for scene in scenes]
    found: dict[str, Any] = {}
    for length, instructions in INSTRUCTIONS.items():
        texts = reader.captions(pictures, instructions[0], _MAX_NEW_TOKENS)
        table = score_captions(dict(zip([scene.image_id for scene in scenes], texts, strict=True)), truth, matcher)
        found[length] = {
            "instruction": instructions[0],
            "words": round(sum(len(text.split()) for text in texts) / len(texts), 1),
            "chair": {name: round(100 * value, 1) for name, value in table.summary().items() if "length" not in name},
            "invented_per_caption": round(float(table.hallucinated.sum()) / len(texts), 2),
            "repeats_a_sentence": sum(_repeats(text) for text in texts),
            "begin_alike": Counter(" ".join(text.split()[:4]) for text in texts).most_common(1)[0][1],
            "unfinished": sum(not text.rstrip().endswith(".") for text in texts),
            "texts": texts,
        }
    return found


def _repeats(text: str) -> bool:
    sentences = [sentence.strip() for sentence in text.split(".") if sentence.strip()]
    return len(set(sentences)) < len(sentences)


def beyond_existence(reader: Reader, scenes: Sequence[RenderedScene]) -> dict[str, Any]:
    """Accuracy by kind of question: with the image, with a blank one, and of the most frequent answer of the kind."""
    asked: list[tuple[RenderedScene, Question]] = []
    for scene in scenes:
        rng = random.Random(f"questions {scene.image_id}")
        asked += [(scene, question) for question in other_questions(scene.kind, things(scene), rng, 5)]
    texts = [question.text for _, question in asked]
    blank = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), (127, 127, 127))
    seen, _ = reader.answers([Image.fromarray(scene.pixels) for scene, _ in asked], texts)
    unseen, _ = reader.answers([blank] * len(asked), texts)
    rows: dict[str, list[tuple[str, str, str]]] = defaultdict(list)
    for (_, question), answer, guess in zip(asked, seen, unseen, strict=True):
        rows[question.kind].append((question.answer, answer, guess))
    found = {}
    for kind, answers in rows.items():
        frequent = Counter(truth for truth, _, _ in answers).most_common(1)[0][1]
        found[kind] = {
            "n": len(answers),
            "accuracy": round(100 * sum(_is_right(truth, answer) for truth, answer, _ in answers) / len(answers), 1),
            "blank": round(100 * sum(_is_right(truth, guess) for truth, _, guess in answers) / len(answers), 1),
            "most_frequent_answer": round(100 * frequent / len(answers), 1),
        }
    return found


def _is_right(truth: str, first_word: str) -> bool:
    """Whether an answer begins rightly; of a long word only the first piece is read."""
    return len(first_word) > 0 and truth.startswith(first_word)


@torch.inference_mode()
def chat(reader: Reader) -> dict[str, str]:
    """Greedy replies to texts without an image."""
    replies = {}
    for text in CHATS:
        messages = [{"role": "user", "content": text}]
        prompt = reader.processor.apply_chat_template(messages, add_generation_prompt=True)
        inputs = reader.processor.tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
        output = reader.model.generate(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], do_sample=False, max_new_tokens=60
        )
        fresh = output[0, inputs["input_ids"].shape[1] :]
        replies[text] = reader.processor.decode(fresh, skip_special_tokens=True)
    return replies


def main() -> None:
    """Measure one split."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--split", choices=SPLITS, default="heldout")
    parser.add_argument("--num-images", type=int, default=200)
    parser.add_argument("--model", default="smol", help="name or folder (default: smol)")
    parser.add_argument("--brief", action="store_true", help="captions, other questions and chat only")
    parser.add_argument("--out", type=Path, help="write the JSON object here as well")
    args = parser.parse_args()
    reader, folder = reader_of(args.model), prepare(args.split, args.num_images)
    scenes = [make_scene(image_id(args.split, index)) for index in range(args.num_images)]
    figures: dict[str, Any] = {} if args.brief else measure(reader, folder)
    figures["captions_by_length"] = captions_by_length(reader, folder, scenes)
    figures["beyond_existence"] = beyond_existence(reader, scenes)
    figures["chat"] = chat(reader)
    text = json.dumps({"split": args.split, **figures}, indent=1, ensure_ascii=False)
    if args.out:
        args.out.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
