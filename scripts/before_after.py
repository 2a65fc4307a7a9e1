#!/usr/bin/env python
"""Draw one picture with its caption before and after a patch, invented objects marked: README's first picture.

    python scripts/before_after.py --model smol --method verify --scene 26 --out evals/testbed/before_after.png

A scene of a held-out split is drawn, not a photograph. Objects are found by CHAIR's vocabulary and held against what
the scene was made of.
"""

from __future__ import annotations

import argparse
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path

from matplotlib.font_manager import findfont
from PIL import Image, ImageDraw, ImageFont

import vlmfix
from vlmfix.evals import testbed
from vlmfix.evals.benchmarks.coco_objects import ChairMatcher, MarkedText, mark_objects
from vlmfix.evals.testbed.scenes import Split, image_id, make_scene
from vlmfix.observe.prompts import PromptBuilder, encode

SIZE, MARGIN, WIDTH, LINE = 300, 24, 1000, 30
INK, PAPER = "#222222", "#ffffff"
COLOURS = {"invented": "#c62828", "present": "#2e7d32", "": INK}


def captions(
    model_name: str, split: Split, scene: int, method: str, prompt: str
) -> tuple[Image.Image, list[MarkedText]]:
    """The picture, and what the stock and the patched model say of it, with their objects marked."""
    shown, matcher = make_scene(image_id(split, scene)), ChairMatcher("original")
    image, objects = Image.fromarray(shown.pixels), {matcher.node(name) for name in shown.counts()}
    model, processor = testbed.load(model_name)
    inputs = encode(processor, [PromptBuilder(processor)(prompt)], [image], model)
    said, start = [], inputs["input_ids"].shape[1]
    for name in ("none", method):
        vlmfix.patch(model, name)
        ids = model.generate(**inputs, max_new_tokens=160, do_sample=False)[0, start:]
        answer = processor.tokenizer.decode(ids, skip_special_tokens=True).strip()
        said.append(mark_objects(matcher, objects, answer))
    return image, said


def draw(image: Image.Image, titles: Sequence[str], texts: Sequence[MarkedText]) -> Image.Image:
    """The picture, and the texts beside it; objects that are there in green, invented ones in red and underlined."""
    plain, bold = (ImageFont.truetype(findfont(f"DejaVu Sans:{weight}"), 19) for weight in ("regular", "bold"))
    page = Image.new("RGB", (WIDTH, SIZE + 2 * MARGIN), PAPER)
    page.paste(image.resize((SIZE, SIZE), Image.Resampling.LANCZOS), (MARGIN, MARGIN))
    pen, left, y = ImageDraw.Draw(page), SIZE + 2 * MARGIN, MARGIN
    for title, text in zip(titles, texts, strict=True):
        pen.text((left, y), title, font=bold, fill=INK)
        x, y = left, y + LINE
        for part in text.parts:
            for piece in re.findall(r" *[^ ]+| +", part.text):  # a word with the blanks before it
                blank, word = " " * (len(piece) - len(piece.lstrip())), piece.lstrip()
                space, width = (pen.textlength(each, font=plain) for each in (blank, word))
                if x + space + width > WIDTH - MARGIN:
                    x, y, space = left, y + LINE, 0
                pen.text((x + space, y), word, font=plain, fill=COLOURS[part.kind])
                if part.kind == "invented":
                    pen.line(
                        (x + space, y + LINE - 6, x + space + width, y + LINE - 6), fill=COLOURS[part.kind], width=2
                    )
                x += space + width
        y += 2 * LINE
    return page


def main() -> None:
    """Draw the picture, and print the texts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smol", choices=testbed.MODELS)
    parser.add_argument("--split", default="heldout", choices=testbed.SPLITS)
    parser.add_argument("--scene", type=int, default=26, help="from 0")
    parser.add_argument("--method", default="verify", help="name, or a recipe file")
    parser.add_argument("--prompt", default="Describe the image.")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    image, texts = captions(options.model, options.split, options.scene, options.method, options.prompt)
    draw(image, (f"{options.model}", f'vlmfix.patch(model, "{options.method}")'), texts).save(options.out)
    for text in texts:
        print(
            textwrap.fill("".join(part.text for part in text.parts), 100), f"\n  invented: {', '.join(text.invented)}"
        )


if __name__ == "__main__":
    main()
