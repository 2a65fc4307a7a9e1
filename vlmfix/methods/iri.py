"""IRI: Intermediate Representation Injection (Causal Tracing of Object Representations in LVLMs, AAAI 2026)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import torch

from vlmfix.errors import MethodError
from vlmfix.methods.base import Method
from vlmfix.methods.measured import LayerRanking, how_to_rank
from vlmfix.methods.selection import Range, Space
from vlmfix.methods.views import PromptRows
from vlmfix.model.anatomy import Anatomy

if TYPE_CHECKING:
    from vlmfix.methods.views import Block
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
        """Rank layers by their rates; of equals, the first in the model first."""
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
    answer comes back when that block's clean output is put into a run on a corrupted image. The ``k1`` layers of
    highest rate are the sources S, the ``k2`` of highest rate the targets T. In every target, for the row that predicts
    the next token, ``u = c_l + lambda sum_{k in S, k < l} RR_k c_k`` and ``c_l <- u |c_l| / |u|``: the output turns and
    keeps its length. Computed in fp32. Rates below 0 count as 0, and sources are injected as they left their block,
    before an edit of their own (both ours; the paper leaves them open).

    Decoding with a cache defines the method: without one, tokens generated earlier would lose their edits.

    Attributes:
        lambda_a: Strength on attention outputs, >= 0. The paper's value for LLaVA-1.5-7B; .20 for Qwen-VL-Chat, .15 for
            LLaVA-NeXT.
        lambda_m: Strength on MLP outputs, >= 0. The paper's value for LLaVA-1.5-7B; .10 and .08 for the others.
        k1: Sources, >= 0.
        k2: Targets, >= 0.
        ranking: ``LayerRanking``, its dict, or a JSON file with it, read when a model is patched. Required; made by
            ``vlmfix.calibrate(model, 'iri', data)``, for one checkpoint. None are shipped.
        sources: ``"raw"``, or ``"edited"``: a source that is a target too is injected as it was edited.
        layers: Layers that may be sources or targets. Default: all.
    """

    name: ClassVar[str] = "iri"
    paper: ClassVar[str] = "arXiv 2511.05923"
    summary: ClassVar[str] = "adds block outputs that carry the object to those of later layers, at the last position"
    search_space: ClassVar[Space] = {"lambda_a": Range(0.02, 0.5), "lambda_m": Range(0.02, 0.4)}
    edits_blocks: ClassVar[tuple[BlockKind, ...]] = ("attention", "mlp")
    needs_cache: ClassVar[bool] = True

    lambda_a: float = 0.26
    lambda_m: float = 0.16
    k1: int = 3
    k2: int = 10
    ranking: LayerRanking | Mapping[str, Any] | str | None = None
    sources: Literal["raw", "edited"] = "raw"

    def __post_init__(self) -> None:
        """Read a ranking given as a dict, then check ranges."""
        if isinstance(self.ranking, Mapping):
            object.__setattr__(self, "ranking", LayerRanking.from_dict(self.ranking))
        elif isinstance(self.ranking, Path):
            object.__setattr__(self, "ranking", str(self.ranking))
        super().__post_init__()

    def validate(self) -> None:
        """Raise ``MethodError`` for a parameter out of range."""
        for parameter in ("lambda_a", "lambda_m"):
            self.require(0 <= getattr(self, parameter) < math.inf, parameter, "a finite number >= 0")
        for parameter in ("k1", "k2"):
            value = getattr(self, parameter)
            is_count = isinstance(value, int) and not isinstance(value, bool) and value >= 0
            self.require(is_count, parameter, "a whole number >= 0")
        known = self.ranking is None or isinstance(self.ranking, (LayerRanking, str))
        self.require(known, "ranking", "a LayerRanking, its dict, or the path of a JSON file")
        self.require(self.sources in ("raw", "edited"), "sources", "raw or edited")

    @property
    def is_identity(self) -> bool:
        """Whether nothing is injected: both strengths are 0, or there are no sources or no targets."""
        return self.lambda_a == 0 == self.lambda_m or self.k1 == 0 or self.k2 == 0

    @property
    def prompt_rows(self) -> PromptRows:
        """The last."""
        return "last"

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
                f"iri needs a ranking of this checkpoint's layers, and none is shipped. {how_to_rank(anatomy)}"
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

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form, the ranking included."""
        ranking = self.ranking.to_dict() if isinstance(self.ranking, LayerRanking) else self.ranking
        return super().to_dict() | {"ranking": ranking}

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
