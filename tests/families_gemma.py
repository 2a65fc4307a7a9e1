"""Gemma's families and others with masks, layers or heads of their own."""

from __future__ import annotations

from typing import Any

import torch
from families_base import (
    BREAK,
    END,
    IMAGE,
    PAD,
    START,
    TAG,
    VIDEO,
    VOCAB_SIZE,
    Pictures,
    family,
    stacked,
    text,
    token_types,
    vision,
)
from families_tower import tower

PICTURE = (3, 24, 24)


def _pali_types(ids: torch.Tensor, mask: torch.Tensor, pictures: Pictures) -> dict[str, torch.Tensor]:
    """Zeros: the whole prompt is a prefix, as the processor says outside training."""
    return {"token_type_ids": torch.zeros_like(ids)}


def _paligemma(language: dict[str, Any]) -> Any:
    from transformers import PaliGemmaConfig

    return PaliGemmaConfig(
        vision_config=vision("siglip_vision_model", vision_use_head=False, projection_dim=32),
        text_config=language,
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


@family(
    "paligemma",
    "paligemma (gemma)",
    "PaliGemmaForConditionalGeneration",
    **PALIGEMMA,
    notes="image and prompt see each other",
)
def paligemma() -> Any:
    return _paligemma(text("gemma", head_dim=8))


@family(
    "paligemma2",
    "paligemma2 (gemma2)",
    "PaliGemmaForConditionalGeneration",
    **PALIGEMMA,
    notes="image and prompt see each other; softcap, sliding layers",
)
def paligemma2() -> Any:
    return _paligemma(
        text("gemma2", head_dim=8, query_pre_attn_scalar=16, sliding_window=12, attn_logit_softcapping=2.0)
    )


@family(
    "gemma3",
    "gemma3",
    "Gemma3ForConditionalGeneration",
    block=(START, *(IMAGE,) * 4, END),
    picture=(3, 16, 16),
    encode=stacked(),
    annotate=token_types("token_type_ids"),
    notes="image tokens see each other; every other layer slides",
)
def gemma3() -> Any:
    from transformers import Gemma3Config

    return Gemma3Config(
        text_config=text(
            "gemma3_text",
            head_dim=8,
            query_pre_attn_scalar=8,
            sliding_window=12,
            layer_types=["sliding_attention", "full_attention"] * 2,
        ),
        vision_config=vision("siglip_vision_model", image_size=16, patch_size=4, vision_use_head=False),
        mm_tokens_per_image=4,
        image_token_index=IMAGE,
        boi_token_index=START,
        eoi_token_index=END,
    )


GEMMA3N_IMAGE = 97


@family(
    "gemma3n",
    "gemma3n",
    "Gemma3nForConditionalGeneration",
    attention=5,
    block=(START, *(GEMMA3N_IMAGE,) * 9, END),
    picture=PICTURE,
    encode=stacked(),
    visual_ids=(GEMMA3N_IMAGE,),
    notes="four residual streams, shared keys in the last layers; stand-in vision tower",
)
def gemma3n() -> Any:
    from transformers import Gemma3nConfig

    audio = {
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
    }
    return Gemma3nConfig(
        text_config=text(
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
        vision_config=tower(layout="map", vocab_size=8, vocab_offset=96, rms_norm_eps=1e-6),
        audio_config=audio,
        vision_soft_tokens_per_image=9,
        image_token_id=GEMMA3N_IMAGE,
        boi_token_id=START,
        eoi_token_id=END,
        boa_token_id=TAG,
        eoa_token_id=TAG + 1,
        audio_token_id=105,
    )


@family(
    "gemma4",
    "gemma4",
    "Gemma4ForConditionalGeneration",
    block=(START, *(IMAGE,) * 4, END),
    picture=(16, 3 * 4 * 4),
    encode=stacked(image_position_ids=[[column, row] for row in range(4) for column in range(4)]),
    annotate=token_types("mm_token_type_ids"),
    visual_ids=(IMAGE, VIDEO),
    needs_transformers="5.10",
    notes="image tokens see each other; head sizes differ by layer; shared keys in the last two layers, which read "
    "only the last row of a prompt",
)
def gemma4() -> Any:
    from transformers import Gemma4Config

    return Gemma4Config(
        text_config=text(
            "gemma4_text",
            head_dim=8,
            global_head_dim=16,
            num_kv_shared_layers=2,
            layer_types=["sliding_attention", "full_attention"] * 2,
            sliding_window=12,
            vocab_size_per_layer_input=VOCAB_SIZE,
            hidden_size_per_layer_input=8,
            use_bidirectional_attention="vision",
        ),
        vision_config=vision(
            patch_size=4, num_key_value_heads=2, head_dim=8, pooling_kernel_size=2, position_embedding_size=16
        ),
        audio_config=None,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        audio_token_id=72,
        boi_token_id=START,
        eoi_token_id=END,
    )


@family(
    "llama4",
    "llama4",
    "Llama4ForConditionalGeneration",
    block=(START, *(IMAGE,) * 4, BREAK, *(IMAGE,) * 4, END),
    picture=(2, 3, 16, 16),
    encode=stacked(joined=True),
    notes="chunked attention, layers without rotary positions, mixture of experts",
)
def llama4() -> Any:
    from transformers import Llama4Config

    return Llama4Config(
        text_config=text(
            "llama4_text",
            head_dim=8,
            intermediate_size_mlp=64,
            num_local_experts=4,
            num_experts_per_tok=1,
            interleave_moe_layer_step=2,
            attention_chunk_size=16,
            no_rope_layer_interval=4,
        ),
        vision_config=vision(
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
    )


def _encode_phi4(pictures: Pictures) -> dict[str, torch.Tensor]:
    every = torch.stack([picture for sample in pictures for picture in sample])
    return {
        "image_pixel_values": every,
        "image_sizes": torch.tensor([[16, 32]] * len(every)),
        "image_attention_mask": torch.ones(*every.shape[:2], 4, 4),
    }


@family(
    "phi4_multimodal",
    "phi4_multimodal",
    "Phi4MultimodalForCausalLM",
    block=(IMAGE,) * (2 * 5 + 1 + 2 * 3),
    picture=(3, 3, 16, 16),
    encode=_encode_phi4,
    notes="the image id is in vision_config; fused projections",
)
def phi4_multimodal() -> Any:
    from transformers import Phi4MultimodalConfig

    language = text()
    del language["model_type"]
    return Phi4MultimodalConfig(
        **language,
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


@family(
    "molmo2",
    "molmo2",
    "Molmo2ForConditionalGeneration",
    block=(START, IMAGE, IMAGE, BREAK, IMAGE, IMAGE, BREAK, END, TAG, IMAGE, IMAGE, BREAK, IMAGE, IMAGE, BREAK, END),
    picture=(2, 16, 3 * 4 * 4),
    encode=_encode_molmo2,
    annotate=token_types("mm_token_type_ids"),
    needs_transformers="5.10",
    notes="image tokens see each other, also across images; row ends between them; features are added to embeddings",
)
def molmo2() -> Any:
    from transformers import Molmo2Config

    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8}
    return Molmo2Config(
        text_config=text("molmo2_text", head_dim=8, additional_vocab_size=8, rope_scaling_layers=[0, 1, 2, 3]),
        vision_config=vision(image_size=[16, 16], patch_size=4, num_position_embeddings=16, **heads),
        adapter_config={
            "vision_feature_layer": [-1, -2],
            "hidden_size": 16,
            "intermediate_size": 32,
            "text_hidden_size": 32,
            **heads,
        },
        image_start_token_id=START,
        low_res_image_start_token_id=TAG,
        image_end_token_id=END,
        image_patch_id=IMAGE,
        frame_start_token_id=85,
        frame_end_token_id=86,
    )


def _encode_minicpm(pictures: Pictures) -> dict[str, torch.Tensor]:
    every = [picture for sample in pictures for picture in sample]
    return {
        "pixel_values": torch.cat(every, dim=-1)[None],
        "target_sizes": torch.tensor([[4, 4], [4, 8]] * len(every), dtype=torch.int32),
    }


@family(
    "minicpmv4_6",
    "minicpmv4_6",
    "MiniCPMV4_6ForConditionalGeneration",
    block=(START, IMAGE, END, TAG, IMAGE, IMAGE, TAG + 1),
    picture=(3, 4, 4 * (16 + 32)),
    encode=_encode_minicpm,
    visual_ids=(IMAGE, VIDEO),
    needs_transformers="5.10",
    notes="a view and slices, each wrapped",
)
def minicpmv4_6() -> Any:
    from transformers import MiniCPMV4_6Config

    return MiniCPMV4_6Config(
        text_config=text("qwen3", head_dim=8),
        vision_config=vision(image_size=32, patch_size=4),
        insert_layer_id=0,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
    )


FAMILIES = (
    paligemma,
    paligemma2,
    gemma3,
    gemma3n,
    gemma4,
    llama4,
    phi4_multimodal,
    molmo2,
    minicpmv4_6,
)
