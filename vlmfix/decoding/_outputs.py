"""What a forward returns: read, cut to some rows, with other logits of the next token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vlmfix.run import Run


def logits_of(output: Any) -> torch.Tensor:
    """Return the logits ``[batch, tokens, vocab]``."""
    logits: torch.Tensor = output["logits"] if isinstance(output, dict) else output[0]
    return logits


def cache_of(output: Any, inputs: dict[str, Any]) -> Any:
    """Return the cache a forward has filled, if any."""
    parts: Sequence[Any] = tuple(output.values()) if isinstance(output, dict) else output
    return next((part for part in parts if hasattr(part, "get_seq_length")), inputs.get("past_key_values"))


def with_last_logits(run: Run, output: Any, result: torch.Tensor) -> Any:
    """Put fp32 ``[batch, vocab]`` in the place of the last token's logits; rounded only beside those of others."""
    logits = logits_of(output)
    if logits.shape[1] == 1:
        logits = result[:, None]
    else:
        logits = logits.clone()
        if run.is_prefill and logits.shape[1] == run.q_len:
            places = torch.arange(run.q_len, device=logits.device)[None, :, None].expand(len(result), -1, 1)
            last = run.at_last_position(places)[:, 0]
        else:
            last = torch.full_like(result[:, 0], logits.shape[1] - 1, dtype=torch.int64)
        logits[torch.arange(len(result), device=logits.device), last] = result.to(logits.dtype)
    if isinstance(output, dict):
        output["logits"] = logits
        return output
    return (logits, *output[1:])


def rows_of(output: Any, batch: int, replaced: dict[int, Any]) -> Any:
    """Return the first ``batch`` of twice as many rows; other objects replaced by their ``id``."""

    def part(value: Any) -> Any:
        is_by_row = isinstance(value, torch.Tensor) and value.dim() > 1 and value.shape[0] == 2 * batch
        return value[:batch] if is_by_row else replaced.get(id(value), value)

    if isinstance(output, dict):
        return type(output)(**{name: part(value) for name, value in output.items()})
    return tuple(part(value) for value in output)
