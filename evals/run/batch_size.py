"""How many samples a batch has: as typed, the evaluation's own choice, or as many as the free memory takes."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch

from vlmfix.observe.prompts import PromptBuilder, encode

from ..data.coco import load_image
from ..data.samples import Sample
from ..testbed import OF_SMOL
from .models import ModelSource

AUTO = "auto"

OF_TESTBED = {"testbed": 64} | dict.fromkeys(OF_SMOL, 32)
"""Samples per batch of the embedded models, by the name of their source."""

LARGEST = 256
"""More rows make no step faster, and an interrupted batch is generated again as a whole."""

SHARE = 0.6
"""Of the memory that weights leave free. The rest is for kernels, second branches and fragments."""


def choose_batch_size(
    wanted: int | str | None, source: ModelSource, samples: Iterable[Sample], *, dtype: str, device: str, template: bool
) -> int:
    """Return the number of samples per batch.

    Args:
        wanted: As typed; None is :data:`OF_TESTBED` for the embedded models, which are small, and 8 for others.
        source: The model.
        samples: What will be asked.
        dtype: Of the weights.
        device: Of the model.
        template: Whether prompts are wrapped in the chat template.
    """
    if isinstance(wanted, int):
        return wanted
    if wanted is None:
        return OF_TESTBED.get(source.name, 8)
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(copy.deepcopy(source.config))
    width = getattr(torch, dtype).itemsize
    weights = width * sum(parameter.numel() for parameter in model.parameters())
    tokens = longest(source.processor, samples, template=template)
    room = SHARE * max(free_memory(device) - weights, 0)
    return max(1, min(LARGEST, int(room / (width * values_per_token(source.config) * tokens))))


def longest(processor: Any, samples: Iterable[Sample], *, template: bool) -> int:
    """Return how many tokens the longest prompt has with its answer, if every image takes as many as the first one."""
    build = PromptBuilder(processor, use_template=template)
    image_tokens: int | None = None
    most = 0
    for sample in {(s.question, s.path is not None, s.max_new_tokens): s for s in samples}.values():
        prompt = build(sample.question, image=sample.path is not None)
        text = len(processor.tokenizer(prompt)["input_ids"])
        if sample.path is not None and image_tokens is None:
            image_tokens = encode(processor, [prompt], [load_image(sample.path)])["input_ids"].shape[1] - text
        most = max(most, text + sample.max_new_tokens)
    return most + (image_tokens or 0)


def values_per_token(config: Any) -> int:
    """Return how many values a token takes: its keys and values in all layers, and what one layer makes of it."""
    text = config.get_text_config(decoder=True)
    heads = text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    kept = 2 * text.num_hidden_layers * (getattr(text, "num_key_value_heads", None) or heads) * head_dim
    return int(kept + 8 * text.hidden_size + 4 * getattr(text, "intermediate_size", 4 * text.hidden_size))


def free_memory(device: str) -> int:
    """Return how many bytes are free where the model will lie."""
    if torch.cuda.is_available() and device != "cpu":
        devices = range(torch.cuda.device_count()) if device == "auto" else [torch.device(device).index or 0]
        return sum(torch.cuda.mem_get_info(each)[0] for each in devices)
    import psutil

    return int(psutil.virtual_memory().available)
