"""FIA: local and summary image tokens by the vision tower's class token; last row, all heads."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence

import torch

from naive.reference import Naive, Reference, Row, State

MASKS = {"attention_mask", "causal_attention_mask"}


class NaiveFia(Naive):
    def __init__(
        self,
        layers: Sequence[int],
        alpha: float = 0.7,
        beta: float = 0.4,
        ratio: float = 0.15,
        factors: Sequence[Sequence[float]] = ((1.0,) * 4,) * 4,
    ) -> None:
        super().__init__(layers)
        self.alpha, self.beta, self.ratio, self.factors = alpha, beta, ratio, factors

    def begin(self, sequence: State, reference: Reference) -> None:
        tower = reference.model.model.vision_tower
        gains: list[float] = []
        for picture in sequence.pictures:
            first, penultimate = class_token_rows(tower, picture)
            gains += self.one_image(first, penultimate)
        sequence.notes["gain"] = dict(zip(sequence.image(), gains, strict=True))

    def one_image(self, first: list[float], penultimate: list[float]) -> list[float]:
        patches = range(len(first))
        local = sorted(patches, key=lambda j: -first[j])[: int(self.ratio * len(first))]
        q1, q3 = quantile(penultimate, 0.25), quantile(penultimate, 0.75)
        count = sum(value > q3 + 1.5 * (q3 - q1) for value in penultimate)
        summary = sorted(patches, key=lambda j: -penultimate[j])[:count]
        return [self.beta if j in summary else self.alpha if j in local else 0.0 for j in patches]

    def scores(self, row: Row, scores: torch.Tensor) -> torch.Tensor:
        if not row.predicts:
            return scores
        edited = scores.clone()
        for j, gain in row.sequence.notes["gain"].items():
            for head in range(len(scores)):
                s = float(scores[head, j])
                if s > float("-inf"):
                    edited[head, j] = s + self.factors[row.layer][head] * gain * abs(s)
        return edited


def quantile(values: Sequence[float], share: float) -> float:
    ranked = sorted(values)
    place = share * (len(ranked) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ranked) - 1)
    return ranked[low] + (place - low) * (ranked[high] - ranked[low])


@torch.no_grad()
def class_token_rows(tower, picture: torch.Tensor) -> tuple[list[float], list[float]]:
    """The class token's weights on the patches, summed over heads, in the first and the second-to-last layer."""
    tower = getattr(tower, "vision_model", tower)  # transformers 4
    states = tower.pre_layrnorm(tower.embeddings(picture[None]))
    rows = []
    for layer in tower.encoder.layers:
        attention = layer.self_attn
        x = layer.layer_norm1(states)[0]
        query, key = attention.q_proj(x), attention.k_proj(x)
        size = attention.head_dim
        total = [0.0] * (len(x) - 1)
        for head in range(attention.num_heads):
            part = slice(head * size, (head + 1) * size)
            logits = [float(query[0, part] @ key[j, part]) / math.sqrt(size) for j in range(len(x))]
            top = max(logits)
            exps = [math.exp(logit - top) for logit in logits]
            total = [t + exps[1 + j] / sum(exps) for j, t in enumerate(total)]
        rows.append(total)
        masks = dict.fromkeys(inspect.signature(layer.forward).parameters.keys() & MASKS)
        states = layer(states, **masks)
        states = states[0] if isinstance(states, tuple) else states
    return rows[0], rows[-2]


FACTORS = ((1.0, 2.0, 0.0, 0.5), (0.0, 0.0, 3.0, 1.0), (1.0, 1.0, 1.0, 1.0), (0.2, 0.4, 0.6, 0.8))
CASES = [
    ({"layers": ":", "local_ratio": 0.5}, NaiveFia(range(4), ratio=0.5)),
    ({"beta": 0.0, "layers": "1:", "local_ratio": 0.5}, NaiveFia([1, 2, 3], beta=0.0, ratio=0.5)),
    ({"alpha": 0.3, "beta": 1.2, "layers": ":", "local_ratio": 0.9}, NaiveFia(range(4), 0.3, 1.2, 0.9)),
    ({"layers": ":", "local_ratio": 0.5, "head_factors": FACTORS}, NaiveFia(range(4), ratio=0.5, factors=FACTORS)),
]
