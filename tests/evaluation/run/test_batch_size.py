"""Batches as large as the free memory takes."""

from __future__ import annotations

from typing import Any

import pytest

from vlmfix.errors import VlmfixError
from vlmfix.evals.data.coco import load_image
from vlmfix.evals.options import EvalOptions
from vlmfix.evals.run import batch_size as sizes
from vlmfix.evals.run.plan import plan_run
from vlmfix.observe.prompts import PromptBuilder, encode


def planned(**options: Any) -> Any:
    return plan_run(EvalOptions(limit=5, **options))


@pytest.mark.parametrize(("typed", "expected"), [(None, 64), (3, 3)])
def test_what_is_typed_counts(typed: int | None, expected: int) -> None:
    assert planned(batch_size=typed).batch_size == expected


def test_auto_fills_what_the_weights_leave_free(monkeypatch: pytest.MonkeyPatch) -> None:
    run = planned()
    samples = list(run.tasks.samples())
    tokens = sizes.longest(run.source.processor, samples, template=True)
    build = PromptBuilder(run.source.processor)
    whole = [
        encode(run.source.processor, [build(each.question)], [load_image(each.path)])["input_ids"].shape[1]
        + each.max_new_tokens
        for each in samples
    ]
    assert tokens == max(whole)
    row = 4 * sizes.values_per_token(run.source.config) * tokens
    text = run.source.config.get_text_config()
    assert row > 4 * tokens * 2 * text.num_hidden_layers * text.hidden_size, "keys and values alone take as much"
    found = []
    for rows in (0, 35):
        monkeypatch.setattr(sizes, "free_memory", lambda device, rows=rows: int(2e7 + rows * row / sizes.SHARE))
        found.append(planned(batch_size="auto").batch_size)
    assert found[1] - found[0] in (34, 35), "memory for so many rows more"
    monkeypatch.setattr(sizes, "free_memory", lambda device: 1000)
    assert planned(batch_size="auto").batch_size == 1, "memory that is full is found out by the run"
    monkeypatch.setattr(sizes, "free_memory", lambda device: 10**12)
    assert planned(batch_size="auto").batch_size == sizes.LARGEST


def test_free_memory_is_the_machines() -> None:
    import psutil

    assert 0 < sizes.free_memory("cpu") < psutil.virtual_memory().total


def test_other_words_are_refused() -> None:
    with pytest.raises(VlmfixError, match="--batch-size must be a number or auto"):
        EvalOptions(batch_size="many")
