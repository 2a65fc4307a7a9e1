"""The other branch's prompt: the arguments of the forward that reads it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from vlmfix.decoding.base import DecodingMethod, OtherTokens
from vlmfix.decoding.other_image import RawImages, encode_for_beams, is_image_argument, looks_of, replace_images
from vlmfix.errors import UnsupportedFeatureError
from vlmfix.model.images import blank_images

if TYPE_CHECKING:
    from vlmfix.methods.views import Forward
    from vlmfix.model.anatomy import Anatomy


TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids")


NOT_HANDED_ON = ("past_key_values", "use_cache", "return_dict", "cache_position", "labels", "logits_to_keep")


WATCHED = ("output_attentions", "output_hidden_states")


@dataclass
class OtherPrompt:
    """What the other branch reads beside a prompt of the model's own branch.

    Attributes:
        arguments: Arguments of its forward, but for its cache. Tensors hold all of its new tokens.
        times: How often each of its rows is repeated beside the rows of the model's own branch (beams).
        active: Which of those are contrasted: bool ``[batch]``.
        swapped: In which of them the model's own prompt is the one to contrast against: bool ``[batch]``, or ``None``.
        valid: Which of its tokens are no padding, those before this prompt included: bool ``[rows, length]``.
        shared: Positions in the model's own cache of the tokens it begins with: int64 ``[rows, n]``.
        images_are_shared: Whether they hold all of its images.
        last_position: The position of its last token, ``[(dims,) rows, 1]``; ``None`` where that is the same in both.
    """

    arguments: dict[str, Any]
    times: int
    active: torch.Tensor
    swapped: torch.Tensor | None
    valid: torch.Tensor
    shared: torch.Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.int64))
    images_are_shared: bool = False
    last_position: torch.Tensor | None = None

    @property
    def length(self) -> int:
        """New tokens of the prompt."""
        tokens = self.arguments.get("input_ids")
        tokens = self.arguments.get("inputs_embeds") if tokens is None else tokens
        assert tokens is not None
        return int(tokens.shape[1])

    def behind_shared(self) -> dict[str, Any]:
        """Return the arguments of a forward that only reads what is behind the shared tokens."""
        start, length = self.shared.shape[1], self.length
        found = dict(self.arguments)
        for name in ("input_ids", "inputs_embeds", *TOKEN_TYPES, *looks_of(found)):
            value = found.get(name)
            if isinstance(value, torch.Tensor) and value.shape[1] == length:
                found[name] = value[:, start:]
        found["position_ids"] = found["position_ids"][..., start:]
        if self.images_are_shared:
            images = [name for name, value in found.items() if is_image_argument(name, value)]
            for name in (*images, "mm_encoder_outputs"):
                found.pop(name, None)
        return found


def with_other_image(
    method: DecodingMethod, anatomy: Anatomy, forward: Forward, inputs: dict[str, Any], raw: RawImages | None
) -> OtherPrompt:
    """Prepare the same tokens with another image.

    Args:
        method: Makes the image.
        anatomy: The model.
        forward: The forward of the model's own branch.
        inputs: Its arguments by name.
        raw: The images, when ``generate`` has encoded them itself.

    Raises:
        UnsupportedFeatureError: Only encoded images were given.
    """
    arguments = {name: value for name, value in inputs.items() if name not in (*NOT_HANDED_ON, *WATCHED)}
    batch, times = forward.image_mask.shape[0], 1
    encoded = arguments.pop("mm_encoder_outputs", None)
    if raw is not None and _is_repeated(forward, inputs, raw):
        times = batch // raw.batch
        arguments = {name: _first_of(name, value, times, batch) for name, value in arguments.items()}
        arguments.update(raw.arguments)
    elif raw is not None:
        replaced = replace_images(raw.arguments, method.other_images)
        arguments["mm_encoder_outputs"] = encode_for_beams(anatomy.model, replaced, inputs.get("input_ids"), raw.batch)
    elif encoded:
        raise UnsupportedFeatureError(
            f"{method.name} needs the image itself, and the model was called with mm_encoder_outputs alone. Pass "
            "pixel_values."
        )
    has_new_image = bool(forward.image_mask[:, int(forward.past) :].any())
    is_given = any(is_image_argument(*each) for each in arguments.items()) or "mm_encoder_outputs" in arguments
    if has_new_image and not is_given:
        raise UnsupportedFeatureError(
            f"{method.name} found image tokens in the prompt and no pixel_values to make another image of. Pass what "
            "the processor gave."
        )
    arguments = replace_images(arguments, method.other_images)
    found = OtherPrompt(arguments, times, forward.has_image, None, forward.valid_mask[::times])
    prefix = torch.where(forward.image_mask.any(1), forward.image_mask.int().argmax(1), forward.image_mask.shape[1] - 1)
    if not forward.past and _may_share(arguments) and _has_positions(arguments, found.length):
        found.shared = torch.arange(int(prefix.min()), device=prefix.device).expand(batch // times, -1)
    return found


def _is_repeated(forward: Forward, inputs: dict[str, Any], raw: RawImages) -> bool:
    """Whether rows are the prompts of ``generate``, or those repeated for their beams, with no answers behind them."""
    tokens = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"]
    times = tokens.shape[0] // raw.batch
    return times == 1 or (not forward.past and torch.equal(tokens, tokens[::times].repeat_interleave(times, 0)))


def _may_share(arguments: dict[str, Any]) -> bool:
    """Whether tokens before the image cannot see it; token types may say otherwise (PaliGemma, Gemma 3)."""
    positions = arguments.get("position_ids")
    by_grid = isinstance(positions, torch.Tensor) and positions.dim() == 3
    return by_grid or all(arguments.get(name) is None for name in TOKEN_TYPES)


def _has_positions(arguments: dict[str, Any], length: int) -> bool:
    positions = arguments.get("position_ids")
    return isinstance(positions, torch.Tensor) and positions.shape[-1] == length


def _first_of(name: str, value: Any, times: int, batch: int) -> Any:
    """Undo the repetition of prompts for their beams."""
    if times == 1 or not isinstance(value, torch.Tensor):
        return value
    if name == "position_ids" and value.dim() == 3:
        return value[:, ::times]
    return value[::times] if value.shape[:1] == (batch,) else value


def with_other_tokens(
    method: DecodingMethod, anatomy: Anatomy, forward: Forward, inputs: dict[str, Any], known: torch.Tensor | None
) -> OtherPrompt:
    """Prepare a prompt of other tokens.

    Args:
        method: Makes it.
        anatomy: The model.
        forward: The forward of the model's own branch.
        inputs: Its arguments by name.
        known: Which tokens of the other branch's cache are no padding, bool ``[batch, length]``.

    Raises:
        UnsupportedFeatureError: The token ids are not known.
    """
    input_ids = inputs.get("input_ids")
    if input_ids is None:
        raise UnsupportedFeatureError(f"{method.name} changes the prompt and needs its tokens. Pass input_ids.")
    past, new = int(forward.past), forward.q_len
    valid, image = forward.valid_mask[:, past:], forward.image_mask[:, past:]
    if not anatomy.image_token_ids:
        image = torch.zeros_like(image)  # its images are no tokens
    own = [row[kept].tolist() for row, kept in zip(input_ids, valid, strict=True)]
    flags = [row[kept].tolist() for row, kept in zip(image, valid, strict=True)]
    has_image = forward.has_image.tolist()
    others = [
        method.other_tokens(ids, is_image) if wanted else None
        for ids, is_image, wanted in zip(own, flags, has_image, strict=True)
    ]
    filled = [
        OtherTokens(tuple(ids), tuple(range(len(ids)))) if other is None else other
        for ids, other in zip(own, others, strict=True)
    ]
    length = max(len(other.ids) for other in filled)
    device = input_ids.device
    ids = input_ids.new_zeros(len(filled), length)
    sources = torch.full_like(ids, -1)
    for row, other in enumerate(filled):
        ids[row, length - len(other.ids) :] = torch.tensor(other.ids, device=device)
        sources[row, length - len(other.ids) :] = torch.tensor(other.sources, device=device)
    lengths = torch.tensor([len(other.ids) for other in filled], device=device)
    here = torch.arange(length, device=device) >= length - lengths[:, None]
    found = OtherPrompt(
        {"input_ids": ids},
        1,
        torch.tensor([other is not None for other in others], device=device),
        torch.tensor([other.is_swapped for other in filled], device=device),
        here if known is None else torch.cat([known.to(device), here], dim=1),
    )
    starts = valid.int().argmax(1)
    columns = sources + starts[:, None]
    _add_positions(
        found, anatomy, inputs, others=filled, starts=starts, past=past, new=new, removes=method.removes_image
    )
    _add_rest(found, inputs, columns, sources >= 0, removes=method.removes_image)
    if not past and _may_share({**found.arguments, **_token_types(inputs)}) and "position_ids" in found.arguments:
        shared = _shared_columns(filled, length, starts)
        images = (image.gather(1, columns.clamp(0, new - 1)) & (sources >= 0)).any(0).nonzero().flatten().tolist()
        found.images_are_shared = bool(images) and images[-1] < shared.shape[1]
        found.shared = shared if found.images_are_shared or not images else shared[:, : images[0]]
    return found


def _token_types(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: inputs[name] for name in TOKEN_TYPES if inputs.get(name) is not None}


def _common(other: OtherTokens) -> int:
    """How many tokens a prompt begins with that the sample's own prompt begins with too."""
    return next((i for i, source in enumerate(other.sources) if source != i), len(other.sources))


