"""Families with a vision tower of their own and a plain projector: InternVL, Janus, Ovis2 and others."""

from __future__ import annotations

from functools import partial

from families.base import (
    END,
    IMAGE,
    MEDIA,
    PICTURE,
    START,
    VIDEO,
    VOCAB_SIZE,
    family,
    parts,
    sam_tower,
    stacked,
    text,
    vision,
    without,
)
from families.tower import tower

got_ocr2 = family(
    "got_ocr2",
    "GotOcr2ForConditionalGeneration",
    block=(START, *(IMAGE,) * 4, END),
    picture=(3, 32, 32),
    notes="the vision tower does not use the attention interface",
    config=parts(
        "GotOcr2Config",
        text("qwen2"),
        sam_tower(),
        image_token_index=IMAGE,
        image_seq_length=4,
    ),
)

internvl_config = partial(
    parts, vision=vision(image_size=[16, 16], patch_size=[4, 4]), image_token_id=IMAGE, image_seq_length=4
)

internvl = family(
    "internvl",
    "InternVLForConditionalGeneration",
    block=(START, *(IMAGE,) * 8, END),
    picture=(2, 3, 16, 16),
    encode=stacked(joined=True),
    notes="two tiles per image",
    config=internvl_config("InternVLConfig", text("qwen2")),
)

janus = family(
    "janus",
    "JanusForConditionalGeneration",
    block=(START, *(IMAGE,) * 9, END),
    config=parts(
        "JanusConfig",
        text(),
        without(vision(projection_dim=32, num_image_tokens=9, mlp_ratio=2.0), "intermediate_size"),
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
    ),
)

deepseek_vl = family(
    "deepseek_vl",
    "DeepseekVLForConditionalGeneration",
    config=parts(
        "DeepseekVLConfig", text(), vision("siglip_vision_model", vision_use_head=False), image_token_id=IMAGE
    ),
)


INDICATORS = (80, 81, 82, 83, 84)

ovis2 = family(
    "ovis2",
    "Ovis2ForConditionalGeneration",
    block=(INDICATORS[0], *(IMAGE,) * 9, INDICATORS[1], INDICATORS[4]),
    visual_ids=(IMAGE, *INDICATORS),
    notes="indicator ids around an image have visual embeddings too",
    config=parts(
        "Ovis2Config",
        text("qwen2"),
        vision(vocab_size=32),
        image_token_id=IMAGE,
        visual_indicator_token_ids=list(INDICATORS),
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
    ),
)

aria = family(
    "aria",
    "AriaForConditionalGeneration",
    block=(IMAGE,) * 4,
    notes="mixture of experts",
    config=parts(
        "AriaConfig",
        text("aria_text", moe_num_experts=4, moe_topk=2, moe_num_shared_experts=1, head_dim=8, intermediate_size=32),
        vision("idefics3_vision"),
        projector_patch_to_query_dict={9: 4},
        image_token_index=IMAGE,
    ),
)

perception_lm = family(
    "perception_lm",
    "PerceptionLMForConditionalGeneration",
    block=(IMAGE,) * 18,
    picture=(2, *PICTURE),
    visual_ids=(IMAGE, VIDEO),
    notes="stand-in vision tower",
    config=parts(
        "PerceptionLMConfig",
        text(),
        lambda: tower(layout="tokens", first_token=True, model_args={"embed_dim": 16}),
        **MEDIA,
    ),
)

fast_vlm = family(
    "fast_vlm",
    "FastVlmForConditionalGeneration",
    needs_transformers="5.0",
    notes="stand-in vision tower",
    config=parts(
        "FastVlmConfig", text("qwen2"), lambda: tower(layout="map"), image_token_index=IMAGE, image_seq_length=9
    ),
)


lfm2_vl = family(
    "lfm2_vl",
    "Lfm2VlForConditionalGeneration",
    title="lfm2_vl (hybrid convolution)",
    attention=2,
    block=(START, *(IMAGE,) * 4, END),
    picture=(16, 3 * 8 * 8),
    encode=stacked(spatial_shapes=(4, 4), pixel_attention_mask=[1] * 16),
    notes="attention in two of four layers",
    config=parts(
        "Lfm2VlConfig",
        text(
            "lfm2",
            layer_types=["conv", "full_attention", "conv", "full_attention"],
            block_auto_adjust_ff_dim=False,
            conv_L_cache=3,
        ),
        without(vision("siglip2_vision_model", num_patches=16, vision_use_head=False), "image_size"),
        image_token_id=IMAGE,
        projector_hidden_size=32,
        downsample_factor=2,
    ),
)
