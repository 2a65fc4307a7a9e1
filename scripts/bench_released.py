"""The edits of VAR, PAI and VHR as released code makes them: eager attention, the whole map, one head at a time.

Written anew from the papers' formulas, as a point of comparison for ``scripts/bench.py``. As there, the place of the
image is given by hand, batches hold no padding, and every prompt has one image.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel

from vlmfix.methods.base import Method

NAME = "vlmfix_bench_released"


class Released:
    """One method the released way.

    Args:
        model: The model to change, for good.
        method: ``VAR``, ``PAI`` or ``VHR``, bound to the model: layers and dimensions resolved.
        image_start: Position of the first image token.
        image_stop: End of the image tokens.
    """

    def __init__(self, model: PreTrainedModel, method: Any, image_start: int, image_stop: int) -> None:
        self.method = method
        self.layers = method.layer_indices
        self.start, self.stop = image_start, image_stop
        self.sinks: dict[int, list[torch.Tensor]] = {}
        self.scales: dict[int, torch.Tensor] = {}
        self.without_image: dict[int, torch.Tensor] = {}
        self.is_text_only = False
        AttentionInterface.register(NAME, released_attention)
        text = model.model.language_model
        text.config._attn_implementation_internal = NAME
        for number, layer in enumerate(text.layers):
            layer.self_attn.released = self
            if method.name == "var" and number in self.layers:
                layer.register_forward_pre_hook(self.find_sinks(number), with_kwargs=True)
        if method.name == "vhr":
            model.register_forward_pre_hook(self.read_text_only, with_kwargs=True)

    def find_sinks(self, number: int) -> Any:
        """Return a hook that finds a layer's sinks in the prompt."""

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            states = args[0] if args else kwargs["hidden_states"]
            if states.shape[1] == 1:
                return
            self.sinks[number] = []
            for sample in states.float():
                rms = (sample.pow(2).mean(-1) + 1e-6).sqrt()
                value = torch.stack([sample[:, dim].abs() / rms for dim in self.method.sink_dims]).amax(0)
                self.sinks[number].append(value >= self.method.sink_threshold)

        return hook

    def read_text_only(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Run the prompt without its image first, for VHR."""
        ids = kwargs["input_ids"]
        if ids.shape[1] == 1:
            return
        text = torch.cat([ids[:, : self.start], ids[:, self.stop :]], dim=1)
        self.is_text_only = True
        try:
            module.model.language_model(inputs_embeds=module.get_input_embeddings()(text), use_cache=False)
        finally:
            self.is_text_only = False

    def edit_scores(self, scores: torch.Tensor) -> None:
        """PAI: raise the image's scores in the last row, head by head."""
        for sample in scores:
            for head in sample:
                image = head[-1, self.start : self.stop]
                head[-1, self.start : self.stop] = image + self.method.alpha * image.abs()

    def edit_weights(self, weights: torch.Tensor, number: int) -> None:
        """VAR: redistribute the rows behind the image, head by head."""
        first = self.stop if weights.shape[2] > 1 else 0
        for sample, is_sink in zip(weights, self.sinks[number], strict=True):
            sink = torch.zeros(weights.shape[3], dtype=torch.bool, device=weights.device)
            sink[: is_sink.shape[0]] = is_sink
            image = torch.zeros_like(sink)
            image[self.start : self.stop] = True
            rest = image & ~sink
            if not (image & sink).any():
                continue
            for head in sample:
                rows = head[first:].float()
                image_mass, rest_mass = rows[:, image].sum(-1), rows[:, rest].sum(-1)
                selected = (image_mass >= self.method.image_mass) & (rest_mass > 0)
                selected &= rest_mass >= self.method.nonsink_ratio * image_mass
                budget = self.method.recycle * rows[:, sink].sum(-1)
                edited = rows.clone()
                edited[:, sink] *= 1 - self.method.recycle
                edited[:, rest] *= (1 + budget / rest_mass)[:, None]
                head[first:] = torch.where(selected[:, None], edited, rows).to(weights.dtype)

    def edit_heads(self, outputs: torch.Tensor, number: int) -> None:
        """VHR: choose a layer's heads in the prompt, and scale them one by one."""
        last = outputs[:, -1].float()
        if self.is_text_only:
            self.without_image[number] = last
            return
        if outputs.shape[1] > 1:
            without = self.without_image[number]
            distance = (last - without).norm(dim=-1)
            strength = without.pow(2).sum(-1)
            for sample in range(distance.shape[0]):
                limits = [each[sample].mean() + each[sample].std() for each in (distance, strength)]
                outlier = (distance[sample] > limits[0]) & (strength[sample] > limits[1])
                distance[sample, outlier] = 0
            chosen = distance > distance.median(dim=1, keepdim=True).values
            self.scales[number] = torch.where(chosen, self.method.alpha, 1.0)
        for head in range(outputs.shape[2]):
            outputs[:, :, head] *= self.scales[number][:, head, None, None].to(outputs.dtype)


def released_attention(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **kwargs: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Eager attention with the whole map, ``[batch, num_heads, q_len, keys]``, edited in place."""
    released: Released = module.released
    number, name = module.layer_idx, released.method.name
    acts = number in released.layers
    groups = query.shape[1] // key.shape[1]
    key, value = (states.repeat_interleave(groups, dim=1) for states in (key, value))
    scores = query @ key.transpose(-1, -2) * kwargs["scaling"]
    q_len, num_keys = scores.shape[-2:]
    causal = torch.full((q_len, num_keys), torch.finfo(scores.dtype).min, device=scores.device)
    scores = scores + causal.triu(num_keys - q_len + 1)
    if acts and name == "pai":
        released.edit_scores(scores)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    if acts and name == "var":
        released.edit_weights(weights, number)
    outputs = (weights @ value).transpose(1, 2).contiguous()
    if acts and name == "vhr":
        released.edit_heads(outputs, number)
    return outputs, weights


def bound(model: PreTrainedModel, method: Method) -> Method:
    """Resolve a method's layers and dimensions against a model."""
    from vlmfix.model.anatomy import analyse

    return method.bind(analyse(model))
