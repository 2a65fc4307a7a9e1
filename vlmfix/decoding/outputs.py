"""What a forward of the model returns: its logits, its cache, and the rows of one branch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from vlmfix.decoding.branch import by_row

if TYPE_CHECKING:
    from vlmfix.engine.forwards import EditedForward


def next_token_rows(forward: EditedForward, logits: torch.Tensor) -> torch.Tensor:
    """Return which row of the logits predicts each sample's next token, int64 ``[batch]``."""
    rows = torch.arange(logits.shape[1], device=logits.device).expand(len(logits), -1)
    return forward.at_last_position(rows) if forward.is_prefill and logits.shape[1] == forward.q_len else rows[:, -1]


def logits_of(output: Any) -> torch.Tensor:
    """Return the logits ``[batch, tokens, vocab]``."""
    logits: torch.Tensor = output["logits"] if isinstance(output, dict) else output[0]
    return logits


def with_logits(output: Any, logits: torch.Tensor) -> Any:
    """Put other logits into an output: into the object itself, or into a new tuple."""
    if isinstance(output, dict):
        output["logits"] = logits
        return output
    return (logits, *output[1:])


def cache_of(output: Any, inputs: dict[str, Any]) -> Any:
    """Return the cache a forward has filled, if any."""
    parts = tuple(output.values()) if isinstance(output, dict) else output
    return next((part for part in parts if hasattr(part, "get_seq_length")), inputs.get("past_key_values"))


def own_part(output: Any, batch: int, paired: Any, own: Any) -> Any:
    """Return the first ``batch`` of twice as many rows, with the cache ``own`` in the place of ``paired``."""

    def part(value: Any) -> Any:
        return own if value is paired else by_row(value, 2 * batch, lambda rows: rows[:batch], dims=2)

    if isinstance(output, dict):
        return type(output)(**{name: part(value) for name, value in output.items()})
    return tuple(part(value) for value in output)
