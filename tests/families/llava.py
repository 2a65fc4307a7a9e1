"""Families with a plain projector between a vision tower and a decoder: LLaVA and its kin."""

from __future__ import annotations

from functools import partial

from families.base import (
    BREAK,
    END,
    IMAGE,
    PICTURE,
    START,
    TAG,
    VIDEO,
    family,
    gemma2_text,
    parts,
    stacked,
    text,
    variant,
    vision,
)

_llava = partial(
    parts,
    "LlavaConfig",
    vision=vision("clip_vision_model"),
    image_token_index=IMAGE,
    image_seq_length=9,
    vision_feature_layer=-1,
)

llava = family(
    "llava",
    "LlavaForConditionalGeneration",
    title="llava (llama)",
    notes="one contiguous block per image",
    config=_llava(text()),
)

llava_mistral = variant(
    llava,
    "llava_mistral",
    "llava (mistral, sliding window)",
    config=_llava(text("mistral", sliding_window=12, head_dim=8)),
    notes="every layer slides (BakLLaVA)",
)
llava_gemma2 = variant(
    llava,
    "llava_gemma2",
    "llava (gemma2, softcap)",
    config=_llava(gemma2_text()),
    notes="softcap, alternating sliding layers",
)

pixtral = family(
    "pixtral",
    "LlavaForConditionalGeneration",
    title="pixtral (llava)",
    block=((IMAGE,) * 3 + (BREAK,)) * 2 + (IMAGE,) * 3 + (END,),
    encode=stacked(image_sizes=(24, 24)),
    notes="row breaks between the rows of an image",
    config=parts(
        "LlavaConfig",
        text("mistral", sliding_window=None, head_dim=8),
        vision("pixtral", head_dim=8),
        image_token_index=IMAGE,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    ),
)


ANYRES = {
    "block": (IMAGE,) * (9 + 3 * 7),
    "picture": (3, *PICTURE),
    "encode": stacked(image_sizes=(24, 48)),
}
"""A base view and two tiles of an image of 24 x 48 pixels, with row ends."""

llava_next = family(
    "llava_next",
    "LlavaNextForConditionalGeneration",
    **ANYRES,
    notes="tiles and row ends in one block",
    config=parts(
        "LlavaNextConfig",
        text(),
        vision("clip_vision_model"),
        image_token_index=IMAGE,
        image_grid_pinpoints=[[24, 48], [48, 24]],
        vision_feature_layer=-1,
    ),
)

llava_next_video = family(
    "llava_next_video",
    "LlavaNextVideoForConditionalGeneration",
    block=(VIDEO,) * (3 * 4),
    picture=(3, 3, 32, 32),
    encode=stacked("pixel_values_videos"),
    visual_ids=(IMAGE, VIDEO),
    notes="the pictures are videos of three frames",
    config=parts(
        "LlavaNextVideoConfig",
        text(),
        vision("clip_vision_model", image_size=32),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=[[32, 64]],
        vision_feature_layer=-1,
    ),
)

llava_onevision = family(
    "llava_onevision",
    "LlavaOnevisionForConditionalGeneration",
    **ANYRES,
    visual_ids=(IMAGE, VIDEO),
    config=parts(
        "LlavaOnevisionConfig",
        text("qwen2"),
        vision("siglip_vision_model", vision_use_head=False),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=[[24, 48], [48, 24]],
    ),
)

vipllava = family(
    "vipllava",
    "VipLlavaForConditionalGeneration",
    notes="features of two vision layers",
    config=parts(
        "VipLlavaConfig",
        text(),
        vision("clip_vision_model"),
        image_token_index=IMAGE,
        vision_feature_layers=[-1, -2],
        vision_feature_layer=[-1, -2],
        image_seq_length=9,
    ),
)

video_llava = family(
    "video_llava",
    "VideoLlavaForConditionalGeneration",
    encode=stacked("pixel_values_images"),
    visual_ids=(IMAGE, VIDEO),
    config=parts(
        "VideoLlavaConfig",
        text(),
        vision("clip_vision_model"),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        vision_feature_layer=-1,
        image_seq_length=9,
        video_seq_length=36,
    ),
)


_cohere = partial(
    parts,
    text=text(
        "cohere2",
        sliding_window=12,
        head_dim=8,
        logit_scale=1.0,
        layer_types=["sliding_attention"] * 3 + ["full_attention"],
    ),
    vision=vision("siglip_vision_model", image_size=32, vision_use_head=False),
)

aya_vision = family(
    "aya_vision",
    "AyaVisionForConditionalGeneration",
    block=(START, TAG, *(IMAGE,) * 4, TAG + 1, *(IMAGE,) * 4, END),
    picture=(2, 3, 32, 32),
    encode=stacked(joined=True),
    notes="tags between the tiles of an image",
    config=_cohere("AyaVisionConfig", image_token_index=IMAGE),
)

cohere2_vision = family(
    "cohere2_vision",
    "Cohere2VisionForConditionalGeneration",
    block=(START, *(IMAGE,) * 4, BREAK, *(IMAGE,) * 4, END),
    picture=(2, 3, 32, 32),
    encode=stacked(joined=True),
    notes="breaks between the tiles of an image",
    config=_cohere("Cohere2VisionConfig", image_token_id=IMAGE, alignment_intermediate_size=64),
)

mistral3 = family(
    "mistral3",
    "Mistral3ForConditionalGeneration",
    block=(IMAGE, IMAGE, BREAK, IMAGE, IMAGE, END),
    picture=(3, 32, 32),
    encode=stacked(image_sizes=(32, 32)),
    notes="row breaks between the rows of an image",
    config=parts(
        "Mistral3Config",
        text("mistral", sliding_window=None, head_dim=8),
        vision("pixtral", image_size=32, head_dim=8),
        image_token_index=IMAGE,
    ),
)
