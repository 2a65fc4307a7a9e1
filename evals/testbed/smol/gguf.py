"""Reads the GGUF file of a Llama: metadata, and weights under the names that transformers uses.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Only the tensor types that occur in the file of
SmolLM2 are read (F32, Q4_1, Q8_0); numpy and torch suffice.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from vlmfix.errors import DataError

__all__ = ["read_gguf"]

_MAGIC = b"GGUF"
_ALIGNMENT = 32
_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_F32, _Q4_1, _Q8_0 = 0, 3, 8
_BLOCK_VALUES = 32
_BLOCK_BYTES = {_F32: 4 * _BLOCK_VALUES, _Q4_1: 20, _Q8_0: 34}

_OUTER_NAMES = {"token_embd.weight": "embed_tokens.weight", "output_norm.weight": "norm.weight"}
_LAYER_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}

Bytes = npt.NDArray[np.uint8]


class _Cursor:
    """Reads little-endian values one after the other."""

    def __init__(self, data: Bytes) -> None:
        self.data, self.position = data, 0

    def take(self, count: int) -> bytes:
        start, self.position = self.position, self.position + count
        return self.data[start : self.position].tobytes()

    def scalar(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize(code)))[0]

    def string(self) -> str:
        return self.take(self.scalar("Q")).decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            item, length = self.scalar("I"), self.scalar("Q")
            return [self.value(item) for _ in range(length)]
        return self.scalar(_SCALARS[kind])


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Read the metadata and the weights of a Llama.

    Args:
        path: The ``.gguf`` file.

    Returns:
        The metadata as the file names them (``"llama.block_count"``, ``"tokenizer.ggml.tokens"``, ...), and float32
        weights by the names of ``LlamaModel`` (``"layers.0.self_attn.q_proj.weight"``, ...).

    Raises:
        DataError: If the file is not a GGUF file, ends early, or holds a tensor type other than the three.
    """
    data = np.memmap(path, mode="r", dtype=np.uint8)
    try:
        return _read(data)
    except (struct.error, KeyError, ValueError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not a complete GGUF file of a Llama: {type(error).__name__}: {error}") from error


def _read(data: Bytes) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    cursor = _Cursor(data)
    if cursor.take(len(_MAGIC)) != _MAGIC:
        raise ValueError("it does not begin with 'GGUF'")
    cursor.scalar("I")  # version
    num_tensors, num_entries = cursor.scalar("Q"), cursor.scalar("Q")
    metadata: dict[str, Any] = {}
    for _ in range(num_entries):
        key = cursor.string()
        metadata[key] = cursor.value(cursor.scalar("I"))
    headers = []
    for _ in range(num_tensors):
        name = cursor.string()
        shape = [cursor.scalar("Q") for _ in range(cursor.scalar("I"))][::-1]
        headers.append((name, shape, cursor.scalar("I"), cursor.scalar("Q")))
    base = -(-cursor.position // _ALIGNMENT) * _ALIGNMENT
    heads = {"attn_q": metadata["llama.attention.head_count"], "attn_k": metadata["llama.attention.head_count_kv"]}
    weights = {}
    for name, shape, kind, offset in headers:
        size = int(np.prod(shape)) // _BLOCK_VALUES * _BLOCK_BYTES[kind]
        values = torch.from_numpy(_dequantize(data[base + offset : base + offset + size], kind).reshape(shape))
        if name in _OUTER_NAMES:
            weights[_OUTER_NAMES[name]] = values
            continue
        _, layer, part, _ = name.split(".")
        if part in heads:
            values = _to_half_rotation(values, heads[part])
        weights[f"layers.{layer}.{_LAYER_NAMES[part]}.weight"] = values
    return metadata, weights


def _dequantize(raw: Bytes, kind: int) -> npt.NDArray[np.float32]:
    """Expand blocks of 32 values to float32."""
    if kind == _F32:
        return np.array(raw).view(np.float32)
    blocks = np.array(raw).reshape(-1, _BLOCK_BYTES[kind])
    scale = blocks[:, :2].copy().view(np.float16).astype(np.float32)
    if kind == _Q8_0:
        return np.ascontiguousarray(scale * blocks[:, 2:].copy().view(np.int8), dtype=np.float32)
    minimum = blocks[:, 2:4].copy().view(np.float16).astype(np.float32)
    nibbles = np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], axis=1)
    return np.ascontiguousarray(scale * nibbles + minimum, dtype=np.float32)


def _to_half_rotation(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Undo the interleaving of rotary pairs: llama.cpp rotates neighbours, transformers rotates the two halves."""
    return weight.view(heads, -1, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
