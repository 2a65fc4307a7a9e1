"""IRI: Intermediate Representation Injection (Causal Tracing of Object Representations in LVLMs, AAAI 2026)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

import torch

from vlmfix.errors import MethodError
from vlmfix.methods.base import Method
from vlmfix.methods.measured import LayerRanking, how_to_measure
from vlmfix.methods.parameters import Range, is_off, parameter
from vlmfix.methods.views import Block
from vlmfix.model.anatomy import Anatomy
from vlmfix.model.blocks import BlockKind


class Plan(NamedTuple):
    """Which layers of one kind of block give, and which take.

    Attributes:
        sources: Recovery rates of the sources, all > 0, by layer.
        targets: The targets.
    """

    sources: dict[int, float]
    targets: frozenset[int]

    @classmethod
    def of(cls, rates: Sequence[float], layers: Sequence[int], k1: int, k2: int) -> Plan:
        """Rank layers by descending rate; ties in model order."""
        ranked = sorted(layers, key=lambda layer: (-rates[layer], layer))
        return cls({layer: rates[layer] for layer in sorted(ranked[:k1]) if rates[layer] > 0}, frozenset(ranked[:k2]))

    @property
    def acts(self) -> bool:
        """Whether any target lies above a source."""
        return bool(self.sources) and max(self.targets) > min(self.sources)


@dataclass(frozen=True)
class IRI(Method):
    """Add the outputs of the blocks that carry the object to those of later blocks, at the last position.

    Causal tracing measures, per layer and for attention and MLP apart, the recovery rate ``RR_l``: which share of the
    answer comes back when that block's clean output is put into a forward on a corrupted image. The ``k1`` layers of
    highest rate are the sources S, the ``k2`` of highest rate the targets T; both are among ``layers``. In every
    target, for the row that predicts the next token, ``u = c_l + lambda sum_{k in S, k < l} RR_k c_k`` and
    ``c_l <- u |c_l| / |u|``: the output turns and keeps its length. This is computed in fp32.

    No code was released, and no rates: they are measured anew. The paper leaves two things open, which are ours: rates
    below 0 count as 0, and sources are injected as they left their block, before an edit of their own.
    """

    name = "iri"
    paper = "arXiv 2511.05923"
    summary = "adds block outputs that carry the object to those of later layers, at the last position"
    edits_blocks = ("attention", "mlp")
    prompt_rows = "last"

    lambda_a: float = parameter(
        0.26,
        low=0,
        search=Range(0.02, 0.5),
        help="Strength on attention outputs. The paper's value for LLaVA-1.5-7B; 0.20 for Qwen-VL-Chat, 0.15 for "
        "LLaVA-NeXT. With ``lambda_m``, 0 switches the method off.",
    )
    lambda_m: float = parameter(
        0.16,
        low=0,
        search=Range(0.02, 0.4),
        help="Strength on MLP outputs. The paper's value for LLaVA-1.5-7B; 0.10 and 0.08 for the others.",
    )
    k1: int = parameter(3, low=0, off=0, help="Number of sources.")
    k2: int = parameter(10, low=0, off=0, help="Number of targets.")
    ranking: LayerRanking | Mapping[str, Any] | str | None = parameter(
        None,
        expected="a LayerRanking, its dict, or the path of a JSON file",
        help="``LayerRanking``, its dict, or a JSON file with it, read when a model is patched. Required; made by "
        "``vlmfix.calibrate(model, 'iri', data)``, for one checkpoint. None are shipped.",
    )
    sources: Literal["raw", "edited"] = parameter(
        "raw", help='``"raw"``, or ``"edited"``: a source that is a target too is injected as it was edited.'
    )

    @property
    def is_identity(self) -> bool:
        """Whether nothing is injected: both strengths are 0, or there are no sources or no targets."""
        return self.lambda_a == 0 == self.lambda_m or is_off(self)

    def bind(self, anatomy: Anatomy) -> IRI:
        """Resolve layers and ranking.

        Raises:
            MethodError: No ranking, or that of another checkpoint.
        """
        bound = super().bind(anatomy)
        if self.is_identity:
            return bound
        if self.ranking is None:
            raise MethodError(
                "iri needs a ranking of this checkpoint's layers, and none is shipped. "
                f"{how_to_measure('iri', anatomy)}"
            )
        ranking = LayerRanking.load(self.ranking) if isinstance(self.ranking, str) else self.ranking
        assert isinstance(ranking, LayerRanking)
        ranking.check(anatomy)
        bound = dataclasses.replace(bound, ranking=ranking)
        involved = {layer for plan in bound.plans.values() for layer in (*plan.sources, *plan.targets)}
        return dataclasses.replace(bound, layers=tuple(sorted(involved)))

    def notes(self, anatomy: Anatomy) -> tuple[str, ...]:
        """Say when nothing is injected."""
        if self.is_identity:
            return ()
        idle = [kind for kind, plan in self.plans.items() if self.strength(kind) > 0 and not plan.acts]
        return tuple(f"iri: no target of the {kind} blocks lies above a source; nothing is injected" for kind in idle)

    @cached_property
    def plans(self) -> dict[BlockKind, Plan]:
        """Sources and targets of a bound method; empty without a ranking."""
        if not isinstance(self.ranking, LayerRanking):
            return {}
        rates: dict[BlockKind, Sequence[float]] = {"attention": self.ranking.rr_attn, "mlp": self.ranking.rr_mlp}
        return {kind: Plan.of(rates[kind], self.layer_indices, self.k1, self.k2) for kind in rates}

    def strength(self, kind: BlockKind) -> float:
        """Return the strength on one kind of block."""
        return self.lambda_a if kind == "attention" else self.lambda_m

    def edit_block(self, states: torch.Tensor, block: Block) -> torch.Tensor:
        """Inject the sources below into ``[batch, rows, hidden_size]``."""
        plan, at, scratch = self.plans[block.kind], block.layer_idx, block.scratch
        edited = states
        below = [layer for layer in plan.sources if layer < at]
        if at in plan.targets and below and self.strength(block.kind) > 0:
            total = sum(plan.sources[layer] * scratch[block.kind, layer].to(states.device) for layer in below)
            edited = turned(states.float(), self.strength(block.kind) * total)
        if at in plan.sources:
            scratch[block.kind, at] = (edited if self.sources == "edited" else states).float()
        return edited


def turned(states: torch.Tensor, added: torch.Tensor) -> torch.Tensor:
    """Add vectors to vectors and keep the lengths of the latter, fp32 ``[..., size]``; a zero vector stays zero."""
    moved = states + added
    length = torch.linalg.vector_norm(moved, dim=-1, keepdim=True)
    scale = torch.linalg.vector_norm(states, dim=-1, keepdim=True) / length
    return torch.where(length > 0, moved * scale, states)
