"""What a call of a model is, by its arguments: how many tokens it reads, and which of them are a prompt."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from vlmfix.engine.forwards import EditedForward
from vlmfix.errors import UnsupportedFeatureError
from vlmfix.methods.sequence import SequenceState, from_the_end
from vlmfix.model.images import brings_pictures

_NO_LABEL = -100
"""What stands in the place of a label where a token is not to be predicted."""


def parameter_names(module: nn.Module) -> tuple[str, ...]:
    """Return the names of the arguments a module's forward takes by position, in order."""
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]  # without self
    return tuple(each.name for each in parameters if each.kind is each.POSITIONAL_OR_KEYWORD) or ("input_ids",)


def tokens_of(inputs: dict[str, Any]) -> torch.Tensor | None:
    """Return the ids ``[batch, q_len]`` or embeddings ``[batch, q_len, hidden_size]`` a call brings, if any."""
    tokens: torch.Tensor | None = inputs.get("input_ids")
    return inputs.get("inputs_embeds") if tokens is None else tokens


def answer_length(inputs: dict[str, Any]) -> int:
    """Return how many tokens a decoder behind an encoder reads; without any given, it starts by itself with one."""
    for name in ("decoder_input_ids", "decoder_inputs_embeds", "labels"):
        if inputs.get(name) is not None:
            return int(inputs[name].shape[1])
    return 1


def num_drafted(inputs: dict[str, Any]) -> int:
    """Return how many of the new tokens are an answer, drafted or given, rather than a prompt.

    Assisted decoding asks for the logits of the token before the draft and of every drafted one, also in the forward
    that reads the prompt; a caller who scores an answer behind a prompt does the same, or labels it (teacher forcing).
    Otherwise it is none.

    A draft is always checked with a cache (which some versions leave to the model to make). Without one, many logits
    are just wanted.

    Raises:
        UnsupportedFeatureError: The labels of a batch begin in different columns.
    """
    labels = inputs.get("labels")
    if isinstance(labels, torch.Tensor):
        is_labelled = labels != _NO_LABEL
        columns = torch.arange(labels.shape[1], device=labels.device)
        firsts = torch.where(is_labelled, columns, labels.shape[1]).amin(1).tolist()
        if len(set(firsts)) > 1:
            if not brings_pictures(inputs):
                return 0  # nothing is edited
            raise UnsupportedFeatureError(
                "The labels of this batch begin in different columns, so that answers begin in different columns too. "
                "Pad the prompts on the left, or score one prompt at a time."
            )
        return int(labels.shape[1] - firsts[0])
    wanted = inputs.get("logits_to_keep")
    has_cache = inputs.get("past_key_values") is not None or inputs.get("use_cache")
    return max(wanted - 1, 0) if has_cache and isinstance(wanted, int) else 0


def packed_rows(inputs: dict[str, Any], like: torch.Tensor) -> torch.Tensor:
    """Return which rows of a call hold several prompts, by positions that start again: int64 ``[batch]``, 1 for these.

    Only without an attention mask. ``like`` is a tensor ``[batch]`` on the device wanted.
    """
    positions = inputs.get("position_ids")
    if not isinstance(positions, torch.Tensor) or inputs.get("attention_mask") is not None:
        return torch.zeros_like(like, dtype=torch.int64)
    in_text = positions.reshape(-1, *positions.shape[-2:])[0]  # of several dimensions, the first is of text or time
    return (in_text.diff(dim=1) < 0).any(1).long().to(like.device).expand(like.shape)


def every_row(inputs: dict[str, Any], q_len: int, device: torch.device) -> dict[str, Any]:
    """Ask for the same logits by position, so that no layer leaves out the rows of the others."""
    wanted = inputs.get("logits_to_keep")
    if not isinstance(wanted, int) or not 0 < wanted < q_len:
        return {}
    return {"logits_to_keep": torch.arange(q_len - wanted, q_len, device=device)}


def length_of(cache: Any) -> int | torch.Tensor:
    """Return how many tokens a cache holds; a copy, since a static cache counts in place."""
    length: int | torch.Tensor = cache.get_seq_length()
    return length.clone() if isinstance(length, torch.Tensor) else length


def is_empty(cache: Any) -> bool:
    """Whether a cache holds no token, as far as that can be told without waiting for the device."""
    if torch.compiler.is_compiling() and getattr(cache, "is_compileable", False):
        return False  # Older versions would count its keys here, in a graph of its own.
    length = cache.get_seq_length()
    if isinstance(length, torch.Tensor):
        # A static cache counts on the device; waiting for it at every step would cost more than it can find.
        return length.device.type == "cpu" and int(length) == 0
    return int(length) == 0


