"""Families with resamplers, tiles on a text model of another name, image words, bare patches, or an encoder."""

from __future__ import annotations

from typing import Any

import torch

from families.base import (
    BOS,
    BREAK,
    END,
    EOS,
    IMAGE,
    PAD,
    PICTURE,
    START,
    TAG,
    VOCAB_SIZE,
    Pictures,
    decoder_start,
    family,
    nested,
    rope,
    stacked,
    text,
    vision,
)

# Resamplers and tiles on a text model of another name.


@family(
    "idefics2",
    "idefics2",
    "Idefics2ForConditionalGeneration",
    block=(TAG, *(IMAGE,) * 4, TAG),
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
    "block": (TAG, START, *(IMAGE,) * 4, TAG, START + 1, *(IMAGE,) * 4, TAG),
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
    attention=6,
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
    idefics2,
    idefics3,
    smolvlm,
    chameleon,
    fuyu,
    florence2,
)
