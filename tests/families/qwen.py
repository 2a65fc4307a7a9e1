"""Families whose images are patches with a grid: Qwen-VL and its kin. Most count their own positions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from families.base import (
    END,
    IMAGE,
    MEDIA,
    START,
    VIDEO,
    Family,
    family,
    parts,
    rope,
    stacked,
    text,
    token_types,
    variant,
    vision,
    without,
)

GRID = (1, 4, 4)
PATCHES = 16
BLOCK = (START, *(IMAGE,) * 4, END)
GRIDDED = {
    "block": BLOCK,
    "picture": (PATCHES, 3 * 2 * 4 * 4),
    "encode": stacked(joined=True, image_grid_thw=GRID),
    "visual_ids": (IMAGE, VIDEO),
}
QWEN = {**GRIDDED, "annotate": token_types("mm_token_type_ids"), "text_positions": False}
"""Of models that count their own positions."""
IDS = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END}
GLM_IDS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "image_start_token_id": START,
    "image_end_token_id": END,
    "video_start_token_id": START + 20,
    "video_end_token_id": END + 20,
}


def mrope(**changes: Any) -> dict[str, Any]:
    """Rotary parameters of three axes, and changes of the text config."""
    return {**rope(mrope_section=[1, 1, 2]), **changes}


def qwen_tower(**changes: Any) -> dict[str, Any]:
    """A tiny tower of Qwen-VL: patches of 4 pixels, merged two by two."""
    common = {"depth": 2, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "patch_size": 4}
    return {**common, "out_hidden_size": 32, **changes}


qwen2_vl = family(
    "qwen2_vl",
    "Qwen2VLForConditionalGeneration",
    **QWEN,
    config=parts(
        "Qwen2VLConfig",
        text("qwen2_vl_text", **mrope()),
        {"depth": 2, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 4, "mlp_ratio": 2},
        **IDS,
    ),
)


WINDOWS = {"fullatt_block_indexes": [1], "window_size": 16}


def _qwen2_5_vl(**changes: Any) -> Callable[[], Any]:
    return parts("Qwen2_5_VLConfig", text("qwen2_5_vl_text", **mrope(**changes)), qwen_tower(**WINDOWS), **IDS)


qwen2_5_vl = family("qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration", **QWEN, config=_qwen2_5_vl())

qwen2_5_vl_sliding: Family = variant(
    qwen2_5_vl,
    "qwen2_5_vl_sliding",
    "qwen2_5_vl (sliding layers)",
    config=_qwen2_5_vl(
        use_sliding_window=True,
        sliding_window=12,
        max_window_layers=2,
        layer_types=["full_attention", "full_attention", "sliding_attention", "sliding_attention"],
    ),
    notes="full layers first, then sliding ones",
)

DEEP = {"num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]}


qwen3_vl = family(
    "qwen3_vl",
    "Qwen3VLForConditionalGeneration",
    **QWEN,
    notes="visual features also enter the first two layers",
    config=parts("Qwen3VLConfig", text("qwen3_vl_text", head_dim=8, **mrope()), qwen_tower(**DEEP), **IDS),
)

qwen3_vl_moe = family(
    "qwen3_vl_moe",
    "Qwen3VLMoeForConditionalGeneration",
    **QWEN,
    notes="mixture of experts",
    config=parts(
        "Qwen3VLMoeConfig",
        text(
            "qwen3_vl_moe_text", head_dim=8, moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2, **mrope()
        ),
        qwen_tower(**DEEP),
        **IDS,
    ),
)


LINEAR = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    **rope(mrope_section=[1, 1, 2], partial_rotary_factor=1.0, mrope_interleaved=True),
}


def qwen3_5_text() -> dict[str, Any]:
    """Linear attention and, in every other layer, softmax attention with an output gate."""
    return text(
        "qwen3_5_text",
        head_dim=8,
        layer_types=["linear_attention", "full_attention"] * 2,
        **LINEAR,
    )


qwen3_5 = family(
    "qwen3_5",
    "Qwen3_5ForConditionalGeneration",
    title="qwen3_5 (hybrid linear)",
    attention=2,
    **QWEN,
    needs_transformers="5.2",
    notes="softmax attention in two of four layers, gated before the output projection",
    config=parts("Qwen3_5Config", qwen3_5_text(), qwen_tower(num_position_embeddings=16), **IDS),
)


GLM_TOWER = {"image_size": 16}


glm4v = family(
    "glm4v",
    "Glm4vForConditionalGeneration",
    **QWEN,
    config=parts("Glm4vConfig", text("glm4v_text", **mrope()), qwen_tower(**GLM_TOWER), **GLM_IDS),
)

glm4v_moe = family(
    "glm4v_moe",
    "Glm4vMoeForConditionalGeneration",
    **QWEN,
    notes="mixture of experts",
    config=parts(
        "Glm4vMoeConfig",
        text(
            "glm4v_moe_text",
            moe_intermediate_size=32,
            n_routed_experts=4,
            num_experts_per_tok=2,
            n_shared_experts=1,
            **rope(mrope_section=[1, 1, 2], partial_rotary_factor=1.0),
        ),
        qwen_tower(**GLM_TOWER),
        **GLM_IDS,
    ),
)

kimi_k25 = family(
    "kimi_k25",
    "Kimi_K25ForConditionalGeneration",
    title="kimi_k25 (MLA)",
    **{**GRIDDED, "picture": (PATCHES, 3, 4, 4)},
    needs_transformers="5.10",
    notes="latent attention: values are narrower than keys; 4 key heads",
    config=parts(
        "Kimi_K25Config",
        text(
            "deepseek_v3",
            num_key_value_heads=4,
            q_lora_rank=16,
            kv_lora_rank=16,
            qk_nope_head_dim=16,
            qk_rope_head_dim=8,
            v_head_dim=16,
            moe_intermediate_size=32,
            n_routed_experts=4,
            num_experts_per_tok=2,
            n_shared_experts=1,
            n_group=1,
            topk_group=1,
            first_k_dense_replace=1,
        ),
        vision(patch_size=4, pos_emb_height=4, pos_emb_width=4, pos_emb_time=1),
        projection_hidden_size=16,
        **IDS,
    ),
)

video_llama_3 = family(
    "video_llama_3",
    "VideoLlama3ForConditionalGeneration",
    block=BLOCK,
    picture=(PATCHES, 3 * 4 * 4),
    encode=stacked(joined=True, image_grid_thw=GRID, image_merge_sizes=2),
    visual_ids=(IMAGE, VIDEO),
    needs_transformers="5.0",
    config=parts(
        "VideoLlama3Config",
        text("qwen2"),
        without(vision(patch_size=4), "image_size"),
        **MEDIA,
    ),
)

AUDIO = {
    "d_model": 16,
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "num_mel_bins": 8,
    "max_source_positions": 20,
    "n_window": 4,
    "output_dim": 32,
}


qwen2_5_omni = family(
    "qwen2_5_omni",
    "Qwen2_5OmniThinkerForConditionalGeneration",
    title="qwen2_5_omni (thinker)",
    **QWEN,
    config=parts(
        "Qwen2_5OmniThinkerConfig",
        text("qwen2_5_omni_text", **mrope()),
        qwen_tower(**WINDOWS),
        audio_config=AUDIO,
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        audio_token_index=72,
        audio_start_token_id=73,
        audio_end_token_id=74,
        vision_start_token_id=START,
        vision_end_token_id=END,
        user_token_id=75,
        pad_token_id=0,
    ),
)


ernie4_5_vl_moe = family(
    "ernie4_5_vl_moe",
    "Ernie4_5_VLMoeForConditionalGeneration",
    **{**QWEN, "picture": (PATCHES, 3 * 4 * 4), "annotate": token_types("mm_token_type_ids", "moe_mm_token_type_ids")},
    needs_transformers="5.0",
    notes="experts for text and for images",
    config=parts(
        "Ernie4_5_VLMoeConfig",
        text(
            "ernie4_5_vl_moe_text",
            moe_intermediate_size=[32, 16],
            moe_num_experts=4,
            moe_k=2,
            moe_num_shared_experts=1,
            mlp_layer_types=["dense", "sparse", "sparse", "sparse"],
            **mrope(),
        ),
        without(qwen_tower(temporal_merge_size=2), "out_hidden_size"),
        **GLM_IDS,
    ),
)
