"""Answers that have ended leave their batch: the others are those of the whole batch, under every method."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from families.tiny_llava import RAGGED, collate
from method_parameters import IN_FORWARDS, parameters_of
from transformers import LogitsProcessor

import vlmfix
from vlmfix.methods.registry import list_methods
from vlmfix.methods.sequence import rows_of
from vlmfix.observe.ask import answer

TOKENS = 12
WHOLE_BATCH = {name for name, method in list_methods().items() if method.replaces_logits}
"""Methods that decode from two branches, which belong to a whole batch."""


class Recorder(LogitsProcessor):
    """Keeps the scores of every step."""

    def __init__(self) -> None:
        self.steps: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.steps.append(scores.clone())
        return scores


def answers_end_apart(model: Any, inputs: Any) -> None:
    """Make those two ids that this model says the ends of answers that give answers of most lengths."""
    model.generation_config.eos_token_id = -1
    rows = answer(model, inputs, TOKENS).tokens

    def lengths(ends: tuple[int, ...]) -> set[int]:
        return {next((place for place, token in enumerate(row) if token in ends), TOKENS) for row in rows}

    said = sorted({token for row in rows for token in row})
    ends = max(itertools.combinations(said, 2), key=lambda ends: len(lengths(ends)))
    assert len(lengths(ends)) > 2
    model.generation_config.eos_token_id = list(ends)


@pytest.mark.parametrize("name", [name for name in IN_FORWARDS if not list_methods()[name].searches])
def test_the_others_go_on_as_if_nothing_had_left(sinky: Any, name: str) -> None:
    inputs = collate([*RAGGED, *RAGGED[::-1], *RAGGED[1:]])
    vlmfix.patch(sinky, name, **(parameters_of(name, sinky) if name != "none" else {}))
    answers_end_apart(sinky, inputs)
    every, some = Recorder(), Recorder()
    expected = answer(sinky, inputs, TOKENS, processors=[every])
    found = answer(sinky, inputs, TOKENS, processors=[some], drop_ended=True)
    assert (found.tokens, found.has_end) == (expected.tokens, expected.has_end)
    if name in WHOLE_BATCH:
        assert not found.rows and not expected.rows
        return
    assert len(found.rows) == len(some.steps)
    for rows, scores, whole in zip(found.rows, some.steps, every.steps, strict=False):
        torch.testing.assert_close(scores, whole[list(rows)], atol=1e-4, rtol=1e-4)
    steps = sum(map(len, found.rows))
    assert steps < len(expected.tokens) * expected.steps, "fewer rows than the whole batch at every step"
    assert len(found.rows[-1]) < len(expected.tokens)


def test_few_rows_stay_together(tiny: Any) -> None:
    inputs = collate(RAGGED)
    answers_end_apart(tiny, collate([*RAGGED, *RAGGED[::-1]]))
    assert not answer(tiny, inputs, TOKENS, drop_ended=True).rows


def test_settings_that_count_from_the_call_keep_the_batch_whole(tiny: Any) -> None:
    inputs = collate([*RAGGED, *RAGGED])
    answers_end_apart(tiny, inputs)
    tiny.generation_config.min_new_tokens = 6
    found = answer(tiny, inputs, TOKENS, drop_ended=True)
    assert not found.rows and min(map(len, found.tokens)) >= 6


def test_what_nobody_can_divide_is_refused() -> None:
    rows = torch.tensor([1])
    assert torch.equal(rows_of({"a": (torch.arange(3), 4)}, rows, 3)["a"][0], torch.tensor([1]))
    for unknown in (object(), torch.zeros(2, 5)):
        with pytest.raises(vlmfix.UnsupportedFeatureError, match="which rows"):
            rows_of([unknown], rows, 3)
