"""Families whose attention sees only the keys that a sparse indexer selects."""

from __future__ import annotations

from families.base import BREAK, END, IMAGE, MEDIA, VIDEO, family, parts, stacked, text, vision, without
from families.qwen import GLM_IDS, GRIDDED, IDS, LINEAR, PATCHES, QWEN, qwen_tower

TOPK = 8
"""How many keys a row sees; the tiny prompts are longer."""
LATENT = {"num_key_value_heads": 4, "kv_lora_rank": 16, "qk_nope_head_dim": 8}
EXPERTS = {"moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1}
INDEX = {"index_topk": TOPK, "index_head_dim": 8, "index_n_heads": 16}
"""So many heads that no key scores zero with all of them: ties would be broken differently from call to call."""


mistral_large4 = family(
    "mistral_large4",
    "MistralLarge4ForConditionalGeneration",
    title="mistral_large4 (sparse MLA)",
    block=(IMAGE, IMAGE, BREAK, IMAGE, IMAGE, END),
    picture=(3, 32, 32),
    encode=stacked(image_sizes=(32, 32)),
    needs_transformers="5.23",
    notes="each row sees the keys that an indexer selects; every other layer takes the selection of the one before",
    config=parts(
        "MistralLarge4Config",
        text(
            "mistral_large4_text",
            qk_rope_head_dim=8,
            v_head_dim=16,
            **LATENT,
            indexer_types=["full", "shared"] * 2,
            **EXPERTS,
            **INDEX,
        ),
        vision("pixtral", image_size=32, head_dim=8),
        image_token_index=IMAGE,
    ),
)

minimax_m3_vl = family(
    "minimax_m3_vl",
    "MiniMaxM3SparseForConditionalGeneration",
    title="minimax_m3_vl (sparse blocks)",
    **GRIDDED,
    needs_transformers="5.23",
    notes="each row sees the blocks of keys that an indexer selects, in two of four layers",
    config=parts(
        "MiniMaxM3VLConfig",
        text(
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
        ),
        vision(image_size=16, patch_size=4),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        projector_hidden_size=32,
    ),
)

glm5_next = family(
    "glm5_next",
    "Glm5NextForConditionalGeneration",
    title="glm5_next (hybrid linear, sparse MLA)",
    attention=2,
    **QWEN,
    needs_transformers="5.23",
    notes="each row sees the keys that an indexer selects, in two of four layers; several residual streams",
    config=parts(
        "Glm5NextConfig",
        text(
            "glm5_next_text",
            q_lora_rank=16,
            v_head_dim=8,
            **LATENT,
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
        qwen_tower(image_size=16, projection_intermediate_size=32),
        **GLM_IDS,
    ),
)

dots3_note = family(
    "dots3_note",
    "Dots3NoteForConditionalGeneration",
    title="dots3_note (sparse MLA, sliding layers)",
    **{**GRIDDED, "picture": (PATCHES, 3 * 4 * 4)},
    needs_transformers="5.23",
    notes="each row sees the keys that an indexer selects, in two of four layers; head outputs are gated",
    config=parts(
        "Dots3NoteConfig",
        text(
            "dots3_note_text",
            q_lora_rank=16,
            qk_rope_head_dim=8,
            **LATENT,
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
        vision(
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
        **MEDIA,
        audio_token_id=72,
    ),
)

qwen4_exp = family(
    "qwen4_exp",
    "Qwen4ExpForConditionalGeneration",
    title="qwen4_exp (hybrid linear, sparse)",
    attention=2,
    **QWEN,
    needs_transformers="5.23",
    notes="each row sees the blocks of keys that an indexer selects, in two of four layers; several residual streams",
    config=parts(
        "Qwen4ExpConfig",
        without(
            text(
                "qwen4_exp_text",
                head_dim=8,
                layer_types=["linear_attention", "indexed_attention"] * 2,
                **LINEAR,
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
            ),
            "intermediate_size",
        ),
        qwen_tower(num_position_embeddings=16),
        **IDS,
    ),
)
