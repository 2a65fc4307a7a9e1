"""Builds the untrained tiny LLaVA and its processor out of the standard Hugging Face classes."""

from __future__ import annotations

import re
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from .captions import _MORE, _OPENING, _REFERENCES, BRIEF_PROMPTS, DETAILED_PROMPTS, QUESTION, SHORT_ANSWER
from .scenes import GRID, IMAGE_SIZE
from .vocabulary import CATEGORIES, SCENES, plural

__all__ = ["CHAT_TEMPLATE", "build_model", "build_processor", "build_tokenizer", "vocabulary"]


PAD, BOS, EOS, UNK, IMAGE = range(5)


_SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>")


CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    "{% if message['content'] is string %}{{ message['content'] + ' ' }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] + ' ' }}{% endfor %}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
"""LLaVA-1.5's conversation: ``USER: <image>\\nDescribe the image. ASSISTANT:``."""


_EXTRA_WORDS = (
    "a an the is are there in of on at this that it its and or with no yes not what which who how many does do can "
    "you see seen picture photo image scene objects object visible please tell me detail brief short sentence list "
    "name all user assistant one two several pair from to . , ? ! : ; ' \" ( ) -"
)


def vocabulary() -> list[str]:
    """Every token in id order: the special tokens, then all words of captions, prompts, objects and scenes, sorted."""
    texts = [_EXTRA_WORDS, _OPENING, QUESTION, *DETAILED_PROMPTS, *BRIEF_PROMPTS, *SHORT_ANSWER, *_REFERENCES]
    texts += [template for pair in _MORE for template in pair]
    texts += [scene.name for scene in SCENES]
    texts += [form for _, name, _ in CATEGORIES for form in (name, plural(name))]
    words = set(re.findall(r"[a-z]+", re.sub(r"\{\w*\}", " ", " ".join(texts)).lower()))
    return [*_SPECIAL, *sorted(words | set(re.findall(r"[^\w\s]", _EXTRA_WORDS)))]


def _decoder() -> decoders.Decoder:
    """Joins words with spaces, closes up punctuation and writes sentence starts and roles as LLaVA's prompt does."""
    steps: list[Any] = [decoders.WordPiece(prefix="##", cleanup=False), decoders.Fuse()]
    steps.append(decoders.Replace(Regex(r" (?=[.,?!:;)])"), ""))
    for word in ("user", "assistant"):
        steps.append(decoders.Replace(f"{word}:", f"{word.upper()}:"))
    for letter in "abcdefghijklmnopqrstuvwxyz":
        steps.append(decoders.Replace(Regex(rf"(?:^|(?<=[.?!:] )){letter}"), letter.upper()))
    return decoders.Sequence(steps)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer: case-insensitive, punctuation split off, line breaks are spaces."""
    ids = {word: index for index, word in enumerate(vocabulary())}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    tokenizer.decoder = _decoder()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )


def build_processor() -> LlavaProcessor:
    """The processor: 96 x 96 pixels, 64 image tokens, LLaVA's chat template."""
    side = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    images = CLIPImageProcessor(
        size={"shortest_edge": IMAGE_SIZE}, crop_size=side, image_mean=[0.5] * 3, image_std=[0.25] * 3
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=build_tokenizer(),
        patch_size=IMAGE_SIZE // GRID,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=CHAT_TEMPLATE,
    )


def build_model() -> LlavaForConditionalGeneration:
    """An untrained model: CLIP tower 128 x 4, two-layer projector, Llama 128 x 6 with 8 heads. Seed torch before."""
    vision = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=IMAGE_SIZE // GRID,
        projection_dim=128,
        hidden_act="gelu",
    )
    text = LlamaConfig(
        vocab_size=len(vocabulary()),
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=512,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
        tie_word_embeddings=False,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE,
        image_seq_length=GRID * GRID,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )
    return LlavaForConditionalGeneration(config)
