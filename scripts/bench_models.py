"""Models of ``scripts/bench.py``: published shapes with random weights, and prompts for them."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

SINK_DIM = 7
BEFORE_IMAGE = 4
"""Text tokens before the image; the others come behind it, where VAR has rows to edit."""
TILE = 576
"""Image tokens of one picture of LLaVA; 2880 are five tiles, as in LLaVA-NeXT."""


@dataclass(frozen=True)
class Shape:
    """A language model's shape; vision towers are kept small, they are the same with and without a patch."""

    family: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    tile: int = TILE


SHAPES = {
    "tiny": Shape("llava", 64, 96, 3, 4, 2, 512, tile=16),
    "163m": Shape("llava", 1024, 2816, 12, 16, 16, 8192),
    "163m-2-layers": Shape("llava", 1024, 2816, 2, 16, 16, 8192),
    "llava-1.5-7b": Shape("llava", 4096, 11008, 32, 32, 32, 32064),
    "qwen2.5-vl-7b": Shape("qwen", 3584, 18944, 28, 28, 4, 152064),
    "tiny-qwen": Shape("qwen", 64, 96, 3, 4, 2, 512),
}
IMAGE_ID, VISION_START, VISION_END, FIRST_WORD = 3, 4, 5, 16


def build(name: str, device: str, dtype: torch.dtype) -> PreTrainedModel:
    """Build a model with random weights and one synthetic sink.

    VAR needs sinks to have anything to do; the first image token of every prompt gets a huge value in one dimension.
    """
    shape = SHAPES[name]
    before = torch.get_default_dtype()
    torch.manual_seed(0)
    try:
        torch.set_default_dtype(dtype)
        with torch.device(device):
            model: PreTrainedModel = (_llava if shape.family == "llava" else _qwen)(shape)
    finally:
        torch.set_default_dtype(before)
    model.eval().requires_grad_(False)
    assert model.generation_config is not None
    model.generation_config.eos_token_id = None  # every answer has the same length
    model.generation_config.pad_token_id = 0
    model.model.language_model.register_forward_pre_hook(_plant_sink, with_kwargs=True)
    return model


def _llava(shape: Shape) -> PreTrainedModel:
    text = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=8192,
    )
    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=14 * round(shape.tile**0.5),
        patch_size=14,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE_ID,
        image_seq_length=shape.tile,
        vision_feature_layer=-1,
    )
    return LlavaForConditionalGeneration(config)


def _qwen(shape: Shape) -> PreTrainedModel:
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": shape.vocab,
            "hidden_size": shape.hidden,
            "intermediate_size": shape.intermediate,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.kv_heads,
            "max_position_embeddings": 8192,
            "rope_scaling": {"type": "mrope", "mrope_section": _mrope(shape.hidden // shape.heads)},
        },
        vision_config={
            "depth": 2,
            "hidden_size": 64,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": shape.hidden,
            "fullatt_block_indexes": [1],
        },
        image_token_id=IMAGE_ID,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
    )
    return Qwen2_5_VLForConditionalGeneration(config)


def _mrope(head_dim: int) -> list[int]:
    """Split half of a head between time, height and width, as in Qwen2.5-VL (16, 24, 24 of 64)."""
    side = 3 * head_dim // 16
    return [head_dim // 2 - 2 * side, side, side]


def _plant_sink(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    embeds = kwargs["inputs_embeds"]
    if embeds.shape[1] > BEFORE_IMAGE + 2:
        embeds = embeds.clone()
        embeds[:, BEFORE_IMAGE + 1, SINK_DIM] = 100 * embeds.abs().amax()
        kwargs = {**kwargs, "inputs_embeds": embeds}
    return args, kwargs


def clone(model: PreTrainedModel) -> PreTrainedModel:
    """Copy a model's modules, not its weights: a variant can stay patched (and compiled) beside the others."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def make_inputs(model: PreTrainedModel, image_tokens: int, text_tokens: int, batch: int) -> dict[str, torch.Tensor]:
    """Return one picture (or several tiles) between a few tokens and the rest of the text, for every sample."""
    generator = torch.Generator().manual_seed(0)
    vocab = model.config.get_text_config().vocab_size
    text = torch.randint(FIRST_WORD, vocab, (batch, text_tokens), generator=generator)
    image = torch.full((batch, image_tokens), IMAGE_ID)
    is_qwen = model.config.model_type.startswith("qwen")
    if is_qwen:
        text[:, BEFORE_IMAGE - 1], text[:, BEFORE_IMAGE] = VISION_START, VISION_END
    ids = torch.cat([text[:, :BEFORE_IMAGE], image, text[:, BEFORE_IMAGE:]], dim=1)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if is_qwen:
        height, width = _grid(image_tokens)
        inputs["image_grid_thw"] = torch.tensor([[1, 2 * height, 2 * width]] * batch)
        inputs["pixel_values"] = torch.randn(4 * image_tokens * batch, 1176, generator=generator).to(model.dtype)
        inputs["mm_token_type_ids"] = (ids == IMAGE_ID).int()
    else:
        tiles, rest = divmod(image_tokens, model.config.image_seq_length)
        if rest or not tiles:
            raise SystemExit(
                f"--image-tokens must be multiples of {model.config.image_seq_length}; got {image_tokens}."
            )
        size = model.config.vision_config.image_size
        inputs["pixel_values"] = torch.randn(tiles * batch, 3, size, size, generator=generator).to(model.dtype)
    return {name: value.to(model.device) for name, value in inputs.items()}


def _grid(tokens: int) -> tuple[int, int]:
    """Return the most square grid of so many tokens."""
    height = next(side for side in range(int(tokens**0.5), 0, -1) if tokens % side == 0)
    return height, tokens // height
