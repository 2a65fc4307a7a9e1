"""What the tests of clients share: a picture, a question, and what the model answers when ``generate`` is called."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

QUESTION = "describe the image in detail"

PROGRAM = """
import sys
import client_runs
from transformers import AutoModelForImageTextToText
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1])
print(client_runs.answer(model, sys.argv[1], client_runs.picture(0)))
"""
"""A program that knows nothing of vlmfix."""


def picture(number: int) -> Image.Image:
    """A small picture, another one for every number."""
    generator = torch.Generator().manual_seed(number)
    pixels = torch.randint(0, 256, (4, 4, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy()).resize((32, 32))


def stock(folder: Path) -> Any:
    """The model in a folder."""
    return LlavaForConditionalGeneration.from_pretrained(folder)


def inputs(folder: Path | str, *images: Image.Image, question: str = QUESTION) -> Any:
    """What the processor makes of pictures and a question."""
    content = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": question}]
    return AutoProcessor.from_pretrained(folder).apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )


def answer(model: Any, folder: Path | str, *images: Image.Image, question: str = QUESTION, **options: Any) -> str:
    """What a model says about pictures."""
    asked = inputs(folder, *images, question=question)
    ids = model.generate(**asked, **{"max_new_tokens": 8, "do_sample": False, **options})
    processor = AutoProcessor.from_pretrained(folder)
    return str(processor.batch_decode(ids[:, asked["input_ids"].shape[1] :], skip_special_tokens=True)[0])
