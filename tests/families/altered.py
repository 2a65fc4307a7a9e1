"""Families whose image is not among the decoder's tokens: models, methods that act there, and naive answers.

A naive answer is eager attention, no cache, edits spelt out.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

import vlmfix
from families import Family, available
from families.tiny_llava import generate
from vlmfix.methods.base import Method

EMBEDDED = ("blip2_opt", "instructblip", "instructblipvideo")
CROSS = ("mllama", "idefics")
ENCODED = ("blip2_t5", "florence2")
EVERY = (*EMBEDDED, *CROSS, *ENCODED)
TOKENS = 4
PAI = {"alpha": 0.9, "layers": ":"}
SPIN = {"keep": 0.5, "suppress": 0.1, "layers": ":"}
VHR = {"layers": ":", "outliers": False, "alpha": 1.7}
ACT = {"layers": ":", "sink_threshold": 0.05, "min_rows": 2}
ACTING = {
    **{name: (("pai", PAI), ("spin", SPIN), ("vhr", VHR), ("act", ACT), ("mma", {"layers": ":"})) for name in EMBEDDED},
    **{name: (("spin", SPIN), ("vhr", VHR), ("act", ACT), ("iat", {"layers": ":"})) for name in CROSS},
    **{name: (("pai", PAI), ("spin", SPIN), ("vhr", VHR), ("act", ACT), ("vaf", {"layers": ":"})) for name in ENCODED},
}
CASES = [(name, method, parameters) for name, methods in ACTING.items() for method, parameters in methods]
IDS = [f"{name}-{method}" for name, method, _ in CASES]


def build(name: str) -> tuple[Family, Any]:
    """A family and its tiny model."""
    family = available(name)
    return family, family.build()


def logits(model: Any, inputs: dict[str, torch.Tensor], tokens: int = TOKENS, **options: Any) -> torch.Tensor:
    """Logits of every greedy step."""
    found: torch.Tensor = generate(model, inputs, tokens, **options)[1]
    return found


def edited(model: Any) -> int:
    """Head rows edited so far."""
    status = vlmfix.status(model)
    assert status is not None
    return status.edited[0]


def gap(one: torch.Tensor, two: torch.Tensor) -> float:
    """The largest difference."""
    return float((one - two).abs().max())


@dataclass(frozen=True)
class Spy(Method):
    """Remembers which keys are what, and edits nothing that matters."""

    name: ClassVar[str] = "spy"
    edits_weights: ClassVar[bool] = True
    needs_text_keys: ClassVar[bool] = False

    def edit_weights(self, attn_weights: torch.Tensor, layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Look."""
        keys = {name: layer.keys(name, attn_weights).clone() for name in ("image", "behind", "first", "generated")}
        SEEN.append((layer.site.kind, attn_weights.shape[2], keys))
        return attn_weights, attn_weights.new_zeros(attn_weights.shape[:3], dtype=torch.bool)


SEEN: list[tuple[str, int, dict[str, torch.Tensor]]] = []


def spied(model: Any, run: Callable[[], Any]) -> list[tuple[str, int, dict[str, torch.Tensor]]]:
    """What a spy sees."""
    SEEN.clear()
    vlmfix.patch(model, Spy())
    run()
    vlmfix.unpatch(model)
    return list(SEEN)


Edit = Callable[[Any, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor | None]]
"""From a module, its scores ``[batch, heads, rows, keys]`` and which keys rows see: new scores, factors of head rows
``[batch, heads, rows]`` (or ``None``)."""

DECODER_IDS = "decoder_input_ids"


@contextmanager
def spelt_out(modules: list[Any], edit: Edit) -> Iterator[None]:
    """Let attention modules of one modeling file compute their attention here, with an edit."""
    home = sys.modules[type(modules[0]).__module__]
    stock = home.eager_attention_forward
    wanted = {id(module) for module in modules}

    def attention(
        module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, **kwargs: Any
    ) -> Any:
        if id(module) not in wanted:
            return stock(module, query, key, value, attention_mask, **kwargs)
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        scores = query @ key.transpose(-1, -2) * kwargs["scaling"]
        if kwargs.get("position_bias") is not None:
            scores = scores + kwargs["position_bias"]
        mask = torch.zeros_like(scores) if attention_mask is None else attention_mask
        if mask.dtype == torch.bool:
            mask = torch.zeros_like(scores).masked_fill(~mask, torch.finfo(scores.dtype).min)
        scores, factors = edit(module, scores, (mask > -1e9).expand(scores.shape))
        outputs = torch.softmax(scores + mask, dim=-1) @ value
        if factors is not None:
            outputs = outputs * factors[..., None]
        return outputs.transpose(1, 2).contiguous(), None

    home.eager_attention_forward = attention
    try:
        yield
    finally:
        home.eager_attention_forward = stock


@torch.no_grad()
def recomputed(family: Family, model: Any, inputs: dict[str, torch.Tensor], tokens: int) -> torch.Tensor:
    """Greedy logits ``[1, tokens, vocab]`` of one prompt, everything computed anew for every token."""
    inputs = dict(inputs)
    suppressed = model.generation_config.suppress_tokens
    answer = DECODER_IDS if DECODER_IDS in inputs else "input_ids"
    found = []
    for _ in range(tokens):
        logits = model(**inputs).logits[:, -1].float()
        found.append(logits)
        best = logits.index_fill(1, torch.tensor(suppressed), float("-inf")).argmax(-1, keepdim=True)
        inputs[answer] = torch.cat([inputs[answer], best], dim=1)
        if answer == "input_ids":
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        for name in ("image_attention_mask", "cross_attention_mask"):
            if name in inputs:
                inputs[name] = torch.cat([inputs[name], inputs[name][:, -1:]], dim=1)
    return torch.stack(found, dim=1)


@contextmanager
def naive_vhr(model: Any, modules: list[Any], stock: Callable[[], Any], alpha: float) -> Iterator[None]:
    """VHR without the outlier rule on a stock model: heads chosen at the end of the first forward, then frozen.

    Args:
        model: The model.
        modules: The attention modules to edit.
        stock: Runs the image-free prompt.
        alpha: Scale of the chosen heads.
    """
    without: dict[int, torch.Tensor] = {}
    scale: dict[int, torch.Tensor] = {}
    heads = 4

    def record(number: int) -> Any:
        def hook(module: Any, args: Any) -> None:
            without[number] = args[0][0, -1].reshape(heads, -1)

        return hook

    def edit(number: int) -> Any:
        def hook(module: Any, args: Any) -> Any:
            states = args[0].reshape(*args[0].shape[:2], heads, -1)
            if number not in scale:
                divergence = (states[0, -1] - without[number]).norm(dim=-1)
                scale[number] = torch.where(divergence > divergence.median(), alpha, 1.0)
            return ((states * scale[number][:, None]).reshape(args[0].shape),)

        return hook

    names = ("o_proj", "out_proj", "o")
    projections = [next(getattr(module, name) for name in names if hasattr(module, name)) for module in modules]
    handles = [each.register_forward_pre_hook(record(n)) for n, each in enumerate(projections)]
    with torch.no_grad():
        stock()
    for handle in handles:
        handle.remove()
    handles = [each.register_forward_pre_hook(edit(n)) for n, each in enumerate(projections)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
