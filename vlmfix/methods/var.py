"""VAR: Visual Attention Redistribution (Kang et al., ICLR 2025, arXiv 2503.03321)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vlmfix.methods.base import Method
from vlmfix.methods.parameters import Range, parameter
from vlmfix.methods.selection import all_but
from vlmfix.methods.sequence import extend_mask
from vlmfix.methods.views import EditedRows, Layer
from vlmfix.model.anatomy import Anatomy
from vlmfix.model.sink_dims import sink_dims_for


@dataclass
class SinkMap:
    """What a prompt teaches one layer.

    Attributes:
        sink: Sink tokens, visual and textual, bool ``[batch, keys]``.
        groups: fp32 ``[batch, keys, 3]``: image token, image token that is no sink, sink; all 0 in samples without a
            visual sink.
        changes: fp32 ``[batch, keys, 2]``: what each key loses as a sink, and gains as an image token that is none, of
            its own weight.
        has_visual_sink: bool ``[batch, 1, 1]``.
        acts: Whether any sample has a visual sink, once known without waiting for the device.
    """

    sink: torch.Tensor
    groups: torch.Tensor
    changes: torch.Tensor
    has_visual_sink: torch.Tensor
    acts: bool = True


@dataclass(frozen=True)
class VAR(Method):
    """Move attention from sinks to the other image tokens, in the rows that look at the image.

    A token is a sink of a layer when its hidden state entering the layer is extreme in one of the model's sink
    dimensions: ``max_d |x_d| / rms(x) >= sink_threshold``. A query row of a head is edited when its attention to the
    image is at least ``image_mass``, at least ``nonsink_ratio`` of that lies outside visual sinks, and the layer has a
    visual sink. Then ``recycle`` of the attention to all sinks, visual and textual, goes to the image tokens that are
    no sinks, in proportion to what they have. Row sums stay 1. The rows are those behind the last image token in a
    prompt, and that of every decode step. Sinks are those of the prompt; generated tokens never count.

    The released code edits the last layer too, since its switch for that has no effect, and recycles 0.4:
    ``VAR(recycle=0.4, layers="2:")`` equals it. Its rho is one minus this ``nonsink_ratio``. It asks for more than tau
    where the paper, and this, ask for tau at least; and it keeps the sinks of the first image it reads for all later
    ones, and then edits image rows too, which is a fault that is not followed.

    Two things follow the released code and not the paper: layers 0 and 1 are left alone, and so is a layer whose only
    sinks are textual. The paper counts generated tokens among the sinks.
    """

    name = "var"
    paper = "arXiv 2503.03321"
    summary = "moves attention from sinks to the rest of the image, in rows that look at the image"
    edits_weights = True
    reads_layer_input = True
    default_layers = all_but("all but the first two and the last", first=2, last=1)

    sink_dims: Sequence[int] | None = parameter(
        None,
        low=0,
        off=(),
        expected="indices >= 0 of hidden dimensions",
        help="Hidden dimensions that mark sinks. ``None``: those known for the language model, else found by "
        "``vlmfix.find_sink_dims`` when the model is patched. Without any, nothing is edited.",
    )
    sink_threshold: float = parameter(
        20.0, above=0, help="tau. No token of a model narrower than tau squared can reach it."
    )
    nonsink_ratio: float = parameter(
        0.5, low=0, high=1, search=Range(0.2, 1.0), help="rho in the paper's sense (the released code uses 1 - rho)."
    )
    image_mass: float = parameter(
        0.2, low=0, high=1, search=Range(0.05, 0.5), help="Least attention on the image for a row to be edited."
    )
    recycle: float = parameter(
        0.6,
        low=0,
        high=1,
        off=0,
        search=Range(0.1, 1.0),
        help="Recycled share of the attention to sinks. The paper's 0.6; the released configuration has 0.4.",
    )

    def bind(self, anatomy: Anatomy) -> VAR:
        """Resolve layers and sink dimensions."""
        bound = super().bind(anatomy)
        if self.sink_dims is None and self.recycle > 0:
            bound = dataclasses.replace(bound, sink_dims=sink_dims_for(anatomy))
        bound.require(
            all(dim < anatomy.hidden_size for dim in bound.sink_dims or ()),
            "sink_dims",
            f"below the model's hidden size {anatomy.hidden_size}",
        )
        return bound

    def notes(self, anatomy: Anatomy) -> tuple[str, ...]:
        """Say when no token of this model can be a sink."""
        if self.sink_dims == ():
            return ("var: no sink dimensions found in this model, nothing is edited",)
        if self.sink_threshold > math.sqrt(anatomy.hidden_size):
            limit = math.sqrt(anatomy.hidden_size)
            return (
                f"var: no token can reach sink_threshold={self.sink_threshold:g}: |x_d|/rms(x) <= {limit:.1f} here; "
                "vlmfix calibrate var finds one that is reached",
            )
        return ()

    def learn(self, hidden_states: torch.Tensor, layer: Layer) -> SinkMap:
        """Find the sinks among the new tokens ``[batch, q_len, hidden_size]`` and append them to the known ones."""
        forward = layer.forward
        image = forward.image_mask.to(hidden_states.device)
        sink = find_sinks(hidden_states, self.sink_dims or (), self.sink_threshold)
        past = image.shape[1] - sink.shape[1]
        sink &= forward.valid_mask[:, past:].to(sink.device)
        sink = extend_mask(None if layer.learned is None else layer.learned.sink, sink, past)
        return self._sink_map(sink, image)

    def _sink_map(self, sink: torch.Tensor, image: torch.Tensor) -> SinkMap:
        has_visual_sink = (sink & image).any(1)[:, None, None]
        groups = (torch.stack([image, image & ~sink, sink], dim=-1) & has_visual_sink).float()
        changes = self.recycle * torch.stack([-groups[..., 2], groups[..., 1]], dim=-1)
        return SinkMap(sink, groups, changes, has_visual_sink)

    def crop(self, learned: SinkMap, length: int) -> SinkMap:
        """Keep the first ``length`` tokens."""
        # Without a visual sink the groups are empty, and remain so.
        image, sink = learned.groups[:, :length, 0].bool(), learned.sink[:, :length]
        return dataclasses.replace(self._sink_map(sink, image), acts=learned.acts)

    def settle(self, learned: Mapping[int, Any]) -> None:
        """Learn which layers have a visual sink at all; the others keep the base kernel while decoding."""
        sink_maps: list[SinkMap] = list(learned.values())
        device = sink_maps[0].sink.device
        flags = torch.stack([sinks.has_visual_sink.any().to(device) for sinks in sink_maps])
        for sinks, acts in zip(sink_maps, flags.tolist(), strict=True):
            sinks.acts = acts

    def acts_at(self, layer: Layer) -> bool:
        """Whether the layer has a visual sink, as far as known."""
        return layer.learned is not None and layer.learned.acts

    def edit_weights(self, attn_weights: torch.Tensor, layer: Layer) -> EditedRows:
        """Redistribute ``[batch, num_heads, rows, keys]`` in the selected rows."""
        sinks: SinkMap = layer.learned
        groups = layer.visible_keys(sinks.groups, attn_weights.shape[-1])[:, None]
        known = attn_weights[..., : groups.shape[2]]
        masses = known @ groups
        image_mass, rest_mass, _ = masses.unbind(-1)
        smallest = torch.finfo(masses.dtype).tiny
        selected = (image_mass >= self.image_mass) & (
            rest_mass >= (self.nonsink_ratio * image_mass).clamp_min(smallest)
        )
        # Sinks lose a share of 1, the others gain one of (sink mass / rest mass).
        shares = masses[..., 1:] / masses[..., 1:2].clamp_min(smallest) * selected[..., None]
        changes = layer.visible_keys(sinks.changes, attn_weights.shape[-1])[:, None]
        change = shares @ changes.transpose(-1, -2)
        if attn_weights.requires_grad:
            return torch.cat([known * (1 + change), attn_weights[..., groups.shape[2] :]], dim=-1), selected
        known.addcmul_(known, change)
        return attn_weights, selected


def find_sinks(hidden_states: torch.Tensor, sink_dims: Sequence[int], threshold: float) -> torch.Tensor:
    """Return the sink tokens of one layer (section 3 of the paper; unweighted RMS in fp32, as in the released code).

    Args:
        hidden_states: Residual stream entering the layer, ``[..., hidden_size]``.
        sink_dims: Dimensions that mark sinks.
        threshold: tau.

    Returns:
        Bool ``[...]``.
    """
    peak, rms = _peak_and_rms(hidden_states, sink_dims)
    is_sink: torch.Tensor = peak >= threshold * rms
    return is_sink


def sink_values(hidden_states: torch.Tensor, sink_dims: Sequence[int]) -> torch.Tensor:
    """Return phi, how extreme hidden states ``[..., hidden_size]`` are in the sink dimensions: fp32 ``[...]``."""
    peak, rms = _peak_and_rms(hidden_states, sink_dims)
    return peak / rms


def _peak_and_rms(hidden_states: torch.Tensor, sink_dims: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = torch.promote_types(hidden_states.dtype, torch.float32)  # norms of fp64 are not taken in fp32
    rms = torch.linalg.vector_norm(hidden_states, dim=-1, dtype=dtype).float() / math.sqrt(hidden_states.shape[-1])
    peak = hidden_states[..., list(sink_dims)].abs().amax(-1).float()
    return peak, (rms.square() + 1e-6).sqrt()
