"""The one road to an answer: what is asked, what is answered, and a model left as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families.tiny_llava import RAGGED, collate, generate, snapshot

import vlmfix
from vlmfix.errors import MethodError
from vlmfix.model.anatomy import analyse
from vlmfix.observe.ask import Subject, answer, next_logits, stock_logits
from vlmfix.observe.words import prompt_tokens


def test_an_answer_is_what_generate_says_up_to_its_end_token(tiny: Any) -> None:
    inputs = collate(RAGGED)
    sequences, logits = generate(tiny, inputs, 6)
    rows = sequences[:, inputs["input_ids"].shape[1] :].tolist()
    whole = answer(tiny, inputs, 6, logits=True)
    assert whole.tokens == whole.words == tuple(map(tuple, rows)) and whole.has_end == (False,) * 4
    assert torch.equal(torch.stack(whole.logits, dim=1), logits)
    end = rows[0][2]
    tiny.generation_config.eos_token_id = [end]
    cut = answer(tiny, inputs, 6)
    for row, ids, words, has_end in zip(rows, cut.tokens, cut.words, cut.has_end, strict=True):
        stop = row.index(end) if end in row else len(row)
        assert words == tuple(row[:stop]) and has_end == (end in row)
        assert ids == tuple(row[: stop + has_end])
    assert cut.has_end[0] and cut.behind[0].tolist() == [step >= len(cut.tokens[0]) for step in range(cut.steps)]


@pytest.mark.parametrize("settings", [{"do_sample": True, "top_k": 5, "temperature": 2.0}, {"num_beams": 3}])
def test_the_model_s_own_settings_do_not_matter(tiny: Any, settings: dict[str, Any]) -> None:
    inputs = collate(RAGGED)
    expected = answer(tiny, inputs, 5).tokens
    for name, value in settings.items():
        setattr(tiny.generation_config, name, value)
    tiny.generation_config.pad_token_id = -1  # no token, as LLaMA's first settings had it
    assert answer(tiny, inputs, 5).tokens == expected


def test_given_answers_have_the_probability_they_have(tiny: Any) -> None:
    inputs, given = collate(RAGGED), [[9, 8, 7], [5], [6, 6], [12, 30, 4]]
    subject = Subject(analyse(tiny), ())
    found = subject.answer(inputs, answers=given, logits=True)
    assert found.tokens == tuple(map(tuple, given))
    log_probs = found.log_probs()
    assert log_probs.isnan().tolist() == [[step >= len(each) for step in range(3)] for each in given]
    own = answer(tiny, inputs, 1, logits=True)
    assert torch.equal(found.logits[0], own.logits[0])
    first = own.logits[0].log_softmax(-1).gather(1, torch.tensor([[each[0]] for each in given]))[:, 0]
    torch.testing.assert_close(log_probs[:, 0], first)
    for wrong in ([[1]], [[1], [], [1], [1]], [[10**6]] * 4):
        with pytest.raises(MethodError, match="answers"):
            subject.answer(inputs, answers=wrong)


@torch.no_grad()
def test_logits_of_one_forward(tiny: Any) -> None:
    """Of the patched model, and of the stock model below a patch that stays and counts nothing."""
    inputs = collate(RAGGED[:1])
    stock = next_logits(tiny, inputs, rows=3)
    torch.testing.assert_close(stock[:, -1], answer(tiny, inputs, 1, logits=True).logits[0])
    assert stock.shape[1] == 3 and stock.dtype == torch.float32
    vlmfix.patch(tiny, "pai", layers=":", alpha=2.0)
    before = snapshot(tiny)
    assert torch.equal(stock_logits(tiny, inputs, 3), stock)
    assert snapshot(tiny) == before and vlmfix.status(tiny).prompts == 0
    assert not torch.allclose(next_logits(tiny, inputs)[:, -1], stock[:, -1], atol=1e-3)


def test_a_subject_looks_beside_its_patch_and_at_the_stock_model_without(tiny: Any) -> None:
    inputs = collate(RAGGED)
    anatomy, stock = analyse(tiny), answer(tiny, inputs, 4, logits=True)
    method = vlmfix.PAI(layers=":", alpha=2.0)
    with vlmfix.patched(tiny, method):
        edited = answer(tiny, inputs, 4, logits=True)
        alone = Subject(anatomy, ()).answer(inputs, max_new_tokens=4, logits=True)
    assert torch.equal(alone.logits[0], stock.logits[0]) and alone.tokens == stock.tokens
    again = Subject(anatomy, (method,)).answer(inputs, max_new_tokens=4, logits=True)
    assert torch.equal(again.logits[0], edited.logits[0]) and not torch.equal(edited.logits[0], stock.logits[0])
    assert vlmfix.status(tiny) is None


def test_the_tokens_of_a_batch(tiny: Any) -> None:
    inputs = collate(RAGGED)
    tokens = prompt_tokens(analyse(tiny), inputs)
    for row, each in enumerate(RAGGED):
        length = len(each.ids)
        assert tokens.valid[row].sum() == length and tokens.last[row].nonzero().tolist() == [[tokens.last.shape[1] - 1]]
        images = [index for index, token in enumerate(each.ids) if token == 3]
        pads = tokens.last.shape[1] - length
        assert (tokens.image[row].nonzero()[:, 0] - pads).tolist() == images
        behind = list(range(images[-1] + 1, length)) if images else []
        assert (tokens.behind[row].nonzero()[:, 0] - pads).tolist() == behind
    right = {
        "input_ids": torch.tensor([[1, 3, 3, 9, 8, 0, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1, 1, 0, 0]]),
    }
    assert prompt_tokens(analyse(tiny), right).last[0].nonzero().tolist() == [[4]]
