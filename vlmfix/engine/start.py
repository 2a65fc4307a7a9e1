"""Begins forwards: a ``Forward`` and the state of its sequences, for a prompt read now or one an encoder has read."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from vlmfix.errors import UnsupportedFeatureError
from vlmfix.methods.views import Forward, SequenceState, extend_mask, state_of
from vlmfix.model.images import attended_keys

if TYPE_CHECKING:
    from torch import nn

    from vlmfix.engine.image_free import TextOnlyForward
    from vlmfix.engine.status import Counters
    from vlmfix.methods.base import Method
    from vlmfix.model.images import Encoded


def _ids_so_far(state: SequenceState, past: int) -> torch.Tensor:
    """Return the ids of the first ``past`` tokens, -1 where they are not known."""
    ids = state.valid_mask.new_full((state.valid_mask.shape[0], past), -1, dtype=torch.int64)
    prompt = state.input_ids
    parts = [] if prompt is None else [(0, prompt), *state.decoded]
    for where, known in parts:
        position = int(where)
        stop = min(position + known.shape[1], past)
        ids[:, position:stop] = known[:, : max(stop - position, 0)]
    return ids


def begin_prompt(
    methods: tuple[Method, ...],
    counters: Counters,
    *,
    input_ids: torch.Tensor | None,
    image_mask: torch.Tensor,
    attention_mask: Any,
    known: SequenceState | None,
    past: int,
    drafted: int,
    text_only: Callable[[SequenceState], TextOnlyForward | None],
) -> Forward:
    """Start a forward that reads a prompt.

    Args:
        methods: The bound methods.
        counters: The patch's counters.
        input_ids: int64 ``[batch, q_len]`` or ``None``.
        image_mask: bool ``[batch, q_len]`` of the new tokens.
        attention_mask: What the model was called with, see ``attended_keys``.
        known: State of the earlier turns, if any.
        past: Tokens in the cache.
        drafted: How many of the new tokens are a drafted answer behind the prompt.
        text_only: Runs the image-free pass for a state, or returns ``None``.

    Returns:
        The forward; its state must be stored on the cache.

    Raises:
        UnsupportedFeatureError: The cache belongs to a batch of another size.
    """
    batch, q_len = image_mask.shape
    if known is not None:
        check_batch(known, batch)
    prompt_len = q_len - drafted
    valid = attended_keys(attention_mask, past, q_len, image_mask)[:, :prompt_len]
    image_mask = extend_mask(None if known is None else known.image_mask, image_mask[:, :prompt_len] & valid, past)
    valid = extend_mask(None if known is None else known.valid_mask, valid, past, fill=True)
    if past and isinstance(attention_mask, torch.Tensor) and attention_mask.shape == (batch, past + q_len):
        # Answers of a batch end at different lengths: what the caller hides behind the shorter ones is padding.
        valid = valid & attention_mask[:, : past + prompt_len].to(valid.device).bool()
    decoded: list[tuple[int | torch.Tensor, torch.Tensor]] = []
    if input_ids is not None:
        if drafted:
            decoded.append((past + prompt_len, input_ids[:, prompt_len:]))
        input_ids = input_ids[:, :prompt_len]
        if known is not None:
            input_ids = torch.cat([_ids_so_far(known, past), input_ids], dim=1)
    # The one place that waits for the device: which samples have an image, where the last one ends, and the prompt.
    positions = torch.arange(past + prompt_len, device=image_mask.device)
    ends = torch.stack([torch.where(mask, positions, -1).amax(1) for mask in (image_mask, valid)]).tolist()
    with_image = [(image_end, end) for image_end, end in zip(*ends, strict=True) if image_end >= 0]
    learned = dict(known.learned) if known is not None else {}
    state = SequenceState(
        methods,
        image_mask,
        valid,
        input_ids,
        any_image=bool(with_image),
        all_images=len(with_image) == batch,
        learned=learned,
        decoded=decoded,
        branch=None if known is None else known.branch,
    )
    forward = Forward(
        state,
        counters,
        is_prefill=True,
        past=past,
        q_len=q_len,
        prompt_len=prompt_len,
        first_rows={
            "text": min((max(image_end + 1 - past, 0) for image_end, _ in with_image), default=q_len),
            "last": min((max(end - past, 0) for _, end in with_image), default=q_len),
            "image_stop": max((max(image_end + 1 - past, 0) for image_end, _ in with_image), default=0),
        },
    )
    _check_whole_prompt(known, forward)
    if state.any_image:
        forward.text_only = text_only(state)
    return forward


def _check_whole_prompt(known: SequenceState | None, forward: Forward) -> None:
    """Refuse to go on with a prompt that was edited as if it had ended."""
    if known is None or known.is_answered or not known.any_image:
        return
    old, new = forward.image_mask.tensor_split([known.image_mask.shape[1]], dim=1)
    behind = forward.valid_mask[:, : old.shape[1]] & (old.cumsum(1) > 0) & (old.flip(1).cumsum(1).flip(1) == 0)
    has_further_image = bool((behind.any(1) & new.any(1)).any())  # rows before it were edited as if behind the last one
    for method in forward.state.methods:
        needs_it = method.needs_whole_prompt or (has_further_image and method.prompt_rows == "text")
        if needs_it and not method.is_identity:
            raise UnsupportedFeatureError(
                f"{method.name} needs a prompt in one forward, and this one continues a prompt that is already in the "
                "cache: what it did there depends on tokens that come only now. Leave prefill_chunk_size unset, and "
                "do not prefill a part of a prompt with an image in advance."
            )


def begin_answer(
    methods: tuple[Method, ...],
    counters: Counters,
    *,
    encoded: Encoded | None,
    known: SequenceState | None,
    past: int | torch.Tensor,
    q_len: int,
    text_only: Callable[[Encoded], TextOnlyForward | None],
) -> Forward:
    """Start a forward of a decoder whose encoder has read the prompt: all its rows are those of generated tokens.

    Args:
        methods: The bound methods.
        counters: The patch's counters.
        encoded: What the encoder has read; ``None`` when ``known``.
        known: State of the answer so far, if any.
        past: Tokens of the answer in the cache.
        q_len: New tokens of the answer.
        text_only: Runs the image-free pass for what was encoded, or returns ``None``.

    Returns:
        The forward; a new state must be stored on the cache.
    """
    state = known
    if state is None:
        assert encoded is not None
        has_image = encoded.image_mask.any(1).tolist()
        state = SequenceState(
            methods,
            encoded.image_mask,
            encoded.valid_mask,
            None,
            any_image=any(has_image),
            all_images=all(has_image),
            in_encoder=True,
        )
    forward = Forward(state, counters, is_prefill=False, past=past, q_len=q_len, prompt_len=0)
    forward.begins = known is None
    if encoded is not None and state.any_image:
        forward.text_only = text_only(encoded)
    return forward


class ReorderWithState:
    """A cache's ``reorder_cache`` that takes along what methods learned; kept on the cache, so it is copied with it."""

    def __init__(self, cache: Any) -> None:
        self.cache = cache

    def __call__(self, beam_idx: torch.Tensor) -> None:
        """Reorder the cache and its state: row ``i`` continues row ``beam_idx[i]``."""
        state = state_of(self.cache)
        if state is not None and state.branch is not None:
            state.branch.reorder(self.cache, beam_idx)
        else:
            type(self.cache).reorder_cache(self.cache, beam_idx)
        if state is not None:
            state.reorder(beam_idx)


