"""MemVR, section (a): the first unsure layer's MLP looks at the image's tokens, ``a = sum_p (x . z_p) z_p``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from naive.dola import probabilities
from naive.reference import Naive, Row


class NaiveMemvr(Naive):
    def __init__(self, layers: Sequence[int], ratio: float = 0.12, threshold: float = 0.75, text: bool = False) -> None:
        super().__init__(layers)
        self.ratio, self.threshold, self.text = ratio, threshold, text

    def mlps(self, rows: Sequence[Row], entered: list[torch.Tensor], added: list[torch.Tensor]) -> list[torch.Tensor]:
        """All rows in hand are one forward: a prompt, or one generated token."""
        sequence, layer = rows[0].sequence, rows[0].layer
        forward = sequence.notes.setdefault((self, rows[-1].position), {})
        forward[layer] = unsureness(rows[-1]) > self.threshold
        if not forward[layer] or any(forward[each] for each in forward if each < layer):
            return added
        image = [sequence.embeds[j].tolist() for j in sequence.image()]
        chosen = [i for i, row in enumerate(rows) if row.is_behind_the_image or not self.text]
        looks = {i: retraced(entered[i].tolist(), image) for i in chosen}
        outputs = {i: added[i].tolist() for i in chosen}
        scale = mean_size(list(outputs.values())) / mean_size(list(looks.values()))
        for i in chosen:
            pairs = zip(outputs[i], looks[i], strict=True)
            added[i] = torch.tensor([(1 - self.ratio) * f + self.ratio * a * scale for f, a in pairs])
        return added


def unsureness(row: Row) -> float:
    logits = row.reference.read(row.reference.language_model.norm(row.state[None])[0]).tolist()
    return -sum(p * math.log(p) for p in probabilities(sorted(logits)[-10:])) / math.log(10)


def retraced(x: Sequence[float], image: Sequence[Sequence[float]]) -> list[float]:
    looks = [sum(a * b for a, b in zip(x, z, strict=True)) for z in image]
    return [sum(look * z[d] for look, z in zip(looks, image, strict=True)) for d in range(len(x))]


def mean_size(vectors: Sequence[Sequence[float]]) -> float:
    return sum(abs(each) for vector in vectors for each in vector)


CASES: list[tuple[dict[str, Any], NaiveMemvr]] = [
    ({"layers": ":"}, NaiveMemvr(range(4))),
    ({"layers": ":", "ratio": 0.6, "threshold": 0.95}, NaiveMemvr(range(4), 0.6, 0.95)),
    ({"layers": "1:", "ratio": 0.4, "threshold": 0.96, "rows": "text"}, NaiveMemvr([1, 2, 3], 0.4, 0.96, text=True)),
]