def _shared_columns(others: Sequence[OtherTokens], length: int, starts: torch.Tensor) -> torch.Tensor:
    """Say where in the model's own cache the leading columns of the other branch are: int64 ``[rows, n]``."""
    paddings = [length - len(other.ids) for other in others]
    count = min(padding + _common(other) for padding, other in zip(paddings, others, strict=True))
    columns = torch.arange(min(count, length - 1), device=starts.device)
    return (columns - torch.tensor(paddings, device=starts.device)[:, None] + starts[:, None]).clamp_min(0)


def _add_positions(
    found: OtherPrompt,
    anatomy: Anatomy,
    inputs: dict[str, Any],
    *,
    others: Sequence[OtherTokens],
    starts: torch.Tensor,
    past: int,
    new: int,
    removes: bool,
) -> None:
    """Place the tokens: as in the model's own prompt up to the first that differs, one by one from there."""
    valid, rows = found.valid, len(others)
    given = inputs.get("position_ids")
    length = found.length
    if removes:
        positions = (valid.long().cumsum(1) - 1).clamp_min(0)[:, -length:]
    elif isinstance(given, torch.Tensor) and given.shape[-1] == new:
        positions = _continued_positions(given.expand(*given.shape[:-2], rows, -1), others, starts, length)
    elif hasattr(anatomy.inner, "rope_deltas"):
        return  # the model itself knows where images are
    else:
        given = torch.arange(past, past + new, device=valid.device).expand(rows, -1)
        positions = _continued_positions(given, others, starts, length)
    found.arguments["position_ids"] = positions
    found.last_position = positions[..., -1:]


