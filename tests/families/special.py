"""Families with resamplers, tiles on a text model of another name, image words, bare patches, or an encoder."""

from __future__ import annotations

from functools import partial

import torch

from families.base import (
    BOS,
    BREAK,
    END,
    EOS,
    IMAGE,
    PAD,
    START,
    TAG,
    VOCAB_SIZE,
    Pictures,
    decoder_start,
    family,
    nested,
    parts,
    rope,
    stacked,
    text,
    tiled,
    variant,
    vision,
    without,
)

# Resamplers and tiles on a text model of another name.


idefics2 = family(
    "idefics2",
    "Idefics2ForConditionalGeneration",
    block=(TAG, *(IMAGE,) * 4, TAG),
    encode=nested(),
    notes="a resampler between image and text",
    config=parts(
        "Idefics2Config",
        text("mistral", sliding_window=None, head_dim=8),
        vision(),
        perceiver_config={
            "hidden_size": 32,
            "resampler_n_latents": 4,
            "resampler_depth": 1,
            "resampler_n_heads": 2,
            "resampler_head_dim": 8,
            "num_key_value_heads": 1,
        },
        image_token_id=IMAGE,
    ),
)


IDEFICS3 = {
    "block": (TAG, START, *(IMAGE,) * 4, TAG, START + 1, *(IMAGE,) * 4, TAG),
    "picture": (2, 3, 16, 16),
}
_idefics3 = partial(
    parts,
    text=text(),
    vision=vision(image_size=16, patch_size=4),
    scale_factor=2,
    image_token_id=IMAGE,
    pad_token_id=PAD,
)


idefics3 = family(
    "idefics3",
    "Idefics3ForConditionalGeneration",
    **IDEFICS3,
    encode=tiled(),
    config=_idefics3("Idefics3Config"),
    notes="row and column tags between the tiles of an image",
)

smolvlm = variant(
    idefics3,
    "smolvlm",
    "smolvlm",
    architecture="SmolVLMForConditionalGeneration",
    config=_idefics3("SmolVLMConfig"),
)


# Image tokens of a vocabulary, patches without a tower, and an encoder-decoder.


chameleon = family(
    "chameleon",
    "ChameleonForConditionalGeneration",
    title="chameleon (VQ)",
    block=(START, *(IMAGE,) * 16, END),
    picture=(3, 8, 8),
    notes="images become words of the vocabulary",
    config=parts(
        "ChameleonConfig",
        **without(text(), "model_type"),
        vq_config={
            "embed_dim": 8,
            "num_embeddings": 10,
            "latent_channels": 8,
            "resolution": 8,
            "base_channels": 32,
            "channel_multiplier": [1, 1],
            "num_res_blocks": 1,
        },
        vocabulary_map={"<image>": IMAGE, **{f"IMGIMG{chr(ord('A') + code)}Z": 71 + code for code in range(10)}},
    ),
)


def _encode_fuyu(pictures: Pictures) -> dict[str, torch.Tensor]:
    import inspect

    from transformers import FuyuForCausalLM

    is_old = "pixel_values" not in inspect.signature(FuyuForCausalLM.forward).parameters
    return stacked("image_patches" if is_old else "pixel_values")(pictures)


fuyu = family(
    "fuyu",
    "FuyuForCausalLM",
    title="fuyu (persimmon)",
    block=((IMAGE,) * 3 + (BREAK,)) * 3,
    picture=(9, 3 * 4 * 4),
    encode=_encode_fuyu,
    notes="patches enter without a vision tower; line ends between them; 4 key heads",
    config=parts(
        "FuyuConfig",
        text_config=without(text("persimmon", **rope(partial_rotary_factor=0.5)), "num_key_value_heads"),
        image_size=12,
        patch_size=4,
        hidden_size=32,
        image_token_id=IMAGE,
        pad_token_id=PAD,
    ),
)

florence2 = family(
    "florence2",
    "Florence2ForConditionalGeneration",
    title="florence2 (encoder-decoder)",
    attention=6,
    block=(IMAGE,) * 5,
    picture=(3, 32, 32),
    annotate=decoder_start(EOS, BOS, 20),
    max_images=1,
    image_first=True,
    side="right",
    text_positions=False,
    notes="encoder-decoder: the image is in the encoder; 4 key heads",
    config=parts(
        "Florence2Config",
        {
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
        {
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
    ),
)
