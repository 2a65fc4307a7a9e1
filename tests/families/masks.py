"""Families with masks, chunks or slices of their own: Llama 4, Phi-4, Molmo 2, MiniCPM-V."""

from __future__ import annotations

import torch

from families.base import (
    BREAK,
    END,
    IMAGE,
    MEDIA,
    PAD,
    START,
    TAG,
    VIDEO,
    Pictures,
    family,
    parts,
    stacked,
    text,
    token_types,
    vision,
    without,
)

llama4 = family(
    "llama4",
    "Llama4ForConditionalGeneration",
    block=(START, *(IMAGE,) * 4, BREAK, *(IMAGE,) * 4, END),
    picture=(2, 3, 16, 16),
    encode=stacked(joined=True),
    notes="chunked attention, layers without rotary positions, mixture of experts",
    config=parts(
        "Llama4Config",
        text(
            "llama4_text",
            head_dim=8,
            intermediate_size_mlp=64,
            num_local_experts=4,
            num_experts_per_tok=1,
            interleave_moe_layer_step=2,
            attention_chunk_size=16,
            no_rope_layer_interval=4,
        ),
        vision(
            image_size=16,
            patch_size=4,
            intermediate_size=64,
            vision_output_dim=32,
            projector_input_dim=32,
            projector_output_dim=32,
        ),
        image_token_index=IMAGE,
        boi_token_index=START,
        eoi_token_index=END,
        pad_token_id=PAD,
    ),
)


phi4_multimodal = family(
    "phi4_multimodal",
    "Phi4MultimodalForCausalLM",
    block=(IMAGE,) * (2 * 5 + 1 + 2 * 3),
    picture=(3, 3, 16, 16),
    encode=stacked("image_pixel_values", image_sizes=(16, 32), image_attention_mask=torch.ones(3, 4, 4).tolist()),
    notes="the image id is in vision_config; fused projections",
    config=parts(
        "Phi4MultimodalConfig",
        **without(text(), "model_type"),
        original_max_position_embeddings=512,
        vision_config=vision(image_size=16, patch_size=4, crop_size=16, image_token_id=IMAGE, feature_layer=-2),
        audio_config={
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_blocks": 1,
            "num_attention_heads": 2,
            "input_size": 8,
            "nemo_conv_channels": 8,
            "ext_pw_out_channel": 16,
            "depthwise_separable_out_channel": 16,
            "audio_token_id": 72,
            "feature_layer": -2,
        },
    ),
)


def _encode_molmo2(pictures: Pictures) -> dict[str, torch.Tensor]:
    every = [picture for sample in pictures for picture in sample]
    pools = [[row * 4 + column for row in (r, r + 1) for column in (c, c + 1)] for r in (0, 2) for c in (0, 2)]
    pooling = [[16 * crop + index for index in pool] for crop in range(2 * len(every)) for pool in pools]
    return {
        "pixel_values": torch.cat(every),
        "image_token_pooling": torch.tensor(pooling),
        "image_grids": torch.tensor([[2, 2, 2, 2]] * len(every)),
        "image_num_crops": torch.tensor([2] * len(every)),
    }


HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8}

molmo2 = family(
    "molmo2",
    "Molmo2ForConditionalGeneration",
    block=(START, IMAGE, IMAGE, BREAK, IMAGE, IMAGE, BREAK, END, TAG, IMAGE, IMAGE, BREAK, IMAGE, IMAGE, BREAK, END),
    picture=(2, 16, 3 * 4 * 4),
    encode=_encode_molmo2,
    annotate=token_types("mm_token_type_ids"),
    needs_transformers="5.10",
    notes="image tokens see each other, also across images; row ends between them; features are added to embeddings",
    config=parts(
        "Molmo2Config",
        text("molmo2_text", head_dim=8, additional_vocab_size=8, rope_scaling_layers=[0, 1, 2, 3]),
        vision(image_size=[16, 16], patch_size=4, num_position_embeddings=16, **HEADS),
        adapter_config={
            "vision_feature_layer": [-1, -2],
            "hidden_size": 16,
            "intermediate_size": 32,
            "text_hidden_size": 32,
            **HEADS,
        },
        image_start_token_id=START,
        low_res_image_start_token_id=TAG,
        image_end_token_id=END,
        image_patch_id=IMAGE,
        frame_start_token_id=85,
        frame_end_token_id=86,
    ),
)


def _encode_minicpm(pictures: Pictures) -> dict[str, torch.Tensor]:
    every = [picture for sample in pictures for picture in sample]
    return {
        "pixel_values": torch.cat(every, dim=-1)[None],
        "target_sizes": torch.tensor([[4, 4], [4, 8]] * len(every), dtype=torch.int32),
    }


minicpmv4_6 = family(
    "minicpmv4_6",
    "MiniCPMV4_6ForConditionalGeneration",
    block=(START, IMAGE, END, TAG, IMAGE, IMAGE, TAG + 1),
    picture=(3, 4, 4 * (16 + 32)),
    encode=_encode_minicpm,
    visual_ids=(IMAGE, VIDEO),
    needs_transformers="5.10",
    notes="a view and slices, each wrapped",
    config=parts(
        "MiniCPMV4_6Config",
        text("qwen3", head_dim=8),
        vision(image_size=32, patch_size=4),
        insert_layer_id=0,
        **MEDIA,
    ),
)
