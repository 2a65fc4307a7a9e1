"""Families with a plain projector between a vision tower and a decoder: LLaVA and its kin."""

from __future__ import annotations

from typing import Any

import torch
from families_base import (
    BREAK,
    END,
    IMAGE,
    START,
    TAG,
    VIDEO,
    VOCAB_SIZE,
    Pictures,
    family,
    stacked,
    text,
    variant,
    vision,
)
from families_tower import tower

PICTURE = (3, 24, 24)


def _llava(language: dict[str, Any], **changes: Any) -> Any:
    from transformers import LlavaConfig

    return LlavaConfig(
        vision_config=vision("clip_vision_model"),
        text_config=language,
        image_token_index=IMAGE,
        image_seq_length=9,
        vision_feature_layer=-1,
        **changes,
    )


@family(
    "llava",
    "llava (llama)",
    "LlavaForConditionalGeneration",
    block=(IMAGE,) * 9,
    picture=PICTURE,
    encode=stacked(),
    notes="one contiguous block per image",
)
def llava() -> Any:
    return _llava(text())


llava_mistral = variant(
    llava,
    "llava_mistral",
    "llava (mistral, sliding window)",
    config=lambda: _llava(text("mistral", sliding_window=12, head_dim=8)),
    notes="every layer slides (BakLLaVA)",
)
llava_gemma2 = variant(
    llava,
    "llava_gemma2",
    "llava (gemma2, softcap)",
    config=lambda: _llava(
        text("gemma2", head_dim=8, query_pre_attn_scalar=16, sliding_window=12, attn_logit_softcapping=2.0)
    ),
    notes="softcap, alternating sliding layers",
)


@family(
    "pixtral",
    "pixtral (llava)",
    "LlavaForConditionalGeneration",
    block=((IMAGE,) * 3 + (BREAK,)) * 2 + (IMAGE,) * 3 + (END,),
    picture=PICTURE,
    encode=stacked(image_sizes=(24, 24)),
    notes="row breaks between the rows of an image",
)
def pixtral() -> Any:
    from transformers import LlavaConfig

    return LlavaConfig(
        vision_config=vision("pixtral", head_dim=8),
        text_config=text("mistral", sliding_window=None, head_dim=8),
        image_token_index=IMAGE,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )


TILES = (3, *PICTURE)
"""A base view and two tiles of an image of 24 x 48 pixels."""


def _anyres(name: str, **changes: Any) -> Any:
    import transformers

    return getattr(transformers, name)(
        vision_config=vision("clip_vision_model"),
        text_config=text(),
        image_token_index=IMAGE,
        image_grid_pinpoints=[[24, 48], [48, 24]],
        vision_feature_layer=-1,
        **changes,
    )


@family(
    "llava_next",
    "llava_next",
    "LlavaNextForConditionalGeneration",
    block=(IMAGE,) * (9 + 3 * 7),
    picture=TILES,
    encode=stacked(image_sizes=(24, 48)),
    notes="tiles and row ends in one block",
)
def llava_next() -> Any:
    return _anyres("LlavaNextConfig")


@family(
    "llava_next_video",
    "llava_next_video",
    "LlavaNextVideoForConditionalGeneration",
    block=(VIDEO,) * (3 * 4),
    picture=(3, 3, 32, 32),
    encode=stacked("pixel_values_videos"),
    visual_ids=(IMAGE, VIDEO),
    notes="the pictures are videos of three frames",
)
def llava_next_video() -> Any:
    from transformers import LlavaNextVideoConfig

    return LlavaNextVideoConfig(
        vision_config=vision("clip_vision_model", image_size=32),
        text_config=text(),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=[[32, 64]],
        vision_feature_layer=-1,
    )


@family(
    "llava_onevision",
    "llava_onevision",
    "LlavaOnevisionForConditionalGeneration",
    block=(IMAGE,) * (9 + 3 * 7),
    picture=TILES,
    encode=stacked(image_sizes=(24, 48)),
    visual_ids=(IMAGE, VIDEO),
)
def llava_onevision() -> Any:
    from transformers import LlavaOnevisionConfig

    return LlavaOnevisionConfig(
        vision_config=vision("siglip_vision_model", vision_use_head=False),
        text_config=text("qwen2"),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=[[24, 48], [48, 24]],
    )


@family(
    "vipllava",
    "vipllava",
    "VipLlavaForConditionalGeneration",
    block=(IMAGE,) * 9,
    picture=PICTURE,
    encode=stacked(),
    notes="features of two vision layers",
)
def vipllava() -> Any:
    from transformers import VipLlavaConfig

    return VipLlavaConfig(
        vision_config=vision("clip_vision_model"),
        text_config=text(),
        image_token_index=IMAGE,
        vision_feature_layers=[-1, -2],
        vision_feature_layer=[-1, -2],
        image_seq_length=9,
    )


@family(
    "video_llava",
    "video_llava",
    "VideoLlavaForConditionalGeneration",
    block=(IMAGE,) * 9,
    picture=PICTURE,
    encode=stacked("pixel_values_images"),
    visual_ids=(IMAGE, VIDEO),
)
def video_llava() -> Any:
    from transformers import VideoLlavaConfig

    return VideoLlavaConfig(
        vision_config=vision("clip_vision_model"),
        text_config=text(),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        vision_feature_layer=-1,
        image_seq_length=9,
        video_seq_length=36,
    )


def _cohere(name: str, **changes: Any) -> Any:
    import transformers

    return getattr(transformers, name)(
        vision_config=vision("siglip_vision_model", image_size=32, vision_use_head=False),
        text_config=text(
            "cohere2",
            sliding_window=12,
            head_dim=8,
            logit_scale=1.0,
            layer_types=["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"],
        ),
        **changes,
    )


@family(
    "aya_vision",
    "aya_vision",
    "AyaVisionForConditionalGeneration",
    block=(START, TAG, *(IMAGE,) * 4, TAG + 1, *(IMAGE,) * 4, END),
    picture=(2, 3, 32, 32),
    encode=stacked(joined=True),
    notes="tags between the tiles of an image",
)
def aya_vision() -> Any:
    return _cohere("AyaVisionConfig", image_token_index=IMAGE)


@family(
    "cohere2_vision",
    "cohere2_vision",
    "Cohere2VisionForConditionalGeneration",
    block=(START, *(IMAGE,) * 4, BREAK, *(IMAGE,) * 4, END),
    picture=(2, 3, 32, 32),
    encode=stacked(joined=True),
    notes="breaks between the tiles of an image",
)
def cohere2_vision() -> Any:
    return _cohere("Cohere2VisionConfig", image_token_id=IMAGE, alignment_intermediate_size=64)


@family(
    "mistral3",
    "mistral3",
    "Mistral3ForConditionalGeneration",
    block=(IMAGE, IMAGE, BREAK, IMAGE, IMAGE, END),
    picture=(3, 32, 32),
    encode=stacked(image_sizes=(32, 32)),
    notes="row breaks between the rows of an image",
)
def mistral3() -> Any:
    from transformers import Mistral3Config

    return Mistral3Config(
        vision_config=vision("pixtral", image_size=32, head_dim=8),
        text_config=text("mistral", sliding_window=None, head_dim=8),
        image_token_index=IMAGE,
    )


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
    llava,
    llava_mistral,
    llava_gemma2,
    pixtral,
    llava_next,
    llava_next_video,
    llava_onevision,
    vipllava,
    video_llava,
    aya_vision,
    cohere2_vision,
    mistral3,
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
