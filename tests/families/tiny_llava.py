"""Tiny random vision-language models of several families, their prompts, and a look at what a model is made of.

Default initialisation makes attention edits invisible, so weights are scaled up until the answers depend on the image.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from torch import nn

PAD, BOS, EOS, IMAGE = 0, 1, 2, 3
NEVER = 1_000_000
"""An id no model generates: prompt lookup before transformers 5.10 needs some end of text."""
SINK_WORD = 10
"""The id of a word that is a (textual) sink in models built with ``sinks=True``."""
SINK_DIMS = (5, 11)
"""The hidden dimensions that mark sinks in models built with ``sinks=True``."""
VOCAB_SIZE = 64
IMAGE_TOKENS = 9


needs_chunks = pytest.mark.skipif(
    not hasattr(transformers.GenerationMixin, "_supports_mm_encoder_outputs"),
    reason="chunked prefill with images is broken in this transformers, also without a patch",
)


@dataclass(frozen=True)
class Sample:
    """One prompt: its ids, placeholders included, and its pictures ``[num_images, 3, 24, 24]`` (or ``None``)."""

    ids: tuple[int, ...]
    pixels: torch.Tensor | None = None


def text_config(kind: str, *, layers: int, hidden: int, heads: int, kv_heads: int, window: int | None) -> Any:
    """The language model's config: ``llama``, ``mistral`` (sliding window), ``qwen2`` or ``gemma2`` (softcap)."""
    from transformers import Gemma2Config, LlamaConfig, MistralConfig, Qwen2Config

    common: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 512,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "tie_word_embeddings": False,
    }
    if kind == "llama":
        return LlamaConfig(**common)
    if kind == "qwen2":
        return Qwen2Config(**common)
    if kind == "mistral":
        return MistralConfig(**common, sliding_window=window or 12, head_dim=hidden // heads)
    if kind == "gemma2":
        return Gemma2Config(
            **common,
            head_dim=hidden // heads,
            query_pre_attn_scalar=2 * hidden // heads,  # not the usual scaling
            sliding_window=window or 12,
            attn_logit_softcapping=2.0,
            final_logit_softcapping=None,
        )
    raise ValueError(kind)


def llava_config(
    kind: str = "llama",
    *,
    layers: int = 4,
    hidden: int = 32,
    heads: int = 4,
    kv_heads: int = 2,
    window: int | None = None,
    attn: str | None = None,
) -> Any:
    """A LLaVA config with 9 image tokens per picture."""
    from transformers import CLIPVisionConfig, LlavaConfig

    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=24,
        patch_size=8,
        projection_dim=16,
    )
    text = text_config(kind, layers=layers, hidden=hidden, heads=heads, kv_heads=kv_heads, window=window)
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE,
        image_seq_length=IMAGE_TOKENS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )
    if attn is None and kind == "gemma2":
        attn = "eager"  # sdpa knows no softcap, and ignores it before transformers 5.23
    if attn is not None:
        config._attn_implementation = attn
    return config


def tiny_llava(kind: str = "llama", *, seed: int = 0, sinks: bool = False, config: Any = None, **options: Any) -> Any:
    """A LLaVA with random, strong weights.

    Args:
        kind: The language model, see ``text_config``.
        seed: Seed of the weights.
        sinks: Inject massive activations in ``SINK_DIMS``: first token, ``SINK_WORD``, some image tokens.
        config: Build from this config object instead.
        **options: See ``llava_config``.
    """
    from transformers import LlavaForConditionalGeneration

    if config is None:
        if sinks:
            options.setdefault("hidden", 64)
        config = llava_config(kind, **options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config).eval()
        torch.manual_seed(seed + 4)  # how much the constructor draws depends on the version of transformers
        strengthen(model)
        if sinks:
            _inject_sinks(model)
    return for_tests(model)


def for_tests(model: Any) -> Any:
    """Generate a fixed number of tokens, and never an image placeholder."""
    model.generation_config.suppress_tokens = [PAD, IMAGE]
    model.generation_config.eos_token_id = NEVER
    model.generation_config.pad_token_id = PAD
    return model


@torch.no_grad()
def strengthen(model: nn.Module) -> None:
    """Redraw all matrices so that activations stay of order 1 and attention is neither flat nor one-hot."""
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            continue
        std = parameter[0].numel() ** -0.5
        if "q_proj" in name or "k_proj" in name:
            std *= 1.5
        if "embed_tokens" in name or name.endswith("embeddings.weight"):
            std = 1.0
        parameter.normal_(std=std)
    for name, parameter in model.named_parameters():
        if name.endswith("class_embedding"):
            parameter.normal_(std=parameter.numel() ** -0.5)


