"""The other branch's prompt: the arguments of the forward that reads it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from vlmfix.decoding.base import DecodingMethod, OtherTokens
from vlmfix.decoding.branch import NOT_HANDED_ON, TOKEN_TYPES, Branch
from vlmfix.decoding.other_image import OtherImages, is_image_argument, looks_of, replace_images
from vlmfix.engine.calls import tokens_of
from vlmfix.engine.forwards import EditedForward
from vlmfix.errors import UnsupportedFeatureError
from vlmfix.model.anatomy import Anatomy
from vlmfix.model.images import blank_images


@dataclass
class OtherPrompt:
    """What the other branch reads beside a prompt of the model's own branch.

    Attributes:
        arguments: Arguments of its forward, but for its cache. Tensors hold all of its new tokens.
        branch: The branch it begins or continues, still without a cache.
        shared: Positions in the model's own cache of the tokens it begins with: int64 ``[batch, n]``.
        images_are_shared: Whether they hold all of its images.
    """

    arguments: dict[str, Any]
    branch: Branch
    shared: torch.Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.int64))
    images_are_shared: bool = False

    @property
    def length(self) -> int:
        """New tokens of the prompt."""
        tokens = tokens_of(self.arguments)
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


def with_same_tokens(
    method: DecodingMethod, anatomy: Anatomy, forward: EditedForward, inputs: dict[str, Any], other: OtherImages | None
) -> OtherPrompt:
    """Prepare the same tokens, with another image or for a branch with edits.

    Args:
        method: Makes the image.
        anatomy: The model.
        forward: The forward of the model's own branch.
        inputs: Its arguments by name.
        other: Features of the other images, when ``generate`` has encoded the model's own itself.

    Raises:
        UnsupportedFeatureError: Only encoded images were given.
    """
    past = int(forward.past)
    arguments = {name: value for name, value in inputs.items() if name not in NOT_HANDED_ON and value is not None}
    found = OtherPrompt(arguments, Branch(forward.has_image, None, forward.valid_mask, past + forward.q_len))
    if not method.changes_image:
        return found
    if other is not None:
        arguments["mm_encoder_outputs"] = other.expanded(anatomy.model, arguments)
    elif arguments.get("mm_encoder_outputs"):
        raise UnsupportedFeatureError(
            f"{method.name} needs the image itself, and the model was called with mm_encoder_outputs alone. Pass "
            "pixel_values."
        )
    elif forward.image_mask[:, past:].any() and not any(is_image_argument(*each) for each in arguments.items()):
        raise UnsupportedFeatureError(
            f"{method.name} found image tokens in the prompt and no pixel_values to make another image of. Pass what "
            "the processor gave."
        )
    found.arguments = replace_images(arguments, method.other_images)
    positions = arguments.get("position_ids")
    has_positions = isinstance(positions, torch.Tensor) and positions.shape[-1] == found.length
    if not past and has_positions and _may_share(arguments):
        mask = forward.image_mask
        first_image = torch.where(mask.any(1), mask.int().argmax(1), mask.shape[1] - 1)
        found.shared = torch.arange(int(first_image.min()), device=mask.device).expand(len(mask), -1)
    return found


def with_other_tokens(
    method: DecodingMethod, anatomy: Anatomy, forward: EditedForward, inputs: dict[str, Any], known: torch.Tensor
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
    past, device = int(forward.past), input_ids.device
    valid, image = forward.valid_mask[:, past:], forward.image_mask[:, past:]
    if not anatomy.image_token_ids:
        image = torch.zeros_like(image)  # its images are no tokens
    others, is_active = [], []
    rows = zip(input_ids, image, valid, forward.has_image.tolist(), strict=True)
    for ids, is_image, kept, has_image in rows:
        own = ids[kept].tolist()
        other = method.other_tokens(own, is_image[kept].tolist()) if has_image else None
        is_active.append(other is not None)
        others.append(other or OtherTokens(tuple(own), tuple(range(len(own)))))
    layout = _Layout(others, valid)
    branch = Branch(
        torch.tensor(is_active, device=device),
        torch.tensor([other.is_swapped for other in others], device=device),
        torch.cat([known.to(device), layout.is_token], dim=1),
        past + forward.q_len,
    )
    found = OtherPrompt({"input_ids": layout.ids}, branch)
    positions = _positions(layout, anatomy, forward, inputs, removes=method.removes_image)
    if positions is not None:
        found.arguments["position_ids"], branch.last_position = positions, positions[..., -1:]
    if not branch.is_dense:
        found.arguments["attention_mask"] = branch.valid.long()
    found.arguments.update(_rest(layout, inputs, removes=method.removes_image))
    if not past and positions is not None and _may_share({**inputs, **found.arguments}):
        shared = layout.shared_columns()
        images = (layout.pick(image) & layout.is_old).any(0).nonzero().flatten().tolist()
        found.images_are_shared = bool(images) and images[-1] < shared.shape[1]
        found.shared = shared if found.images_are_shared or not images else shared[:, : images[0]]
    return found


class _Layout:
    """Prompts of different lengths in the rows of a batch, padded on the left.

    Attributes:
        ids: int64 ``[batch, length]``.
        columns: Where each token is among the new tokens of the model's own branch: int64 ``[batch, length]``. A token
            that is new is of the kind of the one it stands before: text. At the end, of that of the last one.
        is_old: Whether a token is one of those, bool ``[batch, length]``.
        is_token: Whether it is no padding, bool ``[batch, length]``.
        padding: Columns before each prompt, int64 ``[batch, 1]``.
        common: How many tokens each prompt has in common with the own one at its beginning, int64 ``[batch, 1]``.
        starts: Where each own prompt begins, int64 ``[batch, 1]``.
    """

    def __init__(self, others: Sequence[OtherTokens], valid: torch.Tensor) -> None:
        length, device = max(len(other.ids) for other in others), valid.device
        padding = [length - len(other.ids) for other in others]

        def filled(name: str, value: int) -> torch.Tensor:
            rows = [[value] * pad + list(getattr(other, name)) for pad, other in zip(padding, others, strict=True)]
            return torch.tensor(rows, device=device)

        common = [next((i for i, at in enumerate(other.sources) if i != at), len(other.ids)) for other in others]
        sources = filled("sources", -1)
        self.ids = filled("ids", 0)
        self.padding, self.common = (torch.tensor(each, device=device)[:, None] for each in (padding, common))
        self.starts = valid.int().argmax(1, keepdim=True)
        self.is_old = sources >= 0
        following = torch.where(self.is_old, sources + self.starts, valid.shape[1] - 1)
        self.columns = following.flip(1).cummin(1).values.flip(1)
        self.is_token = torch.arange(length, device=device) >= self.padding

    def pick(self, value: torch.Tensor) -> torch.Tensor:
        """Return what is said of the own tokens, ``[batch, new, ...]``, for these: ``[batch, length, ...]``."""
        return value[torch.arange(len(value), device=value.device)[:, None], self.columns]

    def shared_columns(self) -> torch.Tensor:
        """Return where in the own cache the leading columns are that all prompts have in common: int64 ``[rows, n]``.

        At least one column is left to be read.
        """
        count = min(int((self.padding + self.common).min()), self.ids.shape[1] - 1)
        return (torch.arange(count, device=self.ids.device) - self.padding + self.starts).clamp_min(0)


def _may_share(arguments: dict[str, Any]) -> bool:
    """Whether the first tokens can be read without those behind them.

    Where arguments say what kind of token each is, image tokens may look ahead, and so may the number of a token; not
    where its position is given in three dimensions.
    """
    positions = arguments.get("position_ids")
    by_grid = isinstance(positions, torch.Tensor) and positions.dim() == 3
    return by_grid or all(arguments.get(name) is None for name in TOKEN_TYPES)


def _positions(
    layout: _Layout, anatomy: Anatomy, forward: EditedForward, inputs: dict[str, Any], *, removes: bool
) -> torch.Tensor | None:
    """Place the tokens: as in the own prompt up to the first that differs, one by one from there, ``[(dims,) ...]``.

    In a further turn the prompt goes on where its own branch ends. ``None`` leaves it to a model that looks where the
    images are.
    """
    given, past, batch = inputs.get("position_ids"), int(forward.past), len(layout.ids)
    if not (isinstance(given, torch.Tensor) and given.shape[-1] == forward.q_len):
        if hasattr(anatomy.inner, "rope_deltas") and not removes:
            return None
        given = torch.arange(past, past + forward.q_len, device=layout.ids.device)[None]
    given = given.expand(*given.shape[:-2], batch, -1)
    # Before the first new token: where the own branch is, and where the other one is.
    own_last = given.gather(-1, layout.starts.expand(*given.shape[:-1], 1)) - 1
    branch, last = forward.state.branch, own_last
    if past and branch is not None and branch.last_position is not None:
        last = branch.last_position + past - branch.own_length
    steps = torch.arange(layout.ids.shape[1], device=given.device) - layout.padding + 1
    at_end = (layout.padding + layout.common - 1).clamp_min(0)
    in_common = given.gather(-1, layout.columns.expand(*given.shape[:-1], -1)) - own_last
    end = torch.where(layout.common > 0, in_common.gather(-1, at_end.expand(*given.shape[:-1], 1)), 0)
    positions = last + torch.where(steps <= layout.common, in_common, end + steps - layout.common)
    return positions.clamp_min(0)


def _rest(layout: _Layout, inputs: dict[str, Any], *, removes: bool) -> dict[str, Any]:
    """Return the other arguments: those by token for these tokens, and the images, if they are not removed."""
    by_token, new = (*TOKEN_TYPES, *looks_of(inputs)), inputs["input_ids"].shape[1]
    found = {}
    for name in by_token:
        if inputs.get(name) is not None and (not removes or name == "token_type_ids"):  # others say where images are
            found[name] = layout.pick(inputs[name][:, -new:])
    if removes:
        return {**found, **blank_images(inputs, layout.ids.shape[1])}
    made = ("input_ids", "attention_mask", "position_ids", *by_token, *NOT_HANDED_ON)
    return {**{name: value for name, value in inputs.items() if name not in made}, **found}
