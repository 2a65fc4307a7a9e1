"""Families whose attention sees only the keys that a sparse indexer selects."""

from __future__ import annotations

from typing import Any

from families.base import BREAK, END, IMAGE, VIDEO, family, rope, stacked, text, vision
from families.qwen import BLOCK, GLM_IDS, GRID, IDS, PATCHES, QWEN, qwen_tower

TOPK = 8
"""How many keys a row sees; the tiny prompts are longer."""
EXPERTS = {
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
}
INDEX = {"index_topk": TOPK, "index_head_dim": 8, "index_n_heads": 16}
"""So many heads that no key scores zero with all of them: ties would be broken differently from call to call."""


@family(
    "mistral_large4",
    "mistral_large4 (sparse MLA)",
    "MistralLarge4ForConditionalGeneration",
    block=(IMAGE, IMAGE, BREAK, IMAGE, IMAGE, END),
    picture=(3, 32, 32),
    encode=stacked(image_sizes=(32, 32)),
    needs_transformers="5.23",
    notes="each row sees the keys that an indexer selects; every other layer takes the selection of the one before",
)
def mistral_large4() -> Any:
    from transformers import MistralLarge4Config

    return MistralLarge4Config(
        vision_config=vision("pixtral", image_size=32, head_dim=8),
        text_config=text(
            "mistral_large4_text",
            num_key_value_heads=4,
            kv_lora_rank=16,
            qk_rope_head_dim=8,
            qk_nope_head_dim=8,
            v_head_dim=16,
            indexer_types=["full", "shared"] * 2,
            **EXPERTS,
            **INDEX,
        ),
        image_token_index=IMAGE,
    )


@family(
    "minimax_m3_vl",
    "minimax_m3_vl (sparse blocks)",
    "MiniMaxM3SparseForConditionalGeneration",
    block=BLOCK,
    picture=(PATCHES, 3 * 2 * 4 * 4),
    encode=stacked(joined=True, image_grid_thw=GRID),
    visual_ids=(IMAGE, VIDEO),
    needs_transformers="5.23",
    notes="each row sees the blocks of keys that an indexer selects, in two of four layers",
)
def minimax_m3_vl() -> Any:
    from transformers import MiniMaxM3VLConfig

    language = text(
        "minimax_m3_vl_text",
        head_dim=8,
        rotary_dim=8,
        dense_intermediate_size=64,
        shared_intermediate_size=16,
        intermediate_size=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        mlp_layer_types=["dense", "sparse"] * 2,
        layer_types=["full_attention", "minimax_m3_sparse"] * 2,
        index_n_heads=2,
        index_head_dim=8,
        index_block_size=2,
        index_topk_blocks=4,
    )
    return MiniMaxM3VLConfig(
        text_config=language,
        vision_config=vision(image_size=16, patch_size=4),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        projector_hidden_size=32,
    )


@family(
    "glm5_next",
    "glm5_next (hybrid linear, sparse MLA)",
    "Glm5NextForConditionalGeneration",
    attention=2,
    **QWEN,
    needs_transformers="5.23",
    notes="each row sees the keys that an indexer selects, in two of four layers; several residual streams",
)
def glm5_next() -> Any:
    from transformers import Glm5NextConfig

    return Glm5NextConfig(
        text_config=text(
            "glm5_next_text",
            num_key_value_heads=4,
            kv_lora_rank=16,
            q_lora_rank=16,
            qk_nope_head_dim=8,
            v_head_dim=8,
            linear_head_dim=8,
            linear_num_heads=4,
            hc_mult=2,
            index_kpool=2,
            layer_types=["linear_attention", "indexed_attention"] * 2,
            indexer_types=["full"] * 4,
            mlp_layer_types=["dense", "sparse"] * 2,
            **EXPERTS,
            **INDEX,
        ),
        vision_config=qwen_tower(image_size=16, projection_intermediate_size=32),
        **GLM_IDS,
    )


@family(
    "dots3_note",
    "dots3_note (sparse MLA, sliding layers)",
    "Dots3NoteForConditionalGeneration",
    block=BLOCK,
    picture=(PATCHES, 3 * 4 * 4),
    encode=stacked(joined=True, image_grid_thw=GRID),
    visual_ids=(IMAGE, VIDEO),
    needs_transformers="5.23",
    notes="each row sees the keys that an indexer selects, in two of four layers; head outputs are gated",
)
def dots3_note() -> Any:
    from transformers import Dots3NoteConfig

    return Dots3NoteConfig(
        text_config=text(
            "dots3_note_text",
            num_key_value_heads=4,
            kv_lora_rank=16,
            q_lora_rank=16,
            qk_rope_head_dim=8,
            qk_nope_head_dim=8,
            head_dim=16,
            v_head_dim=8,
            sliding_window=12,
            layer_types=["sliding_attention", "indexed_attention"] * 2,
            shared_experts_intermediate_size=16,
            swa_num_attention_heads=4,
            swa_num_key_value_heads=4,
            swa_q_lora_rank=16,
            swa_kv_lora_rank=16,
            swa_head_dim=16,
            swa_qk_nope_head_dim=8,
            swa_v_head_dim=8,
            **EXPERTS,
            **INDEX,
        ),
        vision_config=vision(
            patch_size=4,
            adapter_in_dim=16,
            adapter_out_dim=32,
            mlp_layer_types=["dense", "sparse"],
            moe_intermediate_size=16,
            num_local_experts=2,
        ),
        audio_config={
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "adapter_input_size": 16,
            "adapter_out_dim": 32,
            "downsample_hidden_size": 8,
            "feature_size": 16,
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        audio_token_id=72,
    )


@family(
    "qwen4_exp",
    "qwen4_exp (hybrid linear, sparse)",
    "Qwen4ExpForConditionalGeneration",
    attention=2,
    **QWEN,
    needs_transformers="5.23",
    notes="each row sees the blocks of keys that an indexer selects, in two of four layers; several residual streams",
)
def qwen4_exp() -> Any:
    from transformers import Qwen4ExpConfig

    language = text(
        "qwen4_exp_text",
        head_dim=8,
        layer_types=["linear_attention", "indexed_attention"] * 2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        num_experts=4,
        num_experts_per_tok=2,
        hc_count=2,
        hc_lowrank=8,
        indexer_n_heads=2,
        indexer_kv_heads=1,
        indexer_head_dim=8,
        indexer_budget=TOPK,
        indexer_compress_ratio=2,
        **rope(mrope_section=[1, 1, 2], partial_rotary_factor=1.0, mrope_interleaved=True),
    )
    del language["intermediate_size"]
    return Qwen4ExpConfig(text_config=language, vision_config=qwen_tower(num_position_embeddings=16), **IDS)


FAMILIES = (
    mistral_large4,
    minimax_m3_vl,
    glm5_next,
    dots3_note,
    qwen4_exp,
)
