"""Training through a frozen Llama with few passes over memory: linear maps with an adapter, norms, gates, attention.

A bfloat16 model on a CPU spends more time on element-wise passes than on products; these compute the same with fewer.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, LlamaModel

from vlmfix.evals.testbed.smol.model import LINEARS, LORA_SCALE, linear_of

__all__ = ["LowRankLinear", "add_adapter", "speed_up"]


class _LowRank(torch.autograd.Function):
    """``x W^T + s (x a^T) b^T`` with a frozen W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        a, b = a.to(x.dtype), (b * LORA_SCALE).to(x.dtype)
        reduced = flat @ a.t()
        ctx.save_for_backward(flat, weight, a, b, reduced)
        ctx.shape = x.shape
        return (flat @ weight.t()).addmm_(reduced, b.t()).view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        flat, weight, a, b, reduced = ctx.saved_tensors
        gradient = gradients[0].reshape(-1, gradients[0].shape[-1])
        inner = gradient @ b
        to_x = (gradient @ weight).addmm_(inner, a).view(ctx.shape) if ctx.needs_input_grad[0] else None
        return to_x, None, (inner.t() @ flat).float(), (gradient.t() @ reduced).float() * LORA_SCALE


class LowRankLinear(nn.Module):
    """A frozen linear map without bias plus ``LORA_SCALE * b @ a``, zero at first.

    Args:
        linear: The map.
        rank: Rank of the change.
    """

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        super().__init__()
        self.weight = linear.weight.requires_grad_(False)
        self.a = nn.Parameter(torch.randn(rank, linear.in_features) / linear.in_features**0.5)
        self.b = nn.Parameter(torch.zeros(linear.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in]`` to ``[..., out]``."""
        result: Tensor = _LowRank.apply(x, self.weight, self.a, self.b)
        return result


def add_adapter(language_model: LlamaModel, rank: int) -> dict[str, LowRankLinear]:
    """Replace every linear map of every layer; keys are ``LAYER.NAME``."""
    adapter = {}
    for layer in range(len(language_model.layers)):
        for name in LINEARS:
            parent, linear = linear_of(language_model, layer, name)
            module = LowRankLinear(linear, rank)
            setattr(parent, name, module)
            adapter[f"{layer}.{name}"] = module
    return adapter


class _Norm(torch.autograd.Function):
    """RMSNorm with a frozen weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        size = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        inverse = torch.rsqrt(size * size / x.shape[-1] + epsilon).to(x.dtype)
        normed = x * inverse
        ctx.save_for_backward(normed, weight, inverse)
        return normed * weight

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        normed, weight, inverse = ctx.saved_tensors
        gradient = gradients[0] * weight
        along = (gradient * normed).mean(-1, keepdim=True, dtype=torch.float32).to(gradient.dtype)
        return torch.addcmul(gradient, normed, along, value=-1).mul_(inverse), None, None


class _Gate(torch.autograd.Function):
    """``silu(gate) * up``."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        opened = F.silu(gate)
        ctx.save_for_backward(gate, up, opened)
        return opened * up

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        gate, up, opened = ctx.saved_tensors
        gradient = gradients[0]
        return torch.ops.aten.silu_backward(gradient * up, gate), gradient * opened


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """Attention as three plain products: its backward is faster on a CPU than that of the fused kernel."""
    batch, heads, length, width = query.shape
    groups = key.shape[1]

    def spread(x: Tensor) -> Tensor:
        wide = x[:, :, None].expand(batch, groups, heads // groups, length, width)
        return wide.reshape(batch * heads, length, width)

    bias = mask.expand(batch, heads, length, length).reshape(batch * heads, length, length)
    scores = torch.baddbmm(
        bias, query.reshape(batch * heads, length, width), spread(key).transpose(1, 2), alpha=scaling
    )
    mixed = torch.bmm(torch.softmax(scores, -1), spread(value))
    return mixed.view(batch, heads, length, width).transpose(1, 2).contiguous(), None


def speed_up(language_model: LlamaModel) -> None:
    """Let a frozen model on a CPU use the functions above, and compile its layers; a GPU does as well without.

    All sequences must have the same length, or each length is compiled anew.
    """
    name = "smol_training"
    AttentionInterface.register(name, _attention)
    language_model.config._attn_implementation = name

    def norm_forward(norm: nn.Module) -> Any:
        return lambda x: _Norm.apply(x, norm.weight, norm.variance_epsilon)

    def mlp_forward(mlp: Any) -> Any:
        return lambda x: mlp.down_proj(_Gate.apply(mlp.gate_proj(x), mlp.up_proj(x)))

    for layer in language_model.layers:
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.forward = norm_forward(norm)
        layer.mlp.forward = mlp_forward(layer.mlp)
        layer.forward = torch.compile(layer.forward, dynamic=False)
    language_model.norm.forward = norm_forward(language_model.norm)