def _continued_positions(
    given: torch.Tensor, others: Sequence[OtherTokens], starts: torch.Tensor, length: int
) -> torch.Tensor:
    positions = given.new_zeros(*given.shape[:-1], length)
    for row, (other, start) in enumerate(zip(others, starts.tolist(), strict=True)):
        common, padding = _common(other), length - len(other.ids)
        begin = given[..., row, start : start + common]
        positions[..., row, padding : padding + common] = begin
        last = begin[..., -1:] if common else given[..., row, start : start + 1] - 1
        rest = torch.arange(1, len(other.ids) - common + 1, device=given.device)
        positions[..., row, padding + common :] = last + rest
    return positions


def _add_rest(
    found: OtherPrompt,
    inputs: dict[str, Any],
    columns: torch.Tensor,
    is_old: torch.Tensor,
    *,
    removes: bool,
) -> None:
    arguments = found.arguments
    if not bool(found.valid.all()):
        arguments["attention_mask"] = found.valid.long()
    new = inputs["input_ids"].shape[1]
    columns = torch.where(is_old, columns, new - 1)  # new tokens are text, like the last one
    rows = torch.arange(len(columns), device=columns.device)[:, None]
    looks = looks_of(inputs)
    for name in (*TOKEN_TYPES, *looks):
        if inputs.get(name) is not None and (not removes or name == "token_type_ids"):  # others say where images are
            arguments[name] = inputs[name][:, -new:][rows, columns.clamp(0, new - 1)]
    if removes:
        arguments.update(blank_images(inputs, found.length))
        return
    skipped = ("input_ids", "attention_mask", "position_ids", *TOKEN_TYPES, *looks, *NOT_HANDED_ON, *WATCHED)
    arguments.update({name: value for name, value in inputs.items() if name not in skipped})