# What a forward is, by its arguments.


def check_batch(known: SequenceState, batch: int) -> None:
    """Refuse a cache whose rows were picked or repeated: what is known about them was not."""
    if known.image_mask.shape[0] != batch:
        raise UnsupportedFeatureError(
            f"The cache was filled with a batch of {known.image_mask.shape[0]} sequences and is now used with {batch}. "
            "Expand the inputs before the first forward (generate does), or start with an empty cache."
        )


def parameter_names(module: nn.Module) -> tuple[str, ...]:
    """Return the names of the arguments a module's forward takes by position, in order."""
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]  # without self
    return tuple(each.name for each in parameters if each.kind is each.POSITIONAL_OR_KEYWORD) or ("input_ids",)


def answer_length(inputs: dict[str, Any]) -> int:
    """How many tokens a decoder behind an encoder reads; without any given, it starts by itself with one."""
    for name in ("decoder_input_ids", "decoder_inputs_embeds", "labels"):
        if inputs.get(name) is not None:
            return int(inputs[name].shape[1])
    return 1


def num_drafted(kwargs: dict[str, Any]) -> int:
    """How many of the new tokens are a drafted answer rather than a prompt.

    Assisted decoding asks for the logits of the token before the draft and of every drafted one, also in the forward
    that reads the prompt; a caller who scores an answer behind a prompt does the same. Otherwise it is none.
    """
    wanted = kwargs.get("logits_to_keep")
    return max(wanted - 1, 0) if isinstance(wanted, int) else 0


def every_row(kwargs: dict[str, Any], tokens: torch.Tensor) -> dict[str, Any]:
    """Ask for the same logits by position, so that no layer leaves out the rows of the others."""
    wanted, q_len = kwargs.get("logits_to_keep"), tokens.shape[1]
    if not isinstance(wanted, int) or not 0 < wanted < q_len:
        return {}
    return {"logits_to_keep": torch.arange(q_len - wanted, q_len, device=tokens.device)}


def has_images(kwargs: dict[str, Any]) -> bool:
    """Whether a forward brings images of its own, encoded or not; one that checks a draft never does."""
    return any(
        value is not None and (name.startswith("pixel_values") or (name == "mm_encoder_outputs" and bool(value)))
        for name, value in kwargs.items()
    )


def length_of(cache: Any) -> int | torch.Tensor:
    """How many tokens a cache holds; a copy, since a static cache counts in place."""
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
