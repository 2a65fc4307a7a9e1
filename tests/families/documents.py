"""Families that read documents, and others that share most with a family of another module."""

from __future__ import annotations

from functools import partial

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
    sam_tower,
    stacked,
    text,
    token_types,
    variant,
    vision,
)
from families.gemma import gemma3, gemma3_config
from families.masks import minicpmv4_6
from families.projector import deepseek_vl, got_ocr2, internvl, internvl_config
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


qianfan_ocr = variant(
    internvl,
    "qianfan_ocr",
    "qianfan_ocr",
    architecture="QianfanOCRForConditionalGeneration",
    config=internvl_config("QianfanOCRConfig", text("qwen3", head_dim=8)),
    needs_transformers="5.10",
)


pp_chart2table = variant(
    got_ocr2,
    "pp_chart2table",
    "pp_chart2table",
    config=parts(
        "PPChart2TableConfig",
        text("qwen2"),
        sam_tower("pp_chart2table_vision"),
        image_token_index=IMAGE,
        image_seq_length=4,
    ),
    needs_transformers="5.10",
)

shieldgemma2 = variant(
    gemma3, "shieldgemma2", "shieldgemma2", config=gemma3_config("ShieldGemma2Config"), needs_transformers="5.23"
)


def _two_sizes(pictures: Pictures) -> dict[str, torch.Tensor]:
    every = torch.stack([picture for sample in pictures for picture in sample])
    return {"pixel_values": every, "high_res_pixel_values": every.repeat_interleave(4, -1).repeat_interleave(4, -2)}


deepseek_vl_hybrid = variant(
    deepseek_vl,
    "deepseek_vl_hybrid",
    "deepseek_vl_hybrid",
    architecture="DeepseekVLHybridForConditionalGeneration",
    config=parts(
        "DeepseekVLHybridConfig",
        text(),
        vision("siglip_vision_model", vision_use_head=False),
        high_res_vision_config=sam_tower("sam_vision_model", image_size=96, num_pos_feats=8),
        image_token_id=IMAGE,
    ),
    encode=_two_sizes,
    notes="two vision towers",
)


# MiniCPM-V's kin.


_minicpm = partial(
    parts,
    text=qwen3_5_text(),
    vision=vision(image_size=32, patch_size=4),
    insert_layer_id=0,
    **MEDIA,
    downsample_mode="16x",
)

minicpmv4_7 = variant(
    minicpmv4_6,
    "minicpmv4_7",
    "minicpmv4_7 (hybrid linear)",
    architecture="MiniCPMV4_7ForConditionalGeneration",
    config=_minicpm(
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
    config=_minicpm("MiniCPMOcrConfig"),
    attention=2,
    needs_transformers="5.23",
    notes="a view and slices, each wrapped; softmax attention in two of four layers",
)
