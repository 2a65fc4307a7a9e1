"""Further families whose images are patches with a grid: on the towers of Qwen-VL and GLM-V, with other text models."""

from __future__ import annotations

from typing import Any

from families.base import IMAGE, START, VIDEO, family, rope, text, variant, vision
from families.qwen import DEEP, GLM_IDS, GLM_TOWER, IDS, PATCHES, QWEN, mrope, qwen3_5_text, qwen_tower

# GLM-V's kin.


def _glm46v(name: str) -> Any:
    import transformers

    return getattr(transformers, name)(
        text_config=text("glm4v_text", **mrope()), vision_config=qwen_tower(**GLM_TOWER), **GLM_IDS
    )


@family("glm46v", "glm46v", "Glm46VForConditionalGeneration", **QWEN, needs_transformers="5.0")
def glm46v() -> Any:
    return _glm46v("Glm46VConfig")


glmga = variant(glm46v, "glmga", "glmga", config=lambda: _glm46v("GlmgaConfig"), needs_transformers="5.23")


@family("glm_ocr", "glm_ocr", "GlmOcrForConditionalGeneration", **QWEN, needs_transformers="5.10")
def glm_ocr() -> Any:
    from transformers import GlmOcrConfig

    return GlmOcrConfig(
        text_config=text("glm_ocr_text", head_dim=8, **mrope()), vision_config=qwen_tower(**GLM_TOWER), **GLM_IDS
    )


# Qwen-VL's kin.


@family(
    "qwen3_5_moe",
    "qwen3_5_moe (hybrid linear)",
    "Qwen3_5MoeForConditionalGeneration",
    attention=2,
    **QWEN,
    needs_transformers="5.2",
    notes="as qwen3_5, with a mixture of experts",
)
def qwen3_5_moe() -> Any:
    from transformers import Qwen3_5MoeConfig

    experts = {
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    }
    language = {**qwen3_5_text(), "model_type": "qwen3_5_moe_text", **experts}
    del language["intermediate_size"]
    return Qwen3_5MoeConfig(text_config=language, vision_config=qwen_tower(num_position_embeddings=16), **IDS)


@family(
    "qwen3_omni_moe",
    "qwen3_omni_moe (thinker)",
    "Qwen3OmniMoeThinkerForConditionalGeneration",
    **QWEN,
    notes="mixture of experts; visual features also enter the first two layers",
)
def qwen3_omni_moe() -> Any:
    from transformers import Qwen3OmniMoeThinkerConfig

    experts = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
    return Qwen3OmniMoeThinkerConfig(
        text_config=text(
            "qwen3_omni_moe_text", head_dim=8, **experts, **rope(mrope_section=[1, 1, 2], mrope_interleaved=True)
        ),
        vision_config=qwen_tower(**DEEP),
        audio_config={
            "d_model": 16,
            "encoder_layers": 1,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 16,
            "num_mel_bins": 8,
            "max_source_positions": 20,
            "n_window": 4,
            "output_dim": 32,
            "downsample_hidden_size": 8,
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        audio_token_id=72,
        audio_start_token_id=73,
        user_token_id=75,
        vision_start_token_id=START,
    )


@family(
    "paddleocr_vl",
    "paddleocr_vl (ernie 4.5)",
    "PaddleOCRVLForConditionalGeneration",
    **{**QWEN, "picture": (PATCHES, 3, 4, 4)},
    needs_transformers="5.0",
)
def paddleocr_vl() -> Any:
    from transformers import PaddleOCRVLConfig

    return PaddleOCRVLConfig(
        text_config=text("paddleocr_vl_text", head_dim=8, **mrope()),
        vision_config=vision(image_size=16, patch_size=4),
        **IDS,
    )


@family(
    "exaone4_5",
    "exaone4_5 (sliding layers)",
    "Exaone4_5_ForConditionalGeneration",
    **{**QWEN, "annotate": None, "text_positions": True},
    needs_transformers="5.10",
    notes="three of four layers slide; grouped heads in the vision tower",
)
def exaone4_5() -> Any:
    from transformers import Exaone4_5_Config

    return Exaone4_5_Config(
        text_config=text(
            "exaone4",
            head_dim=8,
            sliding_window=12,
            layer_types=["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"],
        ),
        vision_config=qwen_tower(num_key_value_heads=1, fullatt_block_indexes=[1], window_size=16),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
    )


@family(
    "hyperclovax_vision_v2",
    "hyperclovax_vision_v2",
    "HyperCLOVAXVisionV2ForConditionalGeneration",
    **{**QWEN, "annotate": None, "text_positions": True},
    needs_transformers="5.10",
)
def hyperclovax_vision_v2() -> Any:
    from transformers import HyperCLOVAXVisionV2Config

    return HyperCLOVAXVisionV2Config(
        text_config=text("hyperclovax", head_dim=8),
        vision_config=qwen_tower(model_type="qwen2_5_vl_vision", fullatt_block_indexes=[1], window_size=16),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
    )


FAMILIES = (
    glm46v,
    glmga,
    glm_ocr,
    qwen3_5_moe,
    qwen3_omni_moe,
    paddleocr_vl,
    exaone4_5,
    hyperclovax_vision_v2,
)
