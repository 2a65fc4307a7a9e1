"""One tiny, random, offline model per family: every configuration vlmfix is tested on.

``FAMILIES`` is the list in the order of the capability matrix; ``by_name`` finds one. See ``families.base.Family`` for
what a family offers: ``build()``, ``single()``, ``ragged()``, ``text()``, ``collate()``, ``forward()``.
"""

from __future__ import annotations

from families import (
    biased,
    cross,
    documents,
    gemma,
    grids,
    layers,
    llava,
    masks,
    projector,
    qwen,
    sparse,
    special,
    tiles,
)
from families.base import Family
from families.weights import strengthen

__all__ = ["FAMILIES", "Family", "available", "by_name", "strengthen"]

_MODULES = (
    *(llava, projector, cross, special),
    *(qwen, grids, gemma, masks, documents, sparse, layers, tiles, biased),
)
_ALL = {each.name: each for module in _MODULES for each in vars(module).values() if isinstance(each, Family)}
_ORDER = """
llava llava_mistral llava_gemma2 pixtral llava_next llava_next_video llava_onevision vipllava video_llava aya_vision
cohere2_vision mistral3 got_ocr2 internvl janus deepseek_vl ovis2 aria perception_lm fast_vlm lfm2_vl
blip2_opt blip2_t5 instructblip instructblipvideo idefics idefics2 idefics3 smolvlm
qwen2_vl qwen2_5_vl qwen2_5_vl_sliding qwen3_vl qwen3_vl_moe qwen3_5 glm4v glm4v_moe kimi_k25 video_llama_3 qwen2_5_omni
ernie4_5_vl_moe paligemma paligemma2 gemma3 gemma3n gemma4 mllama llama4 phi4_multimodal molmo2 minicpmv4_6
chameleon fuyu florence2
glm46v glmga glm_ocr qwen3_5_moe qwen3_omni_moe paddleocr_vl exaone4_5 hyperclovax_vision_v2
lighton_ocr qianfan_ocr pp_chart2table shieldgemma2 deepseek_vl_hybrid minicpmv4_7 minicpm_ocr
mistral_large4 minimax_m3_vl glm5_next dots3_note qwen4_exp
cosmos3_omni cosmos3_edge muse_glimmer muse_spark lfm3_vl gemma4_unified
cohere_compass hunyuan_vl step3p7 granite_docling granite4_vision emu3
unlimited_ocr deepseek_ocr2
inkling inkling2 nemotron_h_omni
""".split()
FAMILIES: tuple[Family, ...] = tuple(_ALL[name] for name in _ORDER)
assert len(FAMILIES) == len(_ALL)


def by_name(name: str) -> Family:
    """Find a family.

    Raises:
        KeyError: There is none of that name; the message lists them.
    """
    if name not in _ALL:
        raise KeyError(f"no family {name!r}; there are {', '.join(_ORDER)}")
    return _ALL[name]


def available(name: str) -> Family:
    """Find a family for a test, which is skipped with the reason if this version of transformers lacks it."""
    import pytest

    family = by_name(name)
    if (reason := family.unavailable()) is not None:
        pytest.skip(reason)
    return family
