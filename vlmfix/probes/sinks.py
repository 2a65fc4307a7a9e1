"""Sinks of a prompt: tokens that draw attention, and tokens whose hidden state marks them as sinks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vlmfix.errors import MethodError
from vlmfix.methods.base import Method
from vlmfix.methods.var import sink_values
from vlmfix.methods.views import Layer
from vlmfix.model.sink_dims import sink_dims_for
from vlmfix.observe.ask import Subject, look_at
from vlmfix.observe.watch import AttentionWatch, InputWatch
from vlmfix.observe.words import prompt_tokens
from vlmfix.probes.result import ProbeResult


@dataclass(frozen=True, eq=False)
class Sinks(ProbeResult):
    """The sinks of a prompt.

    Attributes:
        received: fp32 ``[batch, layers, num_heads, tokens]``: the mean weight a token gets from the rows that may see
            it. 0 for padding.
        attention_sinks: Bool, same shape: above ``attention_threshold / N`` (N tokens in the prompt) in the mean over
            at least ``min_rows`` rows (ACT, arXiv 2406.15765; the first token is not excepted here).
        values: fp32 ``[batch, layers, tokens]``: phi, ``max_d |x_d| / rms(x)`` of the residual stream entering the
            layer, over the sink dimensions (VAR, arXiv 2503.03321). 0 for padding and where there are no dimensions.
        hidden_sinks: Bool, same shape: ``phi >= hidden_threshold``.
        value_norms: fp32 ``[batch, layers, num_heads, tokens]``: length of the value that each head reads at a token
            (the heads of a group read the same one). 0 for padding.
        residual_norms: fp32 ``[batch, layers, tokens]``: length of the residual stream entering the layer. 0 for
            padding.
        is_image: Bool ``[batch, tokens]``: visual tokens; the others are text.
        is_token: Bool ``[batch, tokens]``: tokens that are not padding.
        sink_dims: The dimensions.
        attention_threshold: See ``attention_sinks``.
        hidden_threshold: See ``hidden_sinks``.
    """

    received: torch.Tensor
    attention_sinks: torch.Tensor
    values: torch.Tensor
    hidden_sinks: torch.Tensor
    value_norms: torch.Tensor
    residual_norms: torch.Tensor
    is_image: torch.Tensor
    is_token: torch.Tensor
    sink_dims: tuple[int, ...]
    attention_threshold: float
    hidden_threshold: float

    def counts(self) -> dict[str, torch.Tensor]:
        """Return how many sinks each layer has, int64 ``[batch, layers]``, by kind.

        An attention sink counts where it is one in at least half of the heads.
        """
        attention = self.attention_sinks.float().mean(2) >= 0.5
        image = self.is_image[:, None]
        return {
            "attention, visual": (attention & image).sum(-1),
            "attention, text": (attention & ~image).sum(-1),
            "hidden, visual": (self.hidden_sinks & image).sum(-1),
            "hidden, text": (self.hidden_sinks & ~image).sum(-1),
        }

    def sink_rate(self, epsilon: float = 0.3) -> torch.Tensor:
        """Return the share of all heads of all layers in which a token is a sink, fp32 ``[batch, tokens]``.

        That is the sink metric of Gu et al. (ICLR 2025, arXiv 2410.10781): the mean over layers and heads of
        ``1[alpha_k > epsilon]``, with alpha_k the mean weight of token k over the rows from k on (``received``). The
        paper takes ``epsilon = 0.3`` and reports the first token's. Tokens that are seen by few rows say little.
        """
        return (self.received > epsilon).float().mean((1, 2))

    def value_drains(self) -> torch.Tensor:
        """Return each token's ``value_norms`` over the prompt's median, fp32 ``[batch, layers, num_heads, tokens]``.

        Far below 1 at a sink: a value-state drain (Guo et al., arXiv 2410.13835). Heads look at it to add nothing. NaN
        for padding and in samples without an image.
        """
        return self._over_median(self.value_norms)

    def residual_peaks(self) -> torch.Tensor:
        """Return each token's ``residual_norms`` over the prompt's median, fp32 ``[batch, layers, tokens]``.

        Far above 1 at a sink: a residual-state peak (Guo et al., arXiv 2410.13835). NaN as in ``value_drains``.
        """
        return self._over_median(self.residual_norms)

    def _over_median(self, norms: torch.Tensor) -> torch.Tensor:
        """Divide lengths ``[batch, ..., tokens]`` by their median over a prompt's tokens."""
        shown = self.is_token & self.is_image.any(1, keepdim=True)
        known = norms.masked_fill(~shown.view(len(norms), *(1,) * (norms.dim() - 2), -1), float("nan"))
        return known / known.nanmedian(-1, keepdim=True).values

    def plot(self, ax: Any = None, *, sample: int = 0, kind: str = "attention", **options: Any) -> Any:
        """Draw, by layer and token, the attention received (mean over heads), or phi with ``kind="hidden"``."""
        if kind not in ("attention", "hidden"):
            raise MethodError(f"kind must be 'attention' or 'hidden', got {kind!r}.")
        values = self.received[sample].mean(1) if kind == "attention" else self.values[sample]
        label = "attention received" if kind == "attention" else "phi"
        values = values[:, self.is_token[sample]]
        return self._map(ax, values, xlabel="prompt token", label=label, title=f"{kind} sinks")


