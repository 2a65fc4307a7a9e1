"""ACT: column means over the rows that may see a key; sinks keep beta, the rest is shared out."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from naive.reference import Naive, Row, State


class NaiveAct(Naive):
    def __init__(
        self,
        layers: Sequence[int],
        beta: float = 0.4,
        alpha: float | None = 5.0,
        tau: float = 0.0,
        heads: Sequence[tuple[int, int]] | None = None,
        rows: str = "all",
        recipients: str = "all",
        sinks: str = "running",
        min_rows: int = 8,
    ) -> None:
        super().__init__(layers)
        self.beta, self.alpha, self.tau, self.heads_list = beta, alpha, tau, heads
        self.rows, self.recipients, self.sinks, self.min_rows = rows, recipients, sinks, min_rows

    def maps(self, rows: Sequence[Row], maps: list[torch.Tensor]) -> list[torch.Tensor]:
        sequence, number = rows[0].sequence, rows[0].layer
        history = sequence.notes.setdefault((self, number), [])
        history += [weights.clone() for weights in maps]
        if rows[0].generated and self.sinks == "frozen":
            history = history[: sequence.prompt_length]
        heads = [h for h in range(len(maps[0])) if self.heads_list is None or (number, h) in self.heads_list]
        sinks = {head: self.find_sinks([weights[head].tolist() for weights in history]) for head in heads}
        edited = []
        for row, weights in zip(rows, maps, strict=True):
            new = weights.clone()
            for head in heads if self.wants(row) else ():
                new[head] = self.calibrate(sequence, weights[head], sinks[head])
            edited.append(new)
        return edited

    def wants(self, row: Row) -> bool:
        return {"all": True, "text": row.is_behind_the_image, "last": row.predicts}[self.rows]

    def find_sinks(self, history: list[list[float]]) -> list[int]:
        """a_j = mean weight of key j over the rows that may see it; S = {j > 0: a_j > tau}."""
        total = len(history)
        tau = self.tau if self.alpha is None else self.alpha / total
        sinks = []
        for j in range(1, total):
            column = [row[j] for row in history if j < len(row)]
            seen = [weight for weight in column if weight > 0]  # hidden keys have weight 0
            if len(seen) >= self.min_rows and sum(seen) / len(seen) > tau:
                sinks.append(j)
        return sinks

    def calibrate(self, sequence: State, row: torch.Tensor, sinks: list[int]) -> torch.Tensor:
        keys = range(len(row))
        mass = sum(float(row[s]) for s in sinks if s < len(row))
        others = [j for j in keys if j not in sinks and (self.recipients == "all" or sequence.is_image[j])]
        rest = sum(float(row[j]) for j in others)
        if mass == 0 or rest < 1e-6:
            return row
        edited = row.clone()
        for s in sinks:
            if s < len(row):
                edited[s] = self.beta * row[s]
        for j in others:
            edited[j] = row[j] * (1 + (1 - self.beta) * mass / rest)
        return edited


HEADS = [(0, 1), (2, 0), (2, 3)]
CASES = [
    ({"layers": ":", "sink_threshold": "2/N", "min_rows": 1}, NaiveAct(range(4), alpha=2.0, min_rows=1)),
    ({"layers": ":", "sink_threshold": "1.5/N", "min_rows": 2}, NaiveAct(range(4), alpha=1.5, min_rows=2)),
    (
        {"beta": 0.0, "sink_threshold": 0.05, "heads": HEADS, "rows": "text", "min_rows": 1},
        NaiveAct([0, 2], 0.0, None, 0.05, HEADS, rows="text", min_rows=1),
    ),
    (
        {"layers": ":", "sink_threshold": 0.04, "sinks": "frozen", "rows": "last", "recipients": "image"},
        NaiveAct(range(4), 0.4, None, 0.04, rows="last", sinks="frozen", recipients="image"),
    ),
]
