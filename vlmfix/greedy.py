"""Greedy answers, whatever a model's own generation settings are."""

from __future__ import annotations

from typing import Any


def greedy(max_new_tokens: int, pad_token_id: int | None) -> dict[str, Any]:
    """Return the keyword arguments of ``generate`` for one beam without sampling."""
    return {
        "do_sample": False,
        "num_beams": 1,
        "temperature": None,
        "top_p": None,
        "top_k": None,
        "max_new_tokens": max_new_tokens,
        "pad_token_id": pad_token_id,
    }


def end_token_ids(model: Any) -> tuple[int, ...]:
    """Return the ids that end a generated sequence: those of the generation settings, else of the language model."""
    ids = model.generation_config.eos_token_id
    if ids is None:
        ids = model.config.get_text_config(decoder=True).eos_token_id
    if ids is None:
        return ()
    return tuple(int(i) for i in ids) if isinstance(ids, (list, tuple)) else (int(ids),)