@torch.no_grad()
def _inject_sinks(model: Any) -> None:
    inner = model.model
    embeddings = model.get_input_embeddings().weight
    embeddings[BOS, SINK_DIMS[0]] += 40.0
    embeddings[SINK_WORD, SINK_DIMS[1]] -= 40.0
    projector = inner.multi_modal_projector.linear_2.weight
    for dim in SINK_DIMS:
        projector[dim] *= 4.0
    for layer in inner.language_model.layers:  # keep the marked dimensions out of the way of everything else
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.weight[list(SINK_DIMS)] = 0.05
        layer.self_attn.o_proj.weight[list(SINK_DIMS)] *= 0.05
        layer.mlp.down_proj.weight[list(SINK_DIMS)] *= 0.05


def pictures(num: int, seed: int = 0) -> torch.Tensor:
    """Random pictures ``[num, 3, 24, 24]``."""
    generator = torch.Generator().manual_seed(1000 + seed)
    return torch.randn(num, 3, 24, 24, generator=generator) * 2


def words(num: int, seed: int = 0) -> list[int]:
    """Random text ids."""
    generator = torch.Generator().manual_seed(2000 + seed)
    return torch.randint(4, VOCAB_SIZE, (num,), generator=generator).tolist()


def sample(before: int = 3, images: int = 1, after: int = 6, *, seed: int = 0, between: int = 2) -> Sample:
    """A prompt: first token, text, pictures with text between them, question."""
    ids = [BOS, *words(before, seed)]
    for index in range(images):
        ids += [*words(between if index else 0, seed + 50 + index), *[IMAGE] * IMAGE_TOKENS]
    ids += [*words(max(after - 2, 0), seed + 99), SINK_WORD, *words(min(after, 1), seed + 98)]
    return Sample(tuple(ids), pictures(images, seed) if images else None)


RAGGED = (
    sample(3, 1, 6, seed=1),
    sample(7, 2, 5, seed=2),
    sample(9, 0, 4, seed=3),
    sample(1, 1, 9, seed=4),
)
"""Prompts of unequal length with one, two, no and one picture."""


def collate(samples: Sequence[Sample], *, side: str = "left", pad_to: int = 0) -> dict[str, torch.Tensor]:
    """Pad prompts to one length."""
    length = max(pad_to, *(len(each.ids) for each in samples)) if len(samples) > 1 else max(pad_to, len(samples[0].ids))
    ids = torch.full((len(samples), length), PAD)
    mask = torch.zeros(len(samples), length, dtype=torch.long)
    for row, each in enumerate(samples):
        where = slice(length - len(each.ids), length) if side == "left" else slice(0, len(each.ids))
        ids[row, where] = torch.tensor(each.ids)
        mask[row, where] = 1
    inputs = {"input_ids": ids, "attention_mask": mask}
    pixels = [each.pixels for each in samples if each.pixels is not None]
    if pixels:
        inputs["pixel_values"] = torch.cat(pixels)
    return inputs


def position_ids(attention_mask: torch.Tensor) -> torch.Tensor:
    """What ``generate`` derives from a mask; a bare forward of a padded batch needs it."""
    return (attention_mask.cumsum(1) - 1).clamp_min(0)


@torch.no_grad()
def forward(model: Any, inputs: dict[str, torch.Tensor], **options: Any) -> Any:
    """A bare forward with the positions of the padded prompts."""
    return model(**inputs, position_ids=position_ids(inputs["attention_mask"]), **options)


@torch.no_grad()
def generate(model: Any, inputs: dict[str, Any], tokens: int = 6, **options: Any) -> Any:
    """Greedy ids and raw logits of every step ``[batch, tokens, vocab]``."""
    options = {"do_sample": False, "max_new_tokens": tokens, **options}
    out = model.generate(**inputs, return_dict_in_generate=True, output_logits=True, **options)
    return out.sequences, torch.stack(out.logits, dim=1)


def snapshot(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Everything that hangs on every module: attributes by identity, hook dictionaries by content."""
    seen = {}
    for name, module in model.named_modules():
        seen[name] = {key: _contents(value) for key, value in vars(module).items()}
        config = getattr(module, "config", None)
        if config is not None:
            seen[name]["config.vars"] = {key: repr(value) for key, value in vars(config).items()}
    return seen


def _contents(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: id(each) for key, each in value.items()}
    if isinstance(value, bool | int | float | str | None):
        return value
    return id(value)


def attention_modules(model: nn.Module) -> Iterator[Any]:
    """The text attention modules, by class name."""
    for name, module in model.named_modules():
        if name.endswith("self_attn") and "language_model" in name:
            yield module
