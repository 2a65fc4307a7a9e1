"""Plain beam search over one prompt, a step at a time, as ``generate`` does it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

NEVER = -1e9
"""The score of beams that must not be continued."""


@dataclass
class Beams:
    """The beams of one prompt.

    Attributes:
        ids: int64 ``[beams, length]``, the prompt included.
        scores: Their summed log-probabilities, fp32 ``[beams]``.
        prompt_length: Tokens of the prompt.
        finished: The best finished sequences with their scores, best first.
        may_improve: Whether a running beam may still beat the finished ones.
        is_done: Whether the search is over.
    """

    ids: torch.Tensor
    scores: torch.Tensor
    prompt_length: int
    finished: tuple[tuple[float, torch.Tensor], ...] = ()
    may_improve: bool = True
    is_done: bool = False

    @classmethod
    def of(cls, input_ids: torch.Tensor, num_beams: int) -> Beams:
        """Begin with a prompt ``[1, length]``. Only the first beam counts, because all are the same."""
        scores = torch.full((num_beams,), NEVER, device=input_ids.device)
        scores[0] = 0.0
        return cls(input_ids.repeat(num_beams, 1), scores, input_ids.shape[1])

    @property
    def num_generated(self) -> int:
        """Tokens behind the prompt."""
        return self.ids.shape[1] - self.prompt_length

    def step(self, log_probs: torch.Tensor, criteria: Any, config: Any) -> tuple[Beams, torch.Tensor]:
        """Take the best continuations.

        Args:
            log_probs: Of every next token, processed, fp32 ``[beams, vocab]``.
            criteria: The stopping criteria.
            config: The generation config.

        Returns:
            The beams with one more token, and the beam that each of them continues: int64 ``[beams]``.
        """
        num_beams, vocab = log_probs.shape
        # So many that num_beams of them go on, even if every other one ends here.
        num_ends = 0 if config._eos_token_tensor is None else len(config._eos_token_tensor)
        best, places = (log_probs + self.scores[:, None]).flatten().topk(max(2, 1 + num_ends) * num_beams)
        origins = places // vocab
        ids = torch.cat([self.ids[origins], (places % vocab)[:, None]], dim=1)
        ends = criteria(ids, None)
        running = (best + ends.float() * NEVER).topk(num_beams)
        beams = dataclasses.replace(self, ids=ids[running.indices], scores=running.values)
        beams._finish(ids[:num_beams], best[:num_beams], ends[:num_beams], config)
        beams.is_done = beams._is_over(bool(ends.all()), config)
        return beams, origins[running.indices]

    def _finish(self, ids: torch.Tensor, scores: torch.Tensor, ends: torch.Tensor, config: Any) -> None:
        """Keep finished sequences; only those among the best ``num_beams`` continuations count."""
        num_beams = len(self.scores)
        is_closed = not self.may_improve or (len(self.finished) == num_beams and config.early_stopping is True)
        if is_closed or not bool(ends.any()):
            return
        length = float(self.num_generated) ** config.length_penalty
        new = [(float(scores[row]) / length, ids[row]) for row in ends.nonzero().flatten().tolist()]
        self.finished = tuple(sorted([*self.finished, *new], key=lambda each: -each[0])[:num_beams])

    def _is_over(self, all_end: bool, config: Any) -> bool:
        is_full = len(self.finished) == len(self.scores)
        if is_full:
            # "never" stops only when no longer answer could score higher.
            at_most = config.early_stopping == "never" and config.length_penalty > 0
            length = config.max_length - self.prompt_length if at_most else self.num_generated
            best = float(self.scores[0]) / float(length) ** config.length_penalty
            self.may_improve = self.may_improve and best > self.finished[-1][0]
        return not self.may_improve or (is_full and config.early_stopping is True) or all_end

    def best(self) -> tuple[float, torch.Tensor]:
        """Return the score and ids of the best sequence: a finished one if there is any."""
        return self.finished[0] if self.finished else (float(self.scores[0]), self.ids[0])
