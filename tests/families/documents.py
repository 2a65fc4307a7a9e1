"""Families that read documents, and others that share most with a family of another module."""

from __future__ import annotations

from typing import Any

import torch

from families.base import (
    BREAK,
    END,
    IMAGE,
    MEDIA,
    START,
    TAG,
    Pictures,
    family,
    parts,
    stacked,
    text,
    token_types,
    variant,
    vision,
)
from families.gemma import gemma3
from families.masks import minicpmv4_6
from families.projector import deepseek_vl, got_ocr2, internvl
from families.qwen import qwen3_5_text

lighton_ocr = family(
    "lighton_ocr",
    "LightOnOcrForConditionalGeneration",
    block=(IMAGE,) * 4,
    picture=(3, 32, 32),
    encode=stacked(image_sizes=(32, 32)),
    needs_transformers="5.0",
    config=parts(
        "LightOnOcrConfig",
        text("qwen3", head_dim=8),
        vision("pixtral", image_size=32, head_dim=8),
        image_token_id=IMAGE,
    ),
)


def _qianfan() -> Any:
    from transformers import QianfanOCRConfig

    return QianfanOCRConfig(
        vision_config=vision(image_size=[16, 16], patch_size=[4, 4]),
        text_config=text("qwen3", head_dim=8),
        image_token_id=IMAGE,
        image_seq_length=4,
    )


qianfan_ocr = variant(
    internvl,
    "qianfan_ocr",
    "qianfan_ocr",
    architecture="QianfanOCRForConditionalGeneration",
    config=_qianfan,
    needs_transformers="5.10",
)


def _chart() -> Any:
    from transformers import PPChart2TableConfig

    like = got_ocr2.config()
    return PPChart2TableConfig(
        vision_config={**vision_of(like), "model_type": "pp_chart2table_vision"},
        text_config=text("qwen2"),
        image_token_index=IMAGE,
        image_seq_length=4,
    )


def vision_of(config: Any) -> dict[str, Any]:
    """The tower of a tiny config."""
    found: dict[str, Any] = config.vision_config.to_dict()
    return found


pp_chart2table = variant(got_ocr2, "pp_chart2table", "pp_chart2table", config=_chart, needs_transformers="5.10")


def _shield() -> Any:
    from transformers import ShieldGemma2Config

    like = gemma3.config()
    return ShieldGemma2Config(
        text_config=like.text_config,
        vision_config=like.vision_config,
        mm_tokens_per_image=4,
        image_token_index=IMAGE,
        boi_token_index=START,
        eoi_token_index=END,
    )


shieldgemma2 = variant(gemma3, "shieldgemma2", "shieldgemma2", config=_shield, needs_transformers="5.23")


def _two_sizes(pictures: Pictures) -> dict[str, torch.Tensor]:
    every = torch.stack([picture for sample in pictures for picture in sample])
    return {"pixel_values": every, "high_res_pixel_values": every.repeat_interleave(4, -1).repeat_interleave(4, -2)}


def _hybrid() -> Any:
    from transformers import DeepseekVLHybridConfig

    sharp = vision(
        "sam_vision_model", image_size=96, patch_size=4, output_channels=16, mlp_dim=32, window_size=4, num_pos_feats=8
    )
    del sharp["intermediate_size"]
    return DeepseekVLHybridConfig(
        text_config=text(),
        vision_config=vision("siglip_vision_model", vision_use_head=False),
        high_res_vision_config={**sharp, "global_attn_indexes": [1]},
        image_token_id=IMAGE,
    )


deepseek_vl_hybrid = variant(
    deepseek_vl,
    "deepseek_vl_hybrid",
    "deepseek_vl_hybrid",
    architecture="DeepseekVLHybridForConditionalGeneration",
    config=_hybrid,
    encode=_two_sizes,
    notes="two vision towers",
)


# MiniCPM-V's kin.


def _minicpm(name: str, **changes: Any) -> Any:
    import transformers

    return getattr(transformers, name)(
        text_config=qwen3_5_text(),
        vision_config=vision(image_size=32, patch_size=4),
        insert_layer_id=0,
        **MEDIA,
        downsample_mode="16x",
        **changes,
    )


minicpmv4_7 = variant(
    minicpmv4_6,
    "minicpmv4_7",
    "minicpmv4_7 (hybrid linear)",
    architecture="MiniCPMV4_7ForConditionalGeneration",
    config=lambda: _minicpm(
        "MiniCPMV4_7Config",
        image_start_id=START,
        image_end_id=END,
        slice_start_id=TAG,
        slice_end_id=TAG + 1,
        newline_id=BREAK,
    ),
    attention=2,
    annotate=token_types("mm_token_type_ids"),
    text_positions=False,
    needs_transformers="5.23",
    notes="a view and slices, each wrapped; softmax attention in two of four layers",
)
minicpm_ocr = variant(
    minicpmv4_6,
    "minicpm_ocr",
    "minicpm_ocr (hybrid linear)",
    architecture="MiniCPMOcrForConditionalGeneration",
    config=lambda: _minicpm("MiniCPMOcrConfig"),
    attention=2,
    needs_transformers="5.23",
    notes="a view and slices, each wrapped; softmax attention in two of four layers",
)
