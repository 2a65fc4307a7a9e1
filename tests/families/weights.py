"""Strong random weights, and a generation that tests can compare."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

PAD = 0


@torch.no_grad()
def strengthen(model: nn.Module) -> None:
    """Redraw all matrices so that activations stay of order 1 and attention is neither flat nor one-hot.

    Beside ``models.strengthen``: experts are stacks of matrices, gates that start closed are opened, and embeddings
    that a model scales up start smaller.
    """
    embeddings = {id(module.weight): module for module in model.modules() if isinstance(module, nn.Embedding)}
    heads = {id(module.weight) for name, module in model.named_modules() if name.endswith("lm_head")}
    for name, parameter in model.named_parameters():
        last = name.rpartition(".")[2]
        if any(part in last for part in ("gate_attn", "gate_ffn", "attn_gate", "alpha_")) or "attn_gate" in name:
            parameter.fill_(1.0)
        elif last in ("lambda_1", "lambda_2") or "layer_scale" in name:
            parameter.fill_(1.0)
        elif id(parameter) in heads:  # tied to embeddings or not
            parameter.normal_(std=0.5 * parameter.shape[-1] ** -0.5)  # rounding grows through random layers
        elif parameter.dim() >= 2:
            parameter.normal_(std=_std(name, parameter, embeddings.get(id(parameter))))


def _std(name: str, parameter: torch.Tensor, embedding: Any) -> float:
    if embedding is not None or "position_embedding" in name:
        scale = getattr(embedding, "scalar_embed_scale", getattr(embedding, "embed_scale", 1.0)) or 1.0
        return 1.0 / float(scale)
    fan_in = parameter.shape[-1] if parameter.dim() == 3 and "conv" not in name else parameter[0].numel()
    gain = 1.5 if any(part in name for part in ("q_proj", "k_proj", "qkv_proj", "query_key_value")) else 1.0
    return float(gain * fan_in**-0.5)


def vocab_size(model: Any) -> int:
    """How many ids the model scores."""
    return int(model.config.get_text_config(decoder=True).vocab_size)


def for_tests(model: Any, suppressed: set[int]) -> Any:
    """Generate a fixed number of tokens, and never a placeholder."""
    for module in model.modules():
        generation = getattr(module, "generation_config", None)
        if generation is not None:
            generation.suppress_tokens = sorted(suppressed)
            generation.eos_token_id = None
            generation.pad_token_id = PAD
    return model
