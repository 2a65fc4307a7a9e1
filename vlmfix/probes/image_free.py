"""Prompts and their answers without the image's tokens, for probes that ask what the image changes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from vlmfix.engine.image_free import text_only_inputs
from vlmfix.errors import UnsupportedFeatureError
from vlmfix.methods.sequence import SequenceState
from vlmfix.observe.ask import Answered, Subject
from vlmfix.observe.tokens import prompt_tokens


def image_free_inputs(subject: Subject, inputs: Mapping[str, Any], answered: Answered) -> dict[str, Any]:
    """Return the arguments of a forward over prompts without image tokens, followed by all answer tokens but the last.

    Answers that are shorter than others are filled up, so that the last ``steps`` rows predict the answers' tokens.

    Raises:
        UnsupportedFeatureError: Answers of several tokens behind a prompt that sees itself in both directions.
    """
    more = answered.steps - 1
    if more and subject.model.config.model_type.startswith("paligemma"):
        raise UnsupportedFeatureError(
            "PaliGemma's prompt sees itself in both directions, so an answer behind it cannot be read in one forward "
            "without its image. Use max_new_tokens=1."
        )
    rows = [[*each[:more], *[0] * (more - len(each[:more]))] for each in answered.tokens]
    prompt, tokens = inputs["input_ids"], prompt_tokens(subject.anatomy, inputs)
    ids = torch.tensor(rows, dtype=prompt.dtype, device=prompt.device).reshape(len(rows), more)
    is_image = torch.zeros_like(ids, dtype=torch.bool)
    whole = SequenceState(
        (),
        torch.cat([tokens.image, is_image], dim=1),
        torch.cat([tokens.valid, ~is_image], dim=1),
        torch.cat([prompt, ids], dim=1),
        any_image=True,
    )
    types = inputs.get("token_type_ids")
    extra = {} if types is None else {"token_type_ids": torch.cat([types, torch.zeros_like(ids)], dim=1)}
    return text_only_inputs(subject.anatomy, whole, extra)
