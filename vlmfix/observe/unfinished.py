"""Answers that have ended take no more steps: those of the same batch that have not are continued without them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from transformers import DynamicCache, StoppingCriteria, StoppingCriteriaList
from transformers.cache_utils import DynamicLayer

from vlmfix.errors import UnsupportedFeatureError
from vlmfix.methods.sequence import STATE_ATTRIBUTE, state_of
from vlmfix.model.anatomy import analyse
from vlmfix.patching import find_patch

FEWEST = 8
"""Rows of a batch from which on a step takes noticeably longer than with fewer rows."""

SHARE = 0.25
"""Of a batch's answers that have ended when the others are continued without them."""

_FROM_THE_PROMPT_ON = (
    "cache_implementation",
    "min_new_tokens",
    "begin_suppress_tokens",
    "exponential_decay_length_penalty",
)
"""Generation settings that choose another cache, or count steps from where ``generate`` was called."""


class EnoughEnded(StoppingCriteria):  # type: ignore[misc]
    """Stops a batch when a quarter of its answers have ended, after two steps at the earliest."""

    def __init__(self, end_ids: Collection[int]) -> None:
        self._end_ids = torch.tensor(sorted(end_ids))
        self._ended: torch.Tensor | None = None

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Return for every row of ``input_ids`` ``[batch, length]`` whether the batch stops here."""
        ends = torch.isin(input_ids[:, -1], self._end_ids.to(input_ids.device))
        if self._ended is None:  # Whoever goes on with a prompt after its first step must have decoded something.
            self._ended = ends
            return torch.zeros_like(ends)
        self._ended = self._ended | ends
        return (self._ended.float().mean() >= SHARE).expand(len(ends))


def can_drop(model: Any, batch: int) -> bool:
    """Whether a batch's answers can be continued without some of its rows.

    Not with few rows, where a step takes as long with fewer. Nor where a model keeps more than keys and values of all
    tokens (encoders, sliding windows, recurrent states) or positions of a whole batch, decodes
    from two branches, or where a method rewrites answers, which it must be given whole.
    """
    if batch < FEWEST:
        return False
    anatomy, patch = analyse(model), find_patch(model)
    return (
        anatomy.kinds == {"joint"}
        and anatomy.encoder is None
        and all(getattr(model.generation_config, name, None) is None for name in _FROM_THE_PROMPT_ON)
        and all(type(layer) is DynamicLayer for layer in DynamicCache(config=anatomy.text_config).layers)
        and not any("rope_deltas" in vars(module) for module in model.modules())
        and not any(
            (each.replaces_logits or each.rewrites_answers) and not each.is_identity
            for each in (() if patch is None else patch.methods)
        )
    )


def answered_in_stages(
    generate: Callable[..., Any], inputs: Mapping[str, Any], max_new_tokens: int, end_ids: Collection[int]
) -> tuple[list[list[int]], list[tuple[int, ...]]]:
    """Answer a batch that samples leave when their answer has ended.

    Args:
        generate: Answers ``inputs`` with at most so many tokens; takes ``stopping_criteria``.
        inputs: The batch.
        max_new_tokens: Limit of every answer.
        end_ids: What ends an answer.

    Returns:
        Ids per sample, and per step the samples that were there.
    """
    tokens: list[list[int]] = [[] for _ in inputs["input_ids"]]
    steps: list[tuple[int, ...]] = []
    there, drops = tuple(range(len(tokens))), True
    while True:
        stopping = StoppingCriteriaList([EnoughEnded(end_ids)] if drops and len(there) >= FEWEST else [])
        out = generate(inputs, max_new_tokens - len(steps), stopping_criteria=stopping)
        new: list[list[int]] = out.sequences[:, inputs["input_ids"].shape[1] :].tolist()
        steps += [there] * len(new[0])
        for sample, ids in zip(there, new, strict=True):
            tokens[sample] += ids
        unfinished = [row for row, sample in enumerate(there) if not set(end_ids).intersection(tokens[sample])]
        if not unfinished or len(steps) == max_new_tokens:
            return tokens, steps
        mask = inputs["attention_mask"]
        try:
            inputs = going_on(out, mask, unfinished)
            there = tuple(there[row] for row in unfinished)
        except UnsupportedFeatureError:  # What a method learned cannot be divided: the whole batch goes on.
            inputs, drops = going_on(out, mask, range(len(there))), False


def going_on(out: Any, mask: torch.Tensor, rows: Sequence[int]) -> dict[str, Any]:
    """Return what ``generate`` needs to go on with some rows of a batch that it stopped.

    Args:
        out: What it returned; its cache is used up.
        mask: Its ``attention_mask``, int64 ``[batch, prompt]``.
        rows: The rows.

    Returns:
        ``input_ids``, ``attention_mask`` and ``past_key_values``.

    Raises:
        UnsupportedFeatureError: Rows are left out, and what a method learned cannot be divided.
    """
    cache, new = out.past_key_values, out.sequences.shape[1] - mask.shape[1]
    mask = F.pad(mask, (0, new), value=1)
    if len(rows) == len(mask):
        return {"input_ids": out.sequences, "attention_mask": mask, "past_key_values": cache}
    index, state = torch.tensor(rows, device=mask.device), state_of(cache)
    if state is not None:
        setattr(cache, STATE_ATTRIBUTE, state.picked(index))
    type(cache).batch_select_indices(cache, index)  # On the cache lies a note that nobody else may pick rows.
    return {"input_ids": out.sequences[index], "attention_mask": mask[index], "past_key_values": cache}
