"""What self-verification costs beside the answers that it verifies: processor time and tokens.

    OMP_NUM_THREADS=1 python scripts/bench_verify.py
    OMP_NUM_THREADS=1 python scripts/bench_verify.py --models tiny --rounds 8

``tiny`` and ``smol`` describe scenes of the calibration split; ``random`` is a LLaVA of 8 layers, width 512 and 576
image tokens that is made to say one caption of about 100 tokens and 12 objects. Stock and verified answers take turns;
the table holds medians over rounds and, in brackets, the quartiles of the ratio within a round.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import numpy as np
import torch
from PIL import Image
from transformers import LogitsProcessorList

import vlmfix
from vlmfix.evals.testbed import RECIPES, load
from vlmfix.evals.testbed.scenes import image_id, make_scene
from vlmfix.observe.ask import GivenAnswer
from vlmfix.observe.prompts import PromptBuilder, encode
from vlmfix.patching import find_patch
from vlmfix.recipes import load_recipe
from vlmfix.verification.ask import Cost

PROMPT = "Please describe this image in detail."
BATCHES = {"tiny": (1, 8), "smol": (1, 8), "random": (1, 4)}
CAPTION = (
    "The image is of a dining table with a pizza, a cup and a bottle on it. There is a person in a chair with a dog. "
    "A cat is on the couch and a bird is on the bed. In the image there is a tv, and a bus is there with the train. "
    "The person and the dog is in the image with the cat, and the bird is on the chair with a cup and a bottle. There "
    "is a horse in the image, and a pizza is on the dining table."
)


def subject(name: str) -> tuple[Any, Any, list[Image.Image], str | None]:
    """Return a model, its processor, pictures, and what it is made to say about each, if anything."""
    if name != "random":
        model, processor = load(name)
        scenes = [make_scene(image_id("calibration", index)) for index in range(max(BATCHES[name]))]
        return model, processor, [Image.fromarray(scene.pixels) for scene in scenes], None
    from families.saved_llava import build_tiny_llava
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    with tempfile.TemporaryDirectory() as folder:
        sizes = {"hidden_size": 512, "layers": 8, "heads": 8, "kv_heads": 8, "image_size": 336, "patch_size": 14}
        build_tiny_llava(Path(folder), **sizes)
        model, processor = LlavaForConditionalGeneration.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (336, 336, 3), dtype=np.uint8))
    return model.eval(), processor, [picture] * max(BATCHES[name]), CAPTION


def seconds(model: Any, inputs: Any, given: list[list[int]] | None) -> tuple[float, torch.Tensor]:
    """Answer, and return the processor time that it took."""
    most = 160 if given is None else max(map(len, given))
    said = LogitsProcessorList([] if given is None else [GivenAnswer(given, 0)])
    start = time.process_time()
    out = model.generate(**inputs, do_sample=False, max_new_tokens=most, logits_processor=said)
    return time.process_time() - start, out


def measure(name: str, rounds: int) -> list[str]:
    """Return the rows of a model."""
    model, processor, pictures, text = subject(name)
    calibrated = [each for each in load_recipe(RECIPES["smol"]) if each.name == "verify" and name == "smol"]
    (method,) = calibrated or [vlmfix.Verify(processor=processor)]
    rows = []
    for batch in BATCHES[name]:
        inputs = encode(processor, [PromptBuilder(processor)(PROMPT)] * batch, pictures[:batch], model).to(model.dtype)
        given = text and [processor.tokenizer(text, add_special_tokens=False)["input_ids"]] * batch
        times: list[tuple[float, float]] = []
        for number in range(rounds + 1):  # the first one warms up
            stock, out = seconds(model, inputs, given)
            with vlmfix.patched(model, method):
                verified, _ = seconds(model, inputs, given)
                cost = cost_of(model)
            if number:
                times.append((stock, verified))
        ratios = [verified / stock for stock, verified in times]
        low, middle, high = np.quantile(ratios, [0.25, 0.5, 0.75])
        answers = out[:, inputs["input_ids"].shape[1] :]
        tokens = int((answers != model.generation_config.pad_token_id).sum())
        prompt = int(inputs["attention_mask"].sum())
        cells = [f"`{name}`", f"{batch}", f"{statistics.median(s for s, _ in times):.2f} s"]
        cells += [f"{middle:.2f} [{low:.2f}, {high:.2f}]", f"{prompt} + {tokens}", f"{cost.questions}"]
        cells += [f"{getattr(cost, f'{part}_tokens')}" for part in ("prefix", "question", "answer", "text")]
        rows.append("| " + " | ".join(cells) + " |")
    return rows


def cost_of(model: Any) -> Cost:
    """Return what a patch with verification alone has asked so far."""
    (bound,) = find_patch(model).methods
    cost: Cost = bound._judge.questioner.cost
    return cost


def main() -> None:
    """Measure as asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(BATCHES), choices=list(BATCHES))
    parser.add_argument("--rounds", type=int, default=4, help="default: 4")
    options = parser.parse_args()
    print("| model | batch | answer | verified | prompt + answer | questions | image | asked | read again | no image |")
    print("|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|")
    for name in options.models:
        print("\n".join(measure(name, options.rounds)), flush=True)


if __name__ == "__main__":
    main()
