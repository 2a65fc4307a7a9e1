"""Families with layers of their own: gates, convolutions, windows, or norms behind the attention."""

from __future__ import annotations

from families.base import MEDIA, family, parts, rope, stacked, text, vision
from families.gemma import GEMMA4, GEMMA4_IDS, GEMMA4_TEXT
from families.qwen import DEEP, GRIDDED, IDS, PATCHES, QWEN, mrope, qwen_tower

cosmos3_omni = family(
    "cosmos3_omni",
    "Cosmos3OmniForConditionalGeneration",
    **QWEN,
    needs_transformers="5.23",
    notes="visual features also enter the first two layers",
    config=parts("Cosmos3OmniConfig", text("qwen3_vl_text", head_dim=8, **mrope()), qwen_tower(**DEEP), **IDS),
)

cosmos3_edge = family(
    "cosmos3_edge",
    "Cosmos3EdgeForConditionalGeneration",
    **{**QWEN, "picture": (PATCHES, 3 * 4 * 4)},
    needs_transformers="5.23",
    config=parts(
        "Cosmos3EdgeConfig",
        text("cosmos3_edge_text", head_dim=8, **mrope()),
        {**vision(patch_size=4, num_patches=16), "model_type": "cosmos3_edge_vision"},
        projector_hidden_size=32,
        **IDS,
    ),
)


MUSE_TOWER = {
    "patch_size": 4,
    "pos_emb_height": 4,
    "pos_emb_width": 4,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "hidden_size": 16,
    "intermediate_size": 32,
    "max_position_embeddings": 16,
}


muse_glimmer = family(
    "muse_glimmer",
    "MuseGlimmerForConditionalGeneration",
    title="muse_glimmer (softcap, sliding layers)",
    **GRIDDED,
    needs_transformers="5.23",
    notes="three of four layers slide; layers without rotary positions",
    config=parts(
        "MuseGlimmerConfig",
        text("muse_glimmer_text", head_dim=8, sliding_window=12, **rope()),
        MUSE_TOWER,
        **MEDIA,
        out_hidden_size=64,
        projector_hidden_size=32,
    ),
)

muse_spark = family(
    "muse_spark",
    "MuseSparkForConditionalGeneration",
    title="muse_spark (sliding layers, norm per head)",
    **GRIDDED,
    needs_transformers="5.23",
    notes="a norm per head behind the attention undoes factors; three of four layers slide; mixture of experts",
    config=parts(
        "MuseSparkConfig",
        text(
            "muse_spark_text",
            head_dim=8,
            sliding_window=12,
            moe_intermediate_size=16,
            moe_hidden_size=16,
            num_local_experts=4,
            num_experts_per_tok=2,
            **rope(),
        ),
        MUSE_TOWER,
        audio_config={
            "patch_sizes": [2, 2],
            "hidden_sizes": [8, 8],
            "depths": [1, 1],
            "num_hidden_layers": 2,
            "out_hidden_size": 32,
        },
        **MEDIA,
        audio_token_id=72,
        out_hidden_size=64,
        projector_hidden_size=32,
    ),
)

lfm3_vl = family(
    "lfm3_vl",
    "Lfm3VlForConditionalGeneration",
    title="lfm3_vl (hybrid convolution)",
    attention=2,
    **QWEN,
    needs_transformers="5.23",
    notes="attention in two of four layers, one of which slides; gated before the output projection",
    config=parts(
        "Lfm3VlConfig",
        text(
            "lfm3",
            head_dim=8,
            sliding_window=12,
            conv_L_cache=3,
            layer_types=["conv", "sliding_attention", "conv", "full_attention"],
        ),
        {
            **vision(patch_size=4, num_key_value_heads=1),
            "model_type": "lfm3_vl_vision",
            "layer_types": ["conv", "full_attention"],
        },
        projector_hidden_size=32,
        **IDS,
    ),
)

gemma4_unified = family(
    "gemma4_unified",
    "Gemma4UnifiedForConditionalGeneration",
    **GEMMA4,
    picture=(4, 3 * 8 * 8),
    encode=stacked(image_position_ids=[[column, row] for row in range(2) for column in range(2)]),
    needs_transformers="5.23",
    notes="patches enter without a vision tower; image tokens see each other; head sizes differ by layer",
    config=parts(
        "Gemma4UnifiedConfig",
        text("gemma4_unified_text", **GEMMA4_TEXT),
        {"patch_size": 4, "pooling_kernel_size": 2, "mm_embed_dim": 32, "mm_posemb_size": 16, "output_proj_dims": 32},
        **GEMMA4_IDS,
    ),
)
