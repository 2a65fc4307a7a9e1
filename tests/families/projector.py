"""Families with a vision tower of their own and a plain projector: InternVL, Janus, Ovis2 and others."""

from __future__ import annotations

from typing import Any

import torch

from families.base import (
    END,
    IMAGE,
    PICTURE,
    START,
    VIDEO,
    VOCAB_SIZE,
    Pictures,
    family,
    stacked,
    text,
    vision,
)
from families.tower import tower


@family(
    "got_ocr2",
    "got_ocr2",
    "GotOcr2ForConditionalGeneration",
    block=(START, *(IMAGE,) * 4, END),
    picture=(3, 32, 32),
    encode=stacked(),
    notes="the vision tower does not use the attention interface",
)
def got_ocr2() -> Any:
    from transformers import GotOcr2Config

    tower_config = vision(image_size=32, patch_size=4, output_channels=16, mlp_dim=32, window_size=4)
    tower_config["global_attn_indexes"] = [1]
    del tower_config["intermediate_size"]
    return GotOcr2Config(
        vision_config=tower_config, text_config=text("qwen2"), image_token_index=IMAGE, image_seq_length=4
    )


@family(
    "internvl",
    "internvl",
    "InternVLForConditionalGeneration",
    block=(START, *(IMAGE,) * 8, END),
    picture=(2, 3, 16, 16),
    encode=stacked(joined=True),
    notes="two tiles per image",
)
def internvl() -> Any:
    from transformers import InternVLConfig

    return InternVLConfig(
        vision_config=vision(image_size=[16, 16], patch_size=[4, 4]),
        text_config=text("qwen2"),
        image_token_id=IMAGE,
        image_seq_length=4,
    )


@family(
    "janus",
    "janus",
    "JanusForConditionalGeneration",
    block=(START, *(IMAGE,) * 9, END),
    picture=PICTURE,
    encode=stacked(),
)
def janus() -> Any:
    from transformers import JanusConfig

    tower_config = vision(projection_dim=32, num_image_tokens=9, mlp_ratio=2.0)
    del tower_config["intermediate_size"]
    return JanusConfig(
        text_config=text(),
        vision_config=tower_config,
        vq_config={
            "embed_dim": 8,
            "num_embeddings": 16,
            "latent_channels": 16,
            "base_channels": 32,
            "channel_multiplier": [1, 1],
            "num_res_blocks": 1,
            "num_patches": 4,
            "projection_dim": 32,
            "image_token_embed_dim": 32,
        },
        image_token_id=IMAGE,
    )


@family(
    "deepseek_vl",
    "deepseek_vl",
    "DeepseekVLForConditionalGeneration",
    block=(IMAGE,) * 9,
    picture=PICTURE,
    encode=stacked(),
)
def deepseek_vl() -> Any:
    from transformers import DeepseekVLConfig

    return DeepseekVLConfig(
        text_config=text(),
        vision_config=vision("siglip_vision_model", vision_use_head=False),
        image_token_id=IMAGE,
    )


INDICATORS = (80, 81, 82, 83, 84)


@family(
    "ovis2",
    "ovis2",
    "Ovis2ForConditionalGeneration",
    block=(INDICATORS[0], *(IMAGE,) * 9, INDICATORS[1], INDICATORS[4]),
    picture=PICTURE,
    encode=stacked(),
    visual_ids=(IMAGE, *INDICATORS),
    notes="indicator ids around an image have visual embeddings too",
)
def ovis2() -> Any:
    from transformers import Ovis2Config

    return Ovis2Config(
        text_config=text("qwen2"),
        vision_config=vision(vocab_size=32),
        image_token_id=IMAGE,
        visual_indicator_token_ids=list(INDICATORS),
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
    )


@family(
    "aria",
    "aria",
    "AriaForConditionalGeneration",
    block=(IMAGE,) * 4,
    picture=PICTURE,
    encode=stacked(),
    notes="mixture of experts",
)
def aria() -> Any:
    from transformers import AriaConfig

    return AriaConfig(
        text_config=text(
            "aria_text", moe_num_experts=4, moe_topk=2, moe_num_shared_experts=1, head_dim=8, intermediate_size=32
        ),
        vision_config=vision("idefics3_vision"),
        projector_patch_to_query_dict={9: 4},
        image_token_index=IMAGE,
    )


@family(
    "perception_lm",
    "perception_lm",
    "PerceptionLMForConditionalGeneration",
    block=(IMAGE,) * 18,
    picture=(2, *PICTURE),
    encode=stacked(),
    visual_ids=(IMAGE, VIDEO),
    notes="stand-in vision tower",
)
def perception_lm() -> Any:
    from transformers import PerceptionLMConfig

    return PerceptionLMConfig(
        vision_config=tower(layout="tokens", first_token=True, model_args={"embed_dim": 16}),
        text_config=text(),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
    )


@family(
    "fast_vlm",
    "fast_vlm",
    "FastVlmForConditionalGeneration",
    block=(IMAGE,) * 9,
    picture=PICTURE,
    encode=stacked(),
    needs_transformers="5.0",
    notes="stand-in vision tower",
)
def fast_vlm() -> Any:
    from transformers import FastVlmConfig

    return FastVlmConfig(
        vision_config=tower(layout="map"), text_config=text("qwen2"), image_token_index=IMAGE, image_seq_length=9
    )


def _encode_lfm2(pictures: Pictures) -> dict[str, torch.Tensor]:
    every = torch.stack([picture for sample in pictures for picture in sample])
    return {
        "pixel_values": every,
        "spatial_shapes": torch.tensor([[4, 4]] * len(every)),
        "pixel_attention_mask": torch.ones(every.shape[:2], dtype=torch.long),
    }


@family(
    "lfm2_vl",
    "lfm2_vl (hybrid convolution)",
    "Lfm2VlForConditionalGeneration",
    attention=2,
    block=(START, *(IMAGE,) * 4, END),
    picture=(16, 3 * 8 * 8),
    encode=_encode_lfm2,
    notes="attention in two of four layers",
)
def lfm2_vl() -> Any:
    from transformers import Lfm2VlConfig

    tower_config = vision("siglip2_vision_model", num_patches=16, vision_use_head=False)
    del tower_config["image_size"]
    return Lfm2VlConfig(
        vision_config=tower_config,
        text_config=text(
            "lfm2",
            layer_types=["conv", "full_attention", "conv", "full_attention"],
            block_auto_adjust_ff_dim=False,
            conv_L_cache=3,
        ),
        image_token_id=IMAGE,
        projector_hidden_size=32,
        downsample_factor=2,
    )


FAMILIES = (
    got_ocr2,
    internvl,
    janus,
    deepseek_vl,
    ovis2,
    aria,
    perception_lm,
    fast_vlm,
    lfm2_vl,
)