def check_batch(known: SequenceState, batch: int) -> None:
    """Refuse a cache whose rows were picked or repeated: what is known about them was not."""
    if known.image_mask.shape[0] != batch:
        raise UnsupportedFeatureError(
            f"The cache was filled with a batch of {known.image_mask.shape[0]} sequences and is now used with {batch}. "
            "Expand the inputs before the first forward (generate does), or start with an empty cache."
        )


def refuse_replica(called: nn.Module, model: nn.Module, inputs: dict[str, Any]) -> None:
    """Refuse a replica (``DataParallel``) on another device than its model: passes beside a forward run the model.

    Args:
        called: The module that was called.
        model: The module it is, or is a replica of.
        inputs: The call's arguments by name.
    """
    tokens, weights = tokens_of(inputs), next(model.parameters(), None)
    if called is model or tokens is None or weights is None or tokens.device == weights.device:
        return
    raise UnsupportedFeatureError(
        f"This is a replica (DataParallel) of a patched {type(model).__name__} on {tokens.device}, and a method of the "
        f"patch also runs the model itself, which is on {weights.device}. Run one process per device (torchrun, "
        "accelerate launch) instead of DataParallel."
    )


def refuse_export() -> None:
    """Refuse to be traced by ``torch.export``, of which older versions of torch do not tell, or ``torch.jit.trace``."""
    is_exporting = getattr(torch.compiler, "is_exporting", None)
    is_traced: bool = torch.jit.is_tracing()  # type: ignore[no-untyped-call, attr-defined]
    if is_traced or (is_exporting is not None and is_exporting()):
        raise UnsupportedFeatureError(
            "A patch looks at every prompt anew (where its image is, which heads to edit), which an exported graph "
            "cannot do. Export the stock model: vlmfix.unpatch(model)."
        )


def with_prompt(known: SequenceState | None, start: int, stop: int) -> tuple[tuple[int, int], ...]:
    """Return where prompts lie, with one more, or more of the last one."""
    before = () if known is None else known.prompts
    if known is not None and before and not known.is_answered:
        return (*before[:-1], (before[-1][0], stop))
    return (*before, (start, stop))


def check_whole_prompt(known: SequenceState | None, forward: EditedForward, *, goes_on: bool) -> None:
    """Refuse a prompt in parts where what methods do in one part depends on another.

    Args:
        known: What is known about the tokens in the cache.
        forward: The forward that reads a prompt, or a part of one.
        goes_on: Whether more of the prompt is to come.

    Raises:
        UnsupportedFeatureError: A method needs the prompt in one forward.
    """
    continues = known is not None and not known.is_answered
    lost_image = known is not None and known.lost_image
    if not (forward.acts or lost_image) or not (continues or goes_on):
        return
    has_further_image, is_prefix = False, False
    if continues and known is not None and known.any_image:
        # Rows before a further image were edited as if they stood behind the last one.
        old, new = forward.image_mask.tensor_split([known.image_mask.shape[1]], dim=1)
        behind = forward.valid_mask[:, : old.shape[1]] & (old.cumsum(1) > 0) & (from_the_end(old) == 0)
        has_further_image = bool((behind.any(1) & new.any(1)).any())
        is_prefix = not bool(behind.any())  # the known part ends with its last image token
    has_text_before = continues and known is not None and not known.any_image
    for method in forward.methods:
        if is_prefix and method.leaves_prefix:
            continue
        needs_it = method.needs_whole_prompt and (goes_on or not has_text_before)
        needs_it = needs_it or (has_text_before and method.minds_text_before_image)
        if not (forward.state.any_image or lost_image or method.acts_without_image):
            continue
        if method.is_identity or not (needs_it or (has_further_image and method.prompt_rows == "text")):
            continue
        if known is not None and known.is_cut:
            raise UnsupportedFeatureError(
                f"This cache was cropped into its prompt, and {method.name} needs a prompt in one forward: what it did "
                "in the part that is left need not fit what follows now. Start with an empty cache."
            )
        raise UnsupportedFeatureError(
            f"{method.name} needs a prompt in one forward, and this one reads a part: what it does in one part "
            "depends on tokens of another. Leave prefill_chunk_size unset, and do not prefill a part of a prompt "
            "with an image in advance."
        )
