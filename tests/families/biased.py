"""Families with biases of position, convolutions before attention, or states beside it: Inkling, Nemotron."""

from __future__ import annotations

from families.base import END, IMAGE, MEDIA, START, VIDEO, family, parts, stacked, text, vision
from families.qwen import GRID, PATCHES

SHORT = {
    "head_dim": 8,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 8,
    "sliding_window_size": 12,
    "d_rel": 4,
    "rel_extent": 16,
    "conv_kernel_size": 3,
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "unpadded_vocab_size": 96,
    "layer_types": ["hybrid_sliding", "hybrid"] * 2,
}


inkling = family(
    "inkling",
    "InklingForConditionalGeneration",
    title="inkling (position bias, sliding layers)",
    block=(START, *(IMAGE,) * 4, END),
    picture=(4, 2, 4, 4, 3),
    encode=stacked(joined=True),
    needs_transformers="5.23",
    notes="position biases; convolutions before the attention; every other layer slides",
    config=parts(
        "InklingConfig",
        text("inkling_text", **SHORT, mlp_layer_types=["dense", "sparse"] * 2, logits_mup_width_multiplier=1.0),
        {"patch_size": 4, "temporal_patch_size": 2, "hidden_size": 16, "num_hidden_layers": 6},
        audio_config={"n_mel_bins": 4, "mel_vocab_size": 8},
        image_token_id=IMAGE,
        audio_token_id=72,
        image_bos_token_id=START,
        audio_bos_token_id=73,
    ),
)

inkling2 = family(
    "inkling2",
    "Inkling2ForConditionalGeneration",
    title="inkling2 (position bias, sliding layers)",
    block=(START, *(IMAGE,) * 4, END),
    picture=(4, 8, 8, 3),
    encode=stacked(joined=True, image_grid_thw=(1, 2, 2)),
    needs_transformers="5.23",
    notes="position biases; convolutions before the attention; every other layer slides; learned sinks",
    config=parts(
        "Inkling2Config",
        text("inkling2_text", **SHORT, n_layers_per_attn_res_block=2),
        {
            **vision(patch_size=4, posemb_grid_size=4, projection_hidden_dim=32, text_hidden_size=32),
            "model_type": "inkling2_vision",
        },
        image_token_id=IMAGE,
    ),
)

nemotron_h_omni = family(
    "nemotron_h_omni",
    "NemotronH_Omni_Reasoning_V3",
    title="nemotron_h_omni (hybrid Mamba)",
    attention=2,
    block=(START, *(IMAGE,) * 4, END),
    picture=(PATCHES, 3 * 4 * 4),
    encode=stacked(joined=True, image_grid_hw=GRID[1:]),
    visual_ids=(IMAGE, VIDEO),
    needs_transformers="5.23",
    notes="layers of Mamba, attention, experts and MLPs",
    config=parts(
        "NemotronH_Omni_Reasoning_V3_Config",
        text(
            "nemotron_h",
            head_dim=8,
            layers_block_type=["linear_attention", "full_attention", "mlp", "full_attention"],
            ssm_state_size=8,
            mamba_num_heads=4,
            mamba_head_dim=8,
            n_groups=2,
            chunk_size=8,
            mlp_hidden_act="silu",
            use_mamba_kernels=False,
            n_routed_experts=4,
            moe_intermediate_size=16,
            moe_shared_expert_intermediate_size=16,
        ),
        {
            "model_type": "radio",
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "patch_size": 4,
            "image_size": 16,
            "max_img_size": 32,
            "num_cls_tokens": 1,
            "num_registers": 1,
            "summary_idxs": [0],
            "video_temporal_patch_size": 2,
            "torch_dtype": "float32",
        },
        audio_config=None,
        vision_hidden_size=16,
        projector_hidden_size=32,
        **MEDIA,
    ),
)
