"""Families whose pictures come as tiles, grids with separators, or words of the vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from families.base import (
    BREAK,
    END,
    IMAGE,
    START,
    family,
    parts,
    rope,
    sam_tower,
    stacked,
    text,
    tiled,
    token_types,
    vision,
)
from families.qwen import DEEP, GRID, IDS, PATCHES, QWEN, qwen_tower
from families.sparse import EXPERTS
from families.special import IDEFICS3

AXES = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2], "mrope_interleaved": True}

cohere_compass = family(
    "cohere_compass",
    "CohereCompassForConditionalGeneration",
    **QWEN,
    needs_transformers="5.23",
    notes="visual features also enter the first two layers",
    config=parts(
        "CohereCompassConfig",
        text(
            "cohere_compass_text",
            sliding_window=12,
            logit_scale=1.0,
            layer_types=["sliding_attention", "full_attention"] * 2,
            rope_parameters={"sliding_attention": AXES, "full_attention": AXES},
        ),
        qwen_tower(**DEEP),
        **IDS,
    ),
)


hunyuan_vl = family(
    "hunyuan_vl",
    "HunYuanVLForConditionalGeneration",
    block=(START, *(IMAGE,) * 8, END),
    picture=(PATCHES, 3 * 4 * 4),
    encode=stacked(joined=True, image_grid_thw=GRID),
    annotate=token_types("mm_token_type_ids"),
    text_positions=False,
    needs_transformers="5.23",
    notes="row ends and borders of an image are image tokens too",
    config=parts(
        "HunYuanVLConfig",
        text(
            "hunyuan_vl_text",
            head_dim=8,
            rope_parameters={
                "rope_type": "dynamic",
                "rope_theta": 10000.0,
                "factor": 1.0,
                "alpha": 1000.0,
                "mrope_section": [1, 1, 1, 1],
            },
        ),
        vision(patch_size=4, max_image_size=32, out_hidden_size=32, img_max_token_num=64),
        image_token_id=IMAGE,
        im_start_id=START,
        im_end_id=END,
        im_newline_id=BREAK,
    ),
)

step3p7 = family(
    "step3p7",
    "Step3p7ForConditionalGeneration",
    title="step3p7 (gated, sliding layers)",
    block=(START, *(IMAGE,) * 4, END),
    picture=(3, 32, 32),
    needs_transformers="5.23",
    notes="head outputs are gated; every other layer slides; mixture of experts",
    config=parts(
        "Step3p7Config",
        text(
            "step3p5",
            head_dim=8,
            sliding_window=12,
            layer_types=["sliding_attention", "full_attention"] * 2,
            moe_intermediate_size=16,
            n_routed_experts=4,
            num_experts_per_tok=2,
            share_expert_dim=16,
            **rope(),
        ),
        vision(image_size=32, patch_size=4, mlp_ratio=2.0, max_position_embeddings=64),
        image_token_id=IMAGE,
    ),
)


GRANITE = {
    "embedding_multiplier": 1.0,
    "logits_scaling": 1.0,
    "residual_multiplier": 0.7,
    "attention_multiplier": 0.35,
}


granite_docling = family(
    "granite_docling",
    "GraniteDoclingForConditionalGeneration",
    **IDEFICS3,
    encode=tiled(mask="pixel_attention_mask"),
    needs_transformers="5.23",
    notes="row and column tags between the tiles of an image; visual features also enter the first layer",
    config=parts(
        "GraniteDoclingConfig",
        text("granite_docling_text", **GRANITE),
        vision(image_size=16, patch_size=4, out_hidden_size=32, scale_factor=2, deepstack_visual_indexes=[0]),
        image_token_id=IMAGE,
        pad_token_id=0,
    ),
)

granite4_vision = family(
    "granite4_vision",
    "Granite4VisionForConditionalGeneration",
    block=(IMAGE,) * (4 + 2 * 5),
    picture=(3, 3, 32, 32),
    encode=stacked(image_sizes=(32, 64)),
    needs_transformers="5.10",
    notes="tiles and row ends in one block; visual features enter two layers",
    config=parts(
        "Granite4VisionConfig",
        text("granite4_vision_text", **GRANITE),
        vision("siglip_vision_model", image_size=32, hidden_size=64, vision_use_head=False),
        image_token_index=IMAGE,
        image_grid_pinpoints=[[32, 64], [64, 32]],
        downsample_rate="2/4",
        vision_feature_select_strategy="full",
        deepstack_layer_map=[[-2, 0], [-1, 1]],
        spatial_target_layers=[2, 2, 3, 3],
        qformer_config={
            "model_type": "blip_2_qformer",
            "num_hidden_layers": 1,
            "intermediate_size": 32,
            "cross_attention_frequency": 1,
            "max_position_embeddings": 64,
            "use_qformer_text_input": False,
        },
    ),
)

emu3 = family(
    "emu3",
    "Emu3ForConditionalGeneration",
    title="emu3 (VQ)",
    block=(START, *(IMAGE,) * (4 * 5), END),
    picture=(3, 8, 8),
    encode=stacked(image_sizes=(8, 8)),
    notes="images become words of the vocabulary",
    config=parts(
        "Emu3Config",
        text_config=text("emu3_text_model", head_dim=8),
        vq_config={
            "codebook_size": 10,
            "embed_dim": 1,
            "latent_channels": 4,
            "base_channels": 32,
            "channel_multiplier": [1, 1],
            "num_res_blocks": 1,
            "attn_resolutions": [],
            "hidden_size": 32,
            "temporal_downsample_factor": 2,
        },
        vocabulary_map={
            "<image>": IMAGE,
            "<|extra_200|>": 90,
            **{f"<|visual token {code:06d}|>": 71 + code for code in range(10)},
        },
    ),
)


def _ocr(name: str, language: str, tower: dict[str, Any], **changes: Any) -> Callable[[], Any]:
    sharp = sam_tower(patch_size=2, output_channels=8, downsample_channels=[8, 16])
    dense_first = ["dense", "sparse", "sparse", "sparse"]
    return parts(
        name,
        text(language, mlp_layer_types=dense_first, n_group=1, topk_group=1, **EXPERTS, **changes),
        {"sam_config": sharp, "encoder_config": tower},
        image_token_id=IMAGE,
    )


unlimited_ocr = family(
    "unlimited_ocr",
    "UnlimitedOcrForConditionalGeneration",
    title="unlimited_ocr (reference window)",
    block=(IMAGE,) * (4 * 5 + 1),
    picture=(3, 32, 32),
    needs_transformers="5.23",
    notes="what is generated sees the prompt and a window; row ends and a separator are image tokens too",
    config=_ocr("UnlimitedOcrConfig", "unlimited_ocr_text", vision(image_size=32, patch_size=8), sliding_window=4),
)

deepseek_ocr2 = family(
    "deepseek_ocr2",
    "DeepseekOcr2ForConditionalGeneration",
    block=(IMAGE,) * (144 + 1),
    picture=(3, 32, 32),
    needs_transformers="5.10",
    notes="144 queries and a separator per image",
    config=_ocr("DeepseekOcr2Config", "deepseek_ocr2_text", {**text("x", hidden_size=16, num_hidden_layers=2)}),
)
