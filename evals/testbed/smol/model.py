"""The parts of ``smol``: SmolLM2's tokenizer and language model, the testbed's vision tower, projector and adapter."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    CLIPImageProcessor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from .. import MODEL_DIR
from ..scenes import GRID, IMAGE_SIZE

__all__ = [
    "CHAT_TEMPLATE",
    "IMAGE_ID",
    "LINEARS",
    "LORA_SCALE",
    "TURN_END_ID",
    "TURN_START_ID",
    "build_model",
    "build_processor",
    "build_tokenizer",
    "linear_of",
    "merge_adapter",
]

PAD_ID, TURN_START_ID, TURN_END_ID, IMAGE_ID = 0, 1, 2, 4
"""``<|endoftext|>``, ``<|im_start|>``, ``<|im_end|>``, and the token that becomes ``<image>``."""

_UNUSED_TOKEN = "<reponame>"
"""A special token that no chat contains. It is renamed to ``<image>``, so the vocabulary does not grow."""

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The linear maps of a layer that the adapter changes."""

LORA_SCALE = 2.0
"""The adapter adds ``LORA_SCALE * b @ a`` to a weight."""

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% endif %}<|im_end|>{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant{{ '\n' }}{% endif %}"
)
"""ChatML, as SmolLM2's own, without its default system message; images come first."""


def build_tokenizer(metadata: Mapping[str, Any]) -> PreTrainedTokenizerFast:
    """Build SmolLM2's tokenizer (byte-level BPE, digits split off one by one) with an ``<image>`` token.

    Args:
        metadata: From :func:`.gguf.read_gguf`.
    """
    words = ["<image>" if word == _UNUSED_TOKEN else word for word in metadata["tokenizer.ggml.tokens"]]
    merges = [tuple(pair.split(" ")) for pair in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({word: index for index, word in enumerate(words)}, merges))
    # The GGUF file does not record the pre-tokenizer; this is the one of SmolLM2's own tokenizer.json.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special_type = 3
    kinds = metadata["tokenizer.ggml.token_type"]
    special = [word for word, kind in zip(words, kinds, strict=True) if kind == special_type]
    tokenizer.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        additional_special_tokens=["<image>"],
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=metadata["llama.context_length"],
    )


def build_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """Build the processor: the testbed's 96 x 96 pictures, 64 image tokens, ChatML."""
    return LlavaProcessor(
        image_processor=CLIPImageProcessor.from_pretrained(MODEL_DIR),
        tokenizer=tokenizer,
        patch_size=IMAGE_SIZE // GRID,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=CHAT_TEMPLATE,
    )


def build_model(metadata: Mapping[str, Any], weights: Mapping[str, Tensor]) -> LlavaForConditionalGeneration:
    """Join SmolLM2 and the testbed's vision tower; the projector is untrained.

    Args:
        metadata: From :func:`.gguf.read_gguf`.
        weights: From the same call.

    Returns:
        The model in float32, with tied embeddings.
    """
    testbed = LlavaForConditionalGeneration.from_pretrained(MODEL_DIR, dtype=torch.float32)
    text = LlamaConfig(
        vocab_size=metadata["llama.vocab_size"],
        hidden_size=metadata["llama.embedding_length"],
        intermediate_size=metadata["llama.feed_forward_length"],
        num_hidden_layers=metadata["llama.block_count"],
        num_attention_heads=metadata["llama.attention.head_count"],
        num_key_value_heads=metadata["llama.attention.head_count_kv"],
        max_position_embeddings=metadata["llama.context_length"],
        rms_norm_eps=1e-5,
        rope_theta=metadata["llama.rope.freq_base"],
        bos_token_id=TURN_START_ID,
        eos_token_id=TURN_END_ID,
        pad_token_id=PAD_ID,
        tie_word_embeddings=True,
    )
    config = LlavaConfig(
        vision_config=testbed.config.vision_config,
        text_config=text,
        image_token_index=IMAGE_ID,
        image_seq_length=GRID * GRID,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        projector_hidden_act="gelu",
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(testbed.model.vision_tower.state_dict())
    model.model.language_model.load_state_dict(dict(weights))
    model.tie_weights()
    model.generation_config.update(
        bos_token_id=TURN_START_ID, eos_token_id=TURN_END_ID, pad_token_id=PAD_ID, do_sample=False
    )
    return model.eval()


def linear_of(language_model: nn.Module, layer: int, name: str) -> tuple[nn.Module, nn.Linear]:
    """The module that holds a linear map of a layer, and the map; ``name`` is one of :data:`LINEARS`."""
    block = language_model.get_submodule(f"layers.{layer}")
    parent = block.get_submodule("self_attn" if name in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp")
    linear = getattr(parent, name)
    assert isinstance(parent, nn.Module)
    return parent, linear


@torch.no_grad()
def merge_adapter(model: LlavaForConditionalGeneration, adapter: Mapping[str, Tensor]) -> None:
    """Load the projector and add the low-rank changes to the language model's weights, in place.

    Args:
        model: From :func:`build_model`.
        adapter: ``projector.*``, and for each layer and linear map ``lora.LAYER.NAME.a`` ``[r, in]`` and
            ``lora.LAYER.NAME.b`` ``[out, r]``.
    """
    core = model.model
    prefix = "projector."
    projector = {key.removeprefix(prefix): value.float() for key, value in adapter.items() if key.startswith(prefix)}
    core.multi_modal_projector.load_state_dict(projector)
    for layer, name in _adapted(adapter):
        a, b = (adapter[f"lora.{layer}.{name}.{side}"].float() for side in "ab")
        linear_of(core.language_model, layer, name)[1].weight.add_(b @ a, alpha=LORA_SCALE)


def _adapted(adapter: Iterable[str]) -> list[tuple[int, str]]:
    parts = [key.split(".") for key in adapter]
    return [(int(part[1]), part[2]) for part in parts if part[0] == "lora" and part[3] == "a"]
