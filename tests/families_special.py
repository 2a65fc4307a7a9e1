"""Families in which the image does not simply stand among the tokens of a decoder's prompt."""

from __future__ import annotations

from typing import Any

import torch
from families_base import (
    BOS,
    BREAK,
    END,
    EOS,
    IMAGE,
    PAD,
    START,
    TAG,
    VIDEO,
    VOCAB_SIZE,
    Pictures,
    family,
    nested,
    rope,
    stacked,
    text,
    variant,
    vision,
    words,
)

PICTURE = (3, 24, 24)
QUERIES = 6

# BLIP-2 and InstructBLIP: generate() hands embeddings to the language model, past the model's own forward.


def _qformer(**changes: Any) -> dict[str, Any]:
    return {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "encoder_hidden_size": 16,
        "max_position_embeddings": 64,
        **changes,
    }


def _opt() -> dict[str, Any]:
    common = text("opt", ffn_dim=64, word_embed_proj_dim=32)
    for name in ("num_key_value_heads", "intermediate_size"):
        del common[name]
    return common


def _t5() -> dict[str, Any]:
    return {
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


def _blip(name: str, language: dict[str, Any], **changes: Any) -> Any:
    import transformers

    return getattr(transformers, name)(
        vision_config=vision(), qformer_config=_qformer(), text_config=language, num_query_tokens=QUERIES, **changes
    )


BLIP = {
    "block": (IMAGE,) * QUERIES,
    "picture": PICTURE,
    "encode": stacked(),
    "max_images": 1,
    "text_only": False,
    "image_first": True,
    "text_positions": False,
}


@family(
    "blip2_opt",
    "blip2 (opt)",
    "Blip2ForConditionalGeneration",
    **BLIP,
    notes="generate() passes the model's forward by; 4 key heads",
)
def blip2_opt() -> Any:
    return _blip("Blip2Config", _opt(), image_token_index=IMAGE)


def decoder_start(*ids: int) -> Any:
    """The first ids of the answer of an encoder-decoder model."""

    def annotate(input_ids: torch.Tensor, mask: torch.Tensor, pictures: Pictures) -> dict[str, torch.Tensor]:
        return {"decoder_input_ids": torch.tensor([ids] * len(input_ids))}

    return annotate


blip2_t5 = variant(
    blip2_opt,
    "blip2_t5",
    "blip2 (t5)",
    config=lambda: _blip("Blip2Config", _t5(), image_token_index=IMAGE),
    annotate=decoder_start(PAD, 20),
    attention=9,
    side="right",
    notes="encoder-decoder: the image is in the encoder; position biases; generate() passes the model's forward by",
)


def _qformer_ids(ids: torch.Tensor, mask: torch.Tensor, pictures: Pictures) -> dict[str, torch.Tensor]:
    """The instruction as the Q-Former reads it: the same for every prompt."""
    instruction = torch.tensor([words(5, 77)] * len(ids))
    return {"qformer_input_ids": instruction, "qformer_attention_mask": torch.ones_like(instruction)}


@family(
    "instructblip",
    "instructblip (llama)",
    "InstructBlipForConditionalGeneration",
    **BLIP,
    annotate=_qformer_ids,
    notes="generate() passes the model's forward by",
)
def instructblip() -> Any:
    return _blip("InstructBlipConfig", text(), image_token_index=IMAGE)


@family(
    "instructblipvideo",
    "instructblipvideo (llama)",
    "InstructBlipVideoForConditionalGeneration",
    **{**BLIP, "block": (VIDEO,) * (2 * QUERIES), "picture": (2, *PICTURE)},
    annotate=_qformer_ids,
    visual_ids=(VIDEO,),
    notes="videos of two frames; generate() passes the model's forward by",
)
def instructblipvideo() -> Any:
    return _blip("InstructBlipVideoConfig", text(), video_token_index=VIDEO)


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


@family(
    "idefics",
    "idefics (1, cross-attention)",
    "IdeficsForVisionText2Text",
    attention=6,
    block=(FAKE, IMAGE, FAKE),
    picture=PICTURE,
    encode=nested(),
    annotate=_idefics_mask,
    visual_ids=(),
    notes="no placeholders: images are the keys of gated cross-attention before every other layer; 4 key heads",
)
def idefics() -> Any:
    from transformers import IdeficsConfig

    language = text()
    for name in ("model_type", "num_key_value_heads"):
        del language[name]
    tower = vision(embed_dim=16)
    del tower["hidden_size"]
    return IdeficsConfig(
        **language, vision_config=tower, cross_layer_interval=2, alpha_initializer="ones", alpha_type="vector"
    )


def _cross_mask(ids: torch.Tensor, mask: torch.Tensor, pictures: Pictures) -> dict[str, torch.Tensor]:
    most = max((len(sample) for sample in pictures), default=0)
    if not most:
        return {}
    looks = (_last_images(ids, IMAGE, most).float()) * mask[..., None]
    tiles = torch.tensor([1.0, 1.0])
    return {"cross_attention_mask": looks[..., None] * tiles}


@family(
    "mllama",
    "mllama (cross-attention)",
    "MllamaForConditionalGeneration",
    attention=5,
    block=(IMAGE,),
    picture=(2, *PICTURE),
    encode=nested(aspect_ratio_ids=2, aspect_ratio_mask=[1, 1]),
    annotate=_cross_mask,
    notes="images are the keys of cross-attention in two of five layers; one placeholder per image",
)
def mllama() -> Any:
    from transformers import MllamaConfig

    tower = vision(
        num_global_layers=1,
        attention_heads=2,
        vision_output_dim=32,
        max_num_tiles=2,
        intermediate_layers_indices=[0],
        supported_aspect_ratios=[[1, 1], [1, 2], [2, 1]],
    )
    del tower["num_attention_heads"]
    return MllamaConfig(
        vision_config=tower,
        text_config=text("mllama_text_model", num_hidden_layers=5, cross_attention_layers=[1, 3], **rope()),
        image_token_index=IMAGE,
    )


# Resamplers and tiles on a text model of another name.


@family(
    "idefics2",
    "idefics2",
    "Idefics2ForConditionalGeneration",
    block=(FAKE, *(IMAGE,) * 4, FAKE),
    picture=PICTURE,
    encode=nested(),
    notes="a resampler between image and text",
)
def idefics2() -> Any:
    from transformers import Idefics2Config

    return Idefics2Config(
        vision_config=vision(),
        text_config=text("mistral", sliding_window=None, head_dim=8),
        perceiver_config={
            "hidden_size": 32,
            "resampler_n_latents": 4,
            "resampler_depth": 1,
            "resampler_n_heads": 2,
            "resampler_head_dim": 8,
            "num_key_value_heads": 1,
        },
        image_token_id=IMAGE,
    )


IDEFICS3 = {
    "block": (FAKE, START, *(IMAGE,) * 4, FAKE, START + 1, *(IMAGE,) * 4, FAKE),
    "picture": (2, 3, 16, 16),
    "notes": "row and column tags between the tiles of an image",
}


def _encode_tiles(pictures: Pictures) -> dict[str, torch.Tensor]:
    """Tiles of all pictures of a sample in one row, missing ones zero."""
    rows = [torch.cat(list(sample)) if sample else torch.zeros(0, 3, 16, 16) for sample in pictures]
    most = max(len(row) for row in rows)
    return {"pixel_values": torch.stack([torch.cat([row, row.new_zeros(most - len(row), 3, 16, 16)]) for row in rows])}


def _idefics3(name: str) -> Any:
    import transformers

    return getattr(transformers, name)(
        vision_config=vision(image_size=16, patch_size=4),
        text_config=text(),
        scale_factor=2,
        image_token_id=IMAGE,
        pad_token_id=PAD,
    )


@family("idefics3", "idefics3", "Idefics3ForConditionalGeneration", **IDEFICS3, encode=_encode_tiles)
def idefics3() -> Any:
    return _idefics3("Idefics3Config")


@family("smolvlm", "smolvlm", "SmolVLMForConditionalGeneration", **IDEFICS3, encode=_encode_tiles)
def smolvlm() -> Any:
    return _idefics3("SmolVLMConfig")


# Image tokens of a vocabulary, patches without a tower, and an encoder-decoder.


@family(
    "chameleon",
    "chameleon (VQ)",
    "ChameleonForConditionalGeneration",
    block=(START, *(IMAGE,) * 16, END),
    picture=(3, 8, 8),
    encode=stacked(),
    notes="images become words of the vocabulary",
)
def chameleon() -> Any:
    from transformers import ChameleonConfig

    codes = 10
    names = {f"IMGIMG{chr(ord('A') + code)}Z": 71 + code for code in range(codes)}
    language = text()
    del language["model_type"]
    return ChameleonConfig(
        **language,
        vq_config={
            "embed_dim": 8,
            "num_embeddings": codes,
            "latent_channels": 8,
            "resolution": 8,
            "base_channels": 32,
            "channel_multiplier": [1, 1],
            "num_res_blocks": 1,
        },
        vocabulary_map={"<image>": IMAGE, **names},
    )


def _encode_fuyu(pictures: Pictures) -> dict[str, torch.Tensor]:
    import inspect

    from transformers import FuyuForCausalLM

    is_old = "pixel_values" not in inspect.signature(FuyuForCausalLM.forward).parameters
    return stacked("image_patches" if is_old else "pixel_values")(pictures)


@family(
    "fuyu",
    "fuyu (persimmon)",
    "FuyuForCausalLM",
    block=((IMAGE,) * 3 + (BREAK,)) * 3,
    picture=(9, 3 * 4 * 4),
    encode=_encode_fuyu,
    notes="patches enter without a vision tower; line ends between them; 4 key heads",
)
def fuyu() -> Any:
    from transformers import FuyuConfig

    language = text("persimmon", **rope(partial_rotary_factor=0.5))
    del language["num_key_value_heads"]
    sizes = {"image_size": 12, "patch_size": 4, "hidden_size": 32}
    return FuyuConfig(text_config=language, **sizes, image_token_id=IMAGE, pad_token_id=PAD)


@family(
    "florence2",
    "florence2 (encoder-decoder)",
    "Florence2ForConditionalGeneration",
    attention=8,
    block=(IMAGE,) * 5,
    picture=(3, 32, 32),
    encode=stacked(),
    annotate=decoder_start(EOS, BOS, 20),
    max_images=1,
    image_first=True,
    side="right",
    text_positions=False,
    notes="encoder-decoder: the image is in the encoder; 4 key heads",
)
def florence2() -> Any:
    from transformers import Florence2Config

    return Florence2Config(
        text_config={
            "model_type": "bart",
            "vocab_size": VOCAB_SIZE,
            "d_model": 32,
            "encoder_layers": 2,
            "decoder_layers": 3,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 64,
            "decoder_ffn_dim": 64,
            "max_position_embeddings": 64,
            "pad_token_id": PAD,
            "bos_token_id": BOS,
            "eos_token_id": EOS,
            "decoder_start_token_id": EOS,
            "forced_eos_token_id": None,
        },
        vision_config={
            "depths": [1, 1],
            "patch_size": [7, 3],
            "patch_stride": [4, 4],
            "patch_padding": [3, 1],
            "patch_prenorm": [False, True],
            "embed_dim": [8, 16],
            "num_heads": [2, 2],
            "num_groups": [2, 2],
            "window_size": 2,
            "projection_dim": 32,
            "max_position_embeddings": 8,
            "max_temporal_embeddings": 4,
            "drop_path_rate": 0.0,
        },
        image_token_id=IMAGE,
    )


FAMILIES = (
    blip2_opt,
    blip2_t5,
    instructblip,
    instructblipvideo,
    idefics,
    idefics2,
    idefics3,
    smolvlm,
    mllama,
    chameleon,
    fuyu,
    florence2,
)
