"""Gemma's families and others with masks, layers or heads of their own."""

from __future__ import annotations

from functools import partial

import torch

from families.base import (
    END,
    IMAGE,
    MEDIA,
    PICTURE,
    START,
    TAG,
    VIDEO,
    VOCAB_SIZE,
    Pictures,
    family,
    gemma2_text,
    parts,
    stacked,
    text,
    token_types,
    vision,
)
from families.tower import tower


def _pali_types(ids: torch.Tensor, mask: torch.Tensor, pictures: Pictures) -> dict[str, torch.Tensor]:
    """Zeros: the whole prompt is a prefix, as the processor says outside training."""
    return {"token_type_ids": torch.zeros_like(ids)}


_paligemma = partial(
    parts,
    "PaliGemmaConfig",
    vision=vision("siglip_vision_model", vision_use_head=False, projection_dim=32),
    image_token_index=IMAGE,
    projection_dim=32,
    hidden_size=32,
    vocab_size=VOCAB_SIZE,
)

PALIGEMMA = {
    "block": (IMAGE,) * 9,
    "picture": PICTURE,
    "encode": stacked(),
    "annotate": _pali_types,
    "image_first": True,
}


paligemma = family(
    "paligemma",
    "PaliGemmaForConditionalGeneration",
    title="paligemma (gemma)",
    **PALIGEMMA,
    notes="image and prompt see each other",
    config=_paligemma(text("gemma", head_dim=8)),
)

paligemma2 = family(
    "paligemma2",
    "PaliGemmaForConditionalGeneration",
    title="paligemma2 (gemma2)",
    **PALIGEMMA,
    notes="image and prompt see each other; softcap, sliding layers",
    config=_paligemma(gemma2_text()),
)

gemma3_config = partial(
    parts,
    text=text(
        "gemma3_text",
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=12,
        layer_types=["sliding_attention", "full_attention"] * 2,
    ),
    vision=vision("siglip_vision_model", image_size=16, patch_size=4, vision_use_head=False),
    mm_tokens_per_image=4,
    image_token_index=IMAGE,
    boi_token_index=START,
    eoi_token_index=END,
)

gemma3 = family(
    "gemma3",
    "Gemma3ForConditionalGeneration",
    block=(START, *(IMAGE,) * 4, END),
    picture=(3, 16, 16),
    annotate=token_types("token_type_ids"),
    notes="image tokens see each other; every other layer slides",
    config=gemma3_config("Gemma3Config"),
)


GEMMA3N_IMAGE = 97


gemma3n = family(
    "gemma3n",
    "Gemma3nForConditionalGeneration",
    attention=5,
    block=(START, *(GEMMA3N_IMAGE,) * 9, END),
    visual_ids=(GEMMA3N_IMAGE,),
    notes="four residual streams, shared keys in the last layers; stand-in vision tower",
    config=parts(
        "Gemma3nConfig",
        text(
            "gemma3n_text",
            vocab_size=112,
            vocab_size_per_layer_input=96,
            hidden_size_per_layer_input=8,
            num_hidden_layers=5,
            num_kv_shared_layers=2,
            intermediate_size=[64] * 5,
            activation_sparsity_pattern=[0.0] * 5,
            layer_types=["sliding_attention", *["sliding_attention", "full_attention"] * 2],
            sliding_window=12,
            head_dim=8,
            altup_num_inputs=2,
            laurel_rank=8,
        ),
        lambda: tower(layout="map", vocab_size=8, vocab_offset=96, rms_norm_eps=1e-06),
        audio_config={
            "vocab_size": 8,
            "vocab_offset": 104,
            "input_feat_size": 16,
            "hidden_size": 16,
            "conf_attention_chunk_size": 4,
            "conf_attention_context_left": 5,
            "conf_num_attention_heads": 2,
            "conf_num_hidden_layers": 1,
            "conf_conv_kernel_size": 3,
            "sscp_conv_channel_size": [8, 8],
        },
        vision_soft_tokens_per_image=9,
        image_token_id=GEMMA3N_IMAGE,
        boi_token_id=START,
        eoi_token_id=END,
        boa_token_id=TAG,
        eoa_token_id=TAG + 1,
        audio_token_id=105,
    ),
)

GEMMA4 = {
    "block": (START, *(IMAGE,) * 4, END),
    "annotate": token_types("mm_token_type_ids"),
    "visual_ids": (IMAGE, VIDEO),
}
GEMMA4_TEXT = {
    "head_dim": 8,
    "global_head_dim": 16,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "sliding_window": 12,
}
GEMMA4_IDS = {**MEDIA, "audio_config": None, "audio_token_id": 72, "boi_token_id": START, "eoi_token_id": END}

gemma4 = family(
    "gemma4",
    "Gemma4ForConditionalGeneration",
    **GEMMA4,
    picture=(16, 3 * 4 * 4),
    encode=stacked(image_position_ids=[[column, row] for row in range(4) for column in range(4)]),
    needs_transformers="5.10",
    notes="image tokens see each other; head sizes differ by layer; shared keys in the last two layers, which read "
    "only the last row of a prompt",
    config=parts(
        "Gemma4Config",
        text(
            "gemma4_text",
            **GEMMA4_TEXT,
            num_kv_shared_layers=2,
            vocab_size_per_layer_input=VOCAB_SIZE,
            hidden_size_per_layer_input=8,
            use_bidirectional_attention="vision",
        ),
        vision(patch_size=4, num_key_value_heads=2, head_dim=8, pooling_kernel_size=2, position_embedding_size=16),
        **GEMMA4_IDS,
    ),
)
