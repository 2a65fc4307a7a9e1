"""OPERA, sections (a), (b) and (e): one prompt, full forwards without a cache, explicit products of columns."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from families.tiny_llava import IMAGE

from naive.guidance import log_probabilities


class NaiveOpera:
    def __init__(
        self,
        *,
        mode: str = "official",
        beams: int = 3,
        sigma: float = 50.0,
        threshold: float = 15,
        candidates: int = 5,
        weight: float = 1.0,
        first: int = 10,
    ) -> None:
        self.mode, self.beams, self.sigma, self.threshold = mode, beams, sigma, threshold
        self.candidates, self.weight, self.first = candidates, weight, first

    @torch.no_grad()
    def look(self, model: Any, ids: list[int], pixels: torch.Tensor) -> tuple[list[float], list[list[float]]]:
        """The logits behind a sequence, and every row of the last layer: maximum over heads, sum 1."""
        embeds = model.get_input_embeddings()(torch.tensor([ids])).clone()
        features = model.get_image_features(pixel_values=pixels)
        prompt = [place for place, token in enumerate(ids) if token == IMAGE][: 9 * len(pixels)]
        embeds[0, prompt] = torch.cat(list(getattr(features, "pooler_output", features)))
        out = model(inputs_embeds=embeds, use_cache=False, output_attentions=True)
        rows = out.attentions[-1][0].double().amax(0)
        return out.logits[0, -1].tolist(), (rows / rows.sum(-1, keepdim=True)).tolist()

    def products(self, rows: list[list[float]], prompt: int) -> list[float]:
        """s_j over the answer: the product of column j from row j down."""
        answer = range(prompt, len(rows))
        return [math.prod(self.sigma * rows[i][j] for i in range(j, len(rows))) for j in answer]

    def search(
        self, stock: Any, ids: Sequence[int], pixels: torch.Tensor, tokens: int, suppress: Sequence[int]
    ) -> tuple[list[int], float, int]:
        """The best answer, its score per token, and how often the search went back."""
        model = copy.deepcopy(stock)
        model.set_attn_implementation("eager")
        prompt = len(ids)
        image = [place for place, token in enumerate(ids) if token == IMAGE]
        states: list[Any] = [[(list(ids), 0.0)] + [(list(ids), -1e9)] * (self.beams - 1)]
        peaks: dict[int, list[int]] = {}
        chosen: dict[int, set[tuple[int, int]]] = {}
        rejected: dict[int, set[tuple[int, int]]] = {}
        visits: Counter[int] = Counter()
        returns, last, freely = 0, 0, False
        while True:
            now = len(states) - 1
            logits = [self.look(model, beam, pixels)[0] for beam, _ in states[-1]]
            free = freely
            if freely:
                official = self.mode == "official"
                scored = []
                for b, row in enumerate(logits):
                    hidden = min(row) if official else -math.inf  # of this beam alone
                    scored.append([hidden if (b, t) in rejected[now] else value for t, value in enumerate(row)])
                freely = False
            else:
                scored, peaks[now] = self.penalised(model, states[-1], logits, pixels, prompt, image)
                place = most_common(peaks[now])
                back = self.way_back(peaks, place, now, last, visits)
                if back is not None:
                    visits[back] += 1
                    returns += 1
                    last = place
                    rejected = {step: pairs for step, pairs in rejected.items() if step <= back}
                    rejected.setdefault(back, set()).update(chosen[back])
                    states = states[: back + 1]
                    # What was recorded at the place to choose again stays; the free choice records nothing.
                    peaks = {step: each for step, each in peaks.items() if step <= back}
                    freely = True
                    continue
            options = []
            for b, (_, score) in enumerate(states[-1]):
                probs = log_probabilities(scored[b]) if self.mode == "official" or free else scored[b]
                options += [
                    (score + value, b, t) for t, value in enumerate(probs) if t not in suppress and value > -1e8
                ]
            options.sort(key=lambda each: (-each[0], each[1], each[2]))
            best = options[: self.beams]
            if now + 1 == tokens:
                score, b, t = best[0]
                return [*states[-1][b][0][prompt:], t], score / tokens, returns
            chosen[now] = {(b, t) for _, b, t in best}
            states.append([([*states[-1][b][0], t], score) for score, b, t in best])

    def way_back(
        self, peaks: dict[int, list[int]], place: int, now: int, last: int, visits: Counter[int]
    ) -> int | None:
        """The position to choose again, if every beam had its maximum at a place too often."""
        times = [sum(peaks[step][b] == place for step in peaks) for b in range(self.beams)]
        official = self.mode == "official"
        if not all(t > self.threshold if official else t >= self.threshold for t in times):
            return None
        if place < (self.first if official else last) or place + 1 >= now:
            return None
        return next((p for p in (place + 1, place) if p > 0 and visits[p] < self.candidates), None)

    def penalised(
        self, model: Any, state: Any, logits: list[list[float]], pixels: torch.Tensor, prompt: int, image: list[int]
    ) -> tuple[list[list[float]], list[int]]:
        scored, commonest = [], []
        for (beam, _), row in zip(state, logits, strict=True):
            if self.mode == "paper":
                row = log_probabilities(row)
            best = sorted(range(len(row)), key=lambda t: -row[t])[: self.candidates]
            penalties, places = [], []
            for token in best:
                rows = self.look(model, [*beam, token], pixels)[1]
                products = self.products(rows, prompt)
                phi = max(products)
                places.append(products.index(phi))
                if self.mode == "paper":
                    penalties.append(min(self.weight * phi, 10.0))
                elif len(products) <= self.first:
                    penalties.append(-self.weight * sum(rows[-1][j] for j in image))
                else:
                    penalties.append(self.weight * 1e-7 * phi)
            if self.mode == "official" and len(beam) + 1 - prompt > self.first:
                least = min(penalties)
                penalties = [min(each - least, 100.0) for each in penalties]
            made = [value - max(row) - 1000 for value in row]
            for token, penalty in zip(best, penalties, strict=True):
                made[token] = row[token] - penalty
            scored.append(made)
            commonest.append(most_common(places))
        return scored, commonest


def most_common(values: list[int]) -> int:
    """The commonest, the smallest of equals."""
    counts = Counter(values)
    return min(value for value in counts if counts[value] == max(counts.values()))
