"""Further families whose images are patches with a grid: on the towers of Qwen-VL and GLM-V, with other text models."""

from __future__ import annotations

from functools import partial

from families.base import MEDIA, START, family, parts, rope, text, variant, vision, without
from families.qwen import (
    AUDIO,
    DEEP,
    GLM_IDS,
    GLM_TOWER,
    GRIDDED,
    IDS,
    PATCHES,
    QWEN,
    WINDOWS,
    mrope,
    qwen3_5_text,
    qwen_tower,
)

# GLM-V's kin.


_glm46v = partial(parts, text=text("glm4v_text", **mrope()), vision=qwen_tower(**GLM_TOWER), **GLM_IDS)

glm46v = family(
    "glm46v", "Glm46VForConditionalGeneration", **QWEN, needs_transformers="5.0", config=_glm46v("Glm46VConfig")
)

glmga = variant(glm46v, "glmga", "glmga", config=_glm46v("GlmgaConfig"), needs_transformers="5.23")

glm_ocr = family(
    "glm_ocr",
    "GlmOcrForConditionalGeneration",
    **QWEN,
    needs_transformers="5.10",
    config=parts("GlmOcrConfig", text("glm_ocr_text", head_dim=8, **mrope()), qwen_tower(**GLM_TOWER), **GLM_IDS),
)


# Qwen-VL's kin.


qwen3_5_moe = family(
    "qwen3_5_moe",
    "Qwen3_5MoeForConditionalGeneration",
    title="qwen3_5_moe (hybrid linear)",
    attention=2,
    **QWEN,
    needs_transformers="5.2",
    notes="as qwen3_5, with a mixture of experts",
    config=parts(
        "Qwen3_5MoeConfig",
        without(
            {
                **qwen3_5_text(),
                "model_type": "qwen3_5_moe_text",
                "moe_intermediate_size": 16,
                "shared_expert_intermediate_size": 16,
                "num_experts": 4,
                "num_experts_per_tok": 2,
            },
            "intermediate_size",
        ),
        qwen_tower(num_position_embeddings=16),
        **IDS,
    ),
)

qwen3_omni_moe = family(
    "qwen3_omni_moe",
    "Qwen3OmniMoeThinkerForConditionalGeneration",
    title="qwen3_omni_moe (thinker)",
    **QWEN,
    notes="mixture of experts; visual features also enter the first two layers",
    config=parts(
        "Qwen3OmniMoeThinkerConfig",
        text(
            "qwen3_omni_moe_text",
            head_dim=8,
            moe_intermediate_size=32,
            num_experts=4,
            num_experts_per_tok=2,
            **rope(mrope_section=[1, 1, 2], mrope_interleaved=True),
        ),
        qwen_tower(**DEEP),
        audio_config={**AUDIO, "downsample_hidden_size": 8},
        **MEDIA,
        audio_token_id=72,
        audio_start_token_id=73,
        user_token_id=75,
        vision_start_token_id=START,
    ),
)

paddleocr_vl = family(
    "paddleocr_vl",
    "PaddleOCRVLForConditionalGeneration",
    title="paddleocr_vl (ernie 4.5)",
    **{**QWEN, "picture": (PATCHES, 3, 4, 4)},
    needs_transformers="5.0",
    config=parts(
        "PaddleOCRVLConfig",
        text("paddleocr_vl_text", head_dim=8, **mrope()),
        vision(image_size=16, patch_size=4),
        **IDS,
    ),
)

exaone4_5 = family(
    "exaone4_5",
    "Exaone4_5_ForConditionalGeneration",
    title="exaone4_5 (sliding layers)",
    **GRIDDED,
    needs_transformers="5.10",
    notes="three of four layers slide; grouped heads in the vision tower",
    config=parts(
        "Exaone4_5_Config",
        text(
            "exaone4",
            head_dim=8,
            sliding_window=12,
            layer_types=["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"],
        ),
        qwen_tower(num_key_value_heads=1, **WINDOWS),
        **MEDIA,
    ),
)

hyperclovax_vision_v2 = family(
    "hyperclovax_vision_v2",
    "HyperCLOVAXVisionV2ForConditionalGeneration",
    **GRIDDED,
    needs_transformers="5.10",
    config=parts(
        "HyperCLOVAXVisionV2Config",
        text("hyperclovax", head_dim=8),
        qwen_tower(model_type="qwen2_5_vl_vision", **WINDOWS),
        **MEDIA,
    ),
)
