"""How likely a model was to say the tokens of its answer: noted while it says them, so that nothing is read again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList

PROCESSORS = "_get_logits_processor"
"""The method of a model in which ``generate`` collects its logits processors; the caller's come last."""


class SaidLog(LogitsProcessor):  # type: ignore[misc]
    """Notes the log probability of every token that one call of ``generate`` chooses, and changes nothing.

    Each step's probabilities are kept until the next step shows which token was chosen.

    Attributes:
        comes_first: Whether it is known to see the model's own logits, before other processors.
    """

    def __init__(self) -> None:
        self.comes_first = False
        self._is_broken = False
        self._last: torch.Tensor | None = None
        self._length = 0
        self._chosen: list[torch.Tensor] = []
        self._logs: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Note the token that the step before has chosen, and this step's probabilities ``[rows, vocab]``."""
        self._note(input_ids)
        self._last, self._length = scores.float().log_softmax(-1), input_ids.shape[1]
        return scores

    def _note(self, sequences: torch.Tensor) -> None:
        if self._last is None:
            return
        # Drafts are tried in other numbers, and beams change their order.
        if sequences.shape[1] != self._length + 1 or len(sequences) != len(self._last):
            self._is_broken = True
            return
        chosen = sequences[:, self._length :].to(self._last.device)
        self._chosen.append(chosen)
        self._logs.append(self._last.gather(1, chosen))

    def of(self, answers: torch.Tensor, sequences: torch.Tensor) -> list[list[float]] | None:
        """Return the log probabilities of all tokens of the answers ``[rows, length]`` that ``sequences`` end in.

        Returns:
            None where they were not noted token by token as they stand there.
        """
        self._note(sequences)
        self._last = None
        if self._is_broken or not self.comes_first or len(self._chosen) != answers.shape[1]:
            return None
        if not torch.equal(torch.cat(self._chosen, dim=1), answers.to(self._chosen[0].device)):
            return None
        rows: list[list[float]] = torch.cat(self._logs, dim=1).tolist()
        return rows


@dataclass(frozen=True)
class LogsFirst:
    """Stands in for the method in which a model collects its logits processors: a ``SaidLog`` comes first.

    Attributes:
        stock: The method, the model's own or one that somebody has put on the model.
    """

    stock: Callable[..., LogitsProcessorList]

    def __call__(self, *args: Any, **kwargs: Any) -> LogitsProcessorList:
        """Do what the method does."""
        found = self.stock(*args, **kwargs)
        logs = [each for each in found if isinstance(each, SaidLog)]
        for log in logs:
            log.comes_first = True
        return LogitsProcessorList([*logs, *(each for each in found if not isinstance(each, SaidLog))])


@dataclass(frozen=True)
class Heard:
    """Images about which answers were noted while they were said.

    Attributes:
        looked: Asks about the images.
        logs: Per answer, the log probability of each token.
    """

    looked: Any
    logs: Sequence[Sequence[float]]

    def ask(self, names: Sequence[Sequence[str]]) -> Any:
        """Ask for objects: those of each image."""
        return self.looked.ask(names)

    def said(self, answers: Sequence[Sequence[int]]) -> list[list[float]]:
        """Return what was noted of every token of the answers, without reading them again."""
        return [list(row[: len(ids)]) for row, ids in zip(self.logs, answers, strict=True)]
