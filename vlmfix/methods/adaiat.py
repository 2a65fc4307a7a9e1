"""AdaIAT: Adaptive IAT (Zhong, He, Zheng, Li, Wang and Kang, CVPR 2026, arXiv 2603.04908)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from vlmfix.errors import MethodError
from vlmfix.methods.measured import HeadStatistics
from vlmfix.methods.parameters import Range, parameter
from vlmfix.methods.scores import RaisesGeneratedText
from vlmfix.methods.views import EditedRows, Layer
from vlmfix.model.anatomy import Anatomy
from vlmfix.model.attention import visible_keys


@dataclass(frozen=True)
class AdaIAT(RaisesGeneratedText):
    """Raise the attention to generated text where it is low, more in heads that tell real from hallucinated objects.

    G are the tokens generated since the prompt that a row sees, its own included. In the row of each generated token,
    in layer l: ``ref = sum_h mean_{j in G} A_hj``; if ``ref < Hal_l + beta (Real_l - Hal_l)``, then
    ``A_hj <- max(0, 1 + alpha (M_lh - 1)) A_hj`` for j in G, and the row is divided by its sum. ``M_lh`` is the mean
    attention per generated token at real objects over that at hallucinated ones; ``Real_l`` and ``Hal_l`` are the two
    summed over heads. The prompt and prompts without an image are not touched.

    This is decided per sample, layer and row; the release sums ``ref`` over a batch. The release has no clamp at 0
    either, so that some of its weights are negative, and takes everything from position 625 on for generated text. Its
    statistics are not shipped, and the code that made them was not released: ``vlmfix calibrate adaiat`` is ours. The
    paper writes another factor, see ``m_form``. For Qwen2.5-VL-7B the release edits layers 5 to 15.
    """

    name = "adaiat"
    paper = "arXiv 2603.04908"
    summary = "raises attention to the text generated so far, gated per layer, scaled per head"
    edits_weights = True

    alpha: float = parameter(
        6.0,
        low=0,
        off=0,
        search=Range(0.5, 12.0),
        help="Strength. The released 6 for LLaVA-1.5-7B (9 for Qwen2.5-VL-7B).",
    )
    beta: float = parameter(
        0.5,
        search=Range(0.1, 1.0),
        help="Where the threshold lies between hallucinated (0) and real (1). The released 0.5 (0.25 for "
        "Qwen2.5-VL-7B).",
    )
    statistics: HeadStatistics | Mapping[str, Any] | str | None = parameter(
        None,
        expected="HeadStatistics, its dict, or the path of a JSON file",
        help="``HeadStatistics``, its dict, or a JSON file with it, read when a model is patched. Required; made by "
        "``vlmfix.calibrate(model, 'adaiat', data)``. None are shipped.",
    )
    m_form: Literal["minus_one", "paper"] = parameter(
        "minus_one", help='``"minus_one"`` as released; ``"paper"``: factors ``1 + alpha M``, as the paper writes them.'
    )
    gate: Literal["mean", "share"] = parameter(
        "mean",
        help='``"mean"`` as released. A mean over n keys is at most 1/n, so that long texts open the gate by '
        'themselves; ``"share"`` (ours) compares the sum over G, and needs statistics of that kind.',
    )

    def bind(self, anatomy: Anatomy) -> AdaIAT:
        """Resolve layers and statistics.

        Raises:
            MethodError: No statistics, those of another model, or of another kind.
        """
        bound = super().bind(anatomy)
        if self.is_identity:
            return bound
        statistics = HeadStatistics.load(self.statistics) if isinstance(self.statistics, str) else self.statistics
        again = "Make them with vlmfix.calibrate(model, 'adaiat', data)."
        if not isinstance(statistics, HeadStatistics):
            raise MethodError(f"adaiat needs statistics of how this model's heads attend to generated text. {again}")
        if statistics.shape != (anatomy.num_layers, anatomy.num_heads):
            raise MethodError(
                f"adaiat: statistics of {statistics.shape[0]} layers with {statistics.shape[1]} heads do not belong to "
                f"this model of {anatomy.num_layers} layers with {anatomy.num_heads} heads. {again}"
            )
        if statistics.kind != self.gate:
            raise MethodError(f"adaiat: gate={self.gate!r} needs statistics of that kind, not {statistics.kind!r}.")
        here = {site.layer_idx for site in anatomy.sites} & set(bound.layer_indices)
        missing = [layer for layer in sorted(here) if min(statistics.hallucinated[layer]) == 0]
        if missing:
            raise MethodError(f"adaiat: the statistics hold zeros for layers {missing}. {again}")
        return dataclasses.replace(bound, statistics=statistics)

    def notes(self, anatomy: Anatomy) -> tuple[str, ...]:
        """Say when the layers are wider than the paper's, or the statistics were measured on another model."""
        notes = super().notes(anatomy)
        measured = self.statistics.model if isinstance(self.statistics, HeadStatistics) else ""
        name = str(getattr(anatomy.model.config, "_name_or_path", ""))
        if measured and name and measured != name:
            notes += (f"adaiat: the statistics were measured on {measured!r}, this model is {name!r}",)
        return notes

    def acts_at(self, layer: Layer) -> bool:
        """Whether the gate can open at all."""
        return self._constants(layer)[1] > 0

    def edit_weights(self, attn_weights: torch.Tensor, layer: Layer) -> EditedRows:
        """Scale the generated columns of ``[batch, num_heads, rows, keys]`` where the gate is open."""
        factor, threshold = self._constants(layer)
        generated = layer.keys("generated", attn_weights)[:, None, None]
        share = (attn_weights * generated).sum(-1)
        ref = share.sum(1, keepdim=True)
        if self.gate == "mean":
            visible = visible_keys(layer.call, *layer.rows)
            seen = generated if visible is None else generated & visible
            ref = (share / seen.sum(-1).clamp_min(1)).sum(1, keepdim=True)
        total = 1 + (factor - 1) * share
        edited = (ref < threshold) & (factor != 1) & (total > torch.finfo(total.dtype).eps)
        scale = (
            torch.where(generated, factor[..., None], 1.0) / total.clamp_min(torch.finfo(total.dtype).eps)[..., None]
        )
        return torch.where(edited[..., None], attn_weights * scale, attn_weights), edited

    def _constants(self, layer: Layer) -> tuple[torch.Tensor, float]:
        """Return the factors, fp32 ``[num_heads, 1]``, and the threshold of a layer."""
        constants: tuple[torch.Tensor, float] = layer.constant(lambda: self._make_constants(layer))
        return constants

    def _make_constants(self, layer: Layer) -> tuple[torch.Tensor, float]:
        assert isinstance(self.statistics, HeadStatistics)
        at = layer.site.layer_idx
        offset = 1.0 if self.m_form == "minus_one" else 0.0
        factors = [max(0.0, 1 + self.alpha * (ratio - offset)) for ratio in self.statistics.ratios(at)]
        return torch.tensor(factors, device=layer.call.query.device)[:, None], self.statistics.threshold(at, self.beta)