class ReceivedLog:
    """The attention that every token of a prompt receives, summed up over rows; by layer, on the CPU.

    Attributes:
        sums: fp32 ``[batch, num_heads, tokens]``.
        rows: Over how many rows, ``[batch, tokens]``.
        value_norms: Length of what each head reads there, fp32 ``[batch, num_heads, tokens]``.
    """

    def __init__(self) -> None:
        self.sums: dict[int, torch.Tensor] = {}
        self.rows: dict[int, torch.Tensor] = {}
        self.value_norms: dict[int, torch.Tensor] = {}

    def see(self, attn_weights: torch.Tensor, allowed: torch.Tensor, layer: Layer) -> None:
        """Add rows of ``[batch, num_heads, rows, keys]`` of a prompt."""
        at = layer.site.layer_idx
        assert layer.row_mask is not None
        counted = layer.row_mask[:, None, :, None].to(attn_weights.device)
        length = layer.forward.image_mask.shape[1]
        sums = (attn_weights * counted).sum(2)[..., :length].float().cpu()
        rows = (allowed & counted).expand(-1, -1, -1, attn_weights.shape[-1])[:, 0].sum(1)[:, :length].cpu()
        self.sums[at] = self.sums.get(at, 0) + sums
        self.rows[at] = self.rows.get(at, 0) + rows
        if at not in self.value_norms:
            norms = torch.linalg.vector_norm(layer.call.value[:, :, :length], dim=-1, dtype=torch.float32).cpu()
            self.value_norms[at] = norms.repeat_interleave(sums.shape[1] // norms.shape[1], dim=1)


def prompt_states(
    subject: Subject, inputs: Mapping[str, Any], sink_dims: Sequence[int], layers: Sequence[int], *watches: Method
) -> tuple[torch.Tensor, torch.Tensor]:
    """Let a prompt be read, and return phi and the length of its tokens' hidden states.

    Args:
        subject: The model.
        inputs: What ``model.generate`` takes, left-padded.
        sink_dims: Hidden dimensions that mark sinks; without any, phi is 0.
        layers: Layers to look at.
        *watches: What else watches.

    Returns:
        fp32 ``[batch, layers, tokens]`` on the CPU, twice; 0 for padding and in samples without an image.
    """
    values, lengths = ({at: torch.zeros(inputs["input_ids"].shape) for at in layers} for _ in range(2))

    def see(hidden_states: torch.Tensor, layer: Layer) -> None:
        lengths[layer.site.layer_idx] = torch.linalg.vector_norm(hidden_states, dim=-1, dtype=torch.float32).cpu()
        if sink_dims:
            values[layer.site.layer_idx] = sink_values(hidden_states, sink_dims).cpu()

    subject.answer(inputs, *watches, InputWatch(see, layers=layers))
    tokens = prompt_tokens(subject.anatomy, inputs)
    is_shown = (tokens.valid & tokens.image.any(1, keepdim=True))[:, None].cpu()
    phi, length = (torch.stack(list(found.values()), dim=1) * is_shown for found in (values, lengths))
    return phi, length


@torch.no_grad()
def sinks(
    model: object,
    inputs: Mapping[str, Any],
    *,
    layers: Sequence[int] | str | None = None,
    attention_threshold: float = 5.0,
    hidden_threshold: float = 20.0,
    sink_dims: Sequence[int] | None = None,
    min_rows: int = 8,
) -> Sinks:
    """Find the tokens of a prompt that draw attention, and those whose hidden state marks a sink.

    Attention is written out for all rows of the prompt, a piece at a time; only column sums are kept.

    Args:
        model: The model, patched or not.
        inputs: What ``model.generate`` takes, left-padded. A sample without an image has no figures (all 0).
        layers: Layers to look at, see ``LayerSpec``. Default: all.
        attention_threshold: An attention sink of a head receives more than this, divided by the number of tokens.
        hidden_threshold: tau. No token of a model narrower than tau squared can reach it.
        sink_dims: Hidden dimensions that mark sinks. Default: those known for the language model, else found by
            ``vlmfix.find_sink_dims``.
        min_rows: Tokens seen by fewer rows are no attention sinks: their mean says little.

    Raises:
        UnsupportedFeatureError: See ``look_at``; or a layer adds terms to its scores that cannot be written out.
        MethodError: A threshold or dimension out of range, or ``layers`` that this model does not have.
    """
    if attention_threshold <= 0 or hidden_threshold <= 0 or min_rows < 1:
        raise MethodError(
            "Thresholds must be > 0 and min_rows at least 1, got "
            f"{attention_threshold}, {hidden_threshold}, {min_rows}."
        )
    subject = look_at(model, "sinks", inputs)
    wanted = subject.layers(layers)
    dims = sink_dims_for(subject.anatomy) if sink_dims is None else tuple(sink_dims)
    if any(not 0 <= dim < subject.anatomy.hidden_size for dim in dims):
        raise MethodError(f"sink_dims must lie below the hidden size {subject.anatomy.hidden_size}, got {dims}.")
    log = ReceivedLog()
    watch = AttentionWatch(log.see, "all", layers=wanted)
    values, lengths = prompt_states(subject, inputs, dims, wanted, watch)
    tokens = prompt_tokens(subject.anatomy, inputs)
    batch, length = tokens.valid.shape
    nothing = torch.zeros(batch, subject.anatomy.num_heads, length)  # without any image in the batch
    sums = torch.stack([log.sums.get(at, nothing) for at in wanted], dim=1)
    rows = torch.stack([log.rows.get(at, nothing[:, 0]) for at in wanted], dim=1)[:, :, None]
    is_token, is_image = tokens.valid.cpu(), tokens.image.cpu()
    is_shown = (is_token & is_image.any(1, keepdim=True))[:, None]
    received = sums / rows.clamp_min(1) * is_shown[:, :, None]
    value_norms = torch.stack([log.value_norms.get(at, nothing) for at in wanted], dim=1) * is_shown[:, :, None]
    limit = attention_threshold / is_token.sum(1).clamp_min(1)[:, None, None, None]
    return Sinks(
        wanted,
        subject.patch,
        received=received,
        attention_sinks=(received > limit) & (rows >= min_rows),
        values=values,
        hidden_sinks=values >= hidden_threshold,
        value_norms=value_norms,
        residual_norms=lengths,
        is_image=is_image,
        is_token=is_token,
        sink_dims=dims,
        attention_threshold=attention_threshold,
        hidden_threshold=hidden_threshold,
    )
