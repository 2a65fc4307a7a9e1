"""Families whose images reach the language model past the prompt: BLIP-2, cross-attention."""

from __future__ import annotations

from functools import partial

import torch

from families.base import (
    EOS,
    IMAGE,
    PAD,
    PICTURE,
    TAG,
    VIDEO,
    VOCAB_SIZE,
    Pictures,
    decoder_start,
    family,
    nested,
    parts,
    rope,
    stacked,
    text,
    variant,
    vision,
    without,
    words,
)

QUERIES = 6


# BLIP-2 and InstructBLIP: generate() hands embeddings to the language model, past the model's own forward.


QFORMER = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "encoder_hidden_size": 16,
    "max_position_embeddings": 64,
}
OPT = without(text("opt", ffn_dim=64, word_embed_proj_dim=32), "num_key_value_heads", "intermediate_size")
T5 = {
    "model_type": "t5",
    "vocab_size": VOCAB_SIZE,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 3,
    "num_decoder_layers": 3,
    "num_heads": 4,
    "decoder_start_token_id": PAD,
    "pad_token_id": PAD,
    "eos_token_id": EOS,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
}
_blip = partial(parts, vision=vision(), qformer_config=QFORMER, num_query_tokens=QUERIES)

BLIP = {
    "block": (IMAGE,) * QUERIES,
    "picture": PICTURE,
    "encode": stacked(),
    "max_images": 1,
    "text_only": False,
    "image_first": True,
    "text_positions": False,
}


blip2_opt = family(
    "blip2_opt",
    "Blip2ForConditionalGeneration",
    title="blip2 (opt)",
    **BLIP,
    notes="generate() passes the model's forward by; 4 key heads",
    config=_blip("Blip2Config", OPT, image_token_index=IMAGE),
)

blip2_t5 = variant(
    blip2_opt,
    "blip2_t5",
    "blip2 (t5)",
    config=_blip("Blip2Config", T5, image_token_index=IMAGE),
    annotate=decoder_start(PAD, 20),
    attention=6,
    side="right",
    notes="encoder-decoder: the image is in the encoder; position biases; generate() passes the model's forward by",
)


def _qformer_ids(ids: torch.Tensor, mask: torch.Tensor, pictures: Pictures) -> dict[str, torch.Tensor]:
    """The instruction as the Q-Former reads it: the same for every prompt."""
    instruction = torch.tensor([words(5, 77)] * len(ids))
    return {"qformer_input_ids": instruction, "qformer_attention_mask": torch.ones_like(instruction)}


instructblip = family(
    "instructblip",
    "InstructBlipForConditionalGeneration",
    title="instructblip (llama)",
    **BLIP,
    annotate=_qformer_ids,
    notes="generate() passes the model's forward by",
    config=_blip("InstructBlipConfig", text(), image_token_index=IMAGE),
)

instructblipvideo = family(
    "instructblipvideo",
    "InstructBlipVideoForConditionalGeneration",
    title="instructblipvideo (llama)",
    **{**BLIP, "block": (VIDEO,) * (2 * QUERIES), "picture": (2, *PICTURE)},
    annotate=_qformer_ids,
    visual_ids=(VIDEO,),
    notes="videos of two frames; generate() passes the model's forward by",
    config=_blip("InstructBlipVideoConfig", text(), video_token_index=VIDEO),
)


# Cross-attention: images are keys of layers of their own.

FAKE = TAG


def _last_images(ids: torch.Tensor, image_id: int, num_images: int) -> torch.Tensor:
    """Which image each token looks at, the last one before it: bool ``[batch, length, images]``."""
    seen = (ids == image_id).cumsum(1)
    return seen[..., None] == torch.arange(1, num_images + 1)


def _idefics_mask(ids: torch.Tensor, mask: torch.Tensor, pictures: Pictures) -> dict[str, torch.Tensor]:
    most = max(1, *(len(sample) for sample in pictures), 0)
    inputs: dict[str, torch.Tensor] = {"image_attention_mask": _last_images(ids, IMAGE, most).long()}
    if not any(pictures):
        inputs["pixel_values"] = torch.zeros(len(ids), 1, *PICTURE)
    return inputs


idefics = family(
    "idefics",
    "IdeficsForVisionText2Text",
    title="idefics (1, cross-attention)",
    attention=6,
    block=(FAKE, IMAGE, FAKE),
    encode=nested(),
    annotate=_idefics_mask,
    visual_ids=(),
    notes="no placeholders: images are the keys of gated cross-attention before every other layer; 4 key heads",
    config=parts(
        "IdeficsConfig",
        **without(text(), "model_type", "num_key_value_heads"),
        vision_config=without(vision(embed_dim=16), "hidden_size"),
        cross_layer_interval=2,
        alpha_initializer="ones",
        alpha_type="vector",
    ),
)


def _cross_mask(ids: torch.Tensor, mask: torch.Tensor, pictures: Pictures) -> dict[str, torch.Tensor]:
    most = max((len(sample) for sample in pictures), default=0)
    if not most:
        return {}
    looks = (_last_images(ids, IMAGE, most).float()) * mask[..., None]
    tiles = torch.tensor([1.0, 1.0])
    return {"cross_attention_mask": looks[..., None] * tiles}


mllama = family(
    "mllama",
    "MllamaForConditionalGeneration",
    title="mllama (cross-attention)",
    attention=5,
    block=(IMAGE,),
    picture=(2, *PICTURE),
    encode=nested(aspect_ratio_ids=2, aspect_ratio_mask=[1, 1]),
    annotate=_cross_mask,
    notes="images are the keys of cross-attention in two of five layers; one placeholder per image",
    config=parts(
        "MllamaConfig",
        text("mllama_text_model", num_hidden_layers=5, cross_attention_layers=[1, 3], **rope()),
        without(
            vision(
                num_global_layers=1,
                attention_heads=2,
                vision_output_dim=32,
                max_num_tiles=2,
                intermediate_layers_indices=[0],
                supported_aspect_ratios=[[1, 1], [1, 2], [2, 1]],
            ),
            "num_attention_heads",
        ),
        image_token_index=IMAGE,
    ),
)
