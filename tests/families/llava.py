"""Families with a plain projector between a vision tower and a decoder: LLaVA and its kin."""

from __future__ import annotations

from typing import Any

from families.base import (
    BREAK,
    END,
    IMAGE,
    PICTURE,
    START,
    TAG,
    VIDEO,
    family,
    stacked,
    text,
    variant,
    vision,
)


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
)
