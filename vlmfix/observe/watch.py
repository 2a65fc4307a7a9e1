"""Methods that show what happens inside a model while it answers, and edit nothing; and a log of where it looks.

They are put beside the methods of a patch (``Subject.answer(inputs, watch)``), so that they see what the patch does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from vlmfix.errors import DataError
from vlmfix.methods.base import Method
from vlmfix.methods.views import EditedRows, Forward, Layer, PromptRows


@dataclass(frozen=True)
class Watch(Method):
    """Base of the methods that show something, and edit nothing."""

    needs_text_keys = False
    needs_whole_prompt = True
    prompt_rows = "none"

    show: Callable[..., None] = field(compare=False, repr=False)


@dataclass(frozen=True)
class AttentionWatch(Watch):
    """Show attention weights of some rows of a prompt, and of every generated token, beside the base kernel.

    ``show`` is called with what ``Method.observe`` gets. Of a long prompt it gets the rows in pieces, in order.
    """

    name = "attention_watch"
    edits_weights = True
    edits_decode = False

    rows: PromptRows = "text"

    @property
    def observed_rows(self) -> PromptRows:
        """As chosen."""
        return self.rows

    def observe(self, attn_weights: torch.Tensor, allowed: torch.Tensor, layer: Layer) -> None:
        """Show them."""
        self.show(attn_weights, allowed, layer)

    def edit_weights(self, attn_weights: torch.Tensor, layer: Layer) -> EditedRows:
        """Edit nothing."""
        return attn_weights, torch.zeros(attn_weights.shape[:3], dtype=torch.bool, device=attn_weights.device)


@dataclass(frozen=True)
class HeadWatch(Watch):
    """Show head outputs, ``[batch, q_len, num_heads, head_dim]``, before any method scales them in their layer."""

    name = "head_watch"
    edits_heads = True

    def edit_heads(self, head_outputs: torch.Tensor, layer: Layer) -> torch.Tensor:
        """Show, and edit nothing."""
        self.show(head_outputs, layer)
        return head_outputs


@dataclass(frozen=True)
class InputWatch(Watch):
    """Show the residual stream ``[batch, q_len, hidden_size]`` entering each layer in a prompt."""

    name = "input_watch"
    reads_layer_input = True

    def learn(self, hidden_states: torch.Tensor, layer: Layer) -> None:
        """Show, and learn nothing."""
        self.show(hidden_states, layer)


_GENERATED, _IMAGE, _OBJECTS = 0, 1, 2
"""Where the groups of keys stand among those of an ``AttentionLog``; one object after the other."""


class AttentionLog:
    """How much rows look at the image, at objects in it, and at generated tokens.

    Put ``AttentionWatch(log.see, ...)`` beside a patch to fill it. The first forward reads the prompt, and every
    further one is a decode step. Without any image in the batch, nothing is shown.

    Args:
        cells: Per sample, image tokens (0-based, in the order of the prompt) of named objects.
        maps: Whether to keep the weight of every single image token too.

    Attributes:
        mass: Per forward and layer, fp32 ``[batch, num_heads, rows, groups]`` on the CPU: the attention of the rows
            that were shown on all keys of a group. The last of them predicts the next token.
        maps: Per forward and layer, fp32 ``[batch, image_tokens]``: the weight of every image token in that last row,
            mean over heads; 0 behind a sample's last image token. Empty unless asked for.
        num_generated: Per forward and layer, ``[batch, 1 or num_heads, rows]``: how many generated tokens a row sees.
        num_image_tokens: Per sample.
    """

    def __init__(self, cells: Sequence[Mapping[str, Sequence[int]] | None] = (), *, maps: bool = False) -> None:
        self.mass: list[dict[int, torch.Tensor]] = []
        self.maps: list[dict[int, torch.Tensor]] = []
        self.num_generated: list[dict[int, torch.Tensor]] = []
        self.num_image_tokens: tuple[int, ...] = ()
        self._cells = [dict(each or {}) for each in cells]
        self._with_maps = maps
        self._forward: Forward | None = None
        self._first_rows: list[dict[int, int]] = []
        self._groups = torch.empty(0)
        self._positions = torch.empty(0)

    def on_image(self, layers: Sequence[int]) -> torch.Tensor:
        """Return the mass on the image in the row that predicts each token: ``[batch, steps, layers, num_heads]``."""
        return stack_by_layer([{at: step[at][:, :, -1, _IMAGE] for at in layers} for step in self.mass], layers)

    def rows_on_image(self, layer: int) -> tuple[int, torch.Tensor]:
        """Return the first row of the prompt seen in a layer, and the mass of all: ``[batch, num_heads, rows]``."""
        return self._first_rows[0][layer], self.mass[0][layer][..., _IMAGE]

    def on_object(self, step: int, row: int, sample: int, name: str | None = None) -> torch.Tensor:
        """Return the mass on an object's cells, or on the image if it has none: ``[layers, num_heads]``.

        Args:
            step: Which forward.
            row: Which of its rows.
            sample: Which sample of the batch.
            name: The object.
        """
        names = list(self._cells[sample]) if self._cells else []
        group = _OBJECTS + names.index(name) if name in names else _IMAGE
        seen, first = self.mass[step], self._first_rows[step]
        return torch.stack([seen[at][sample, :, row - first[at], group] for at in sorted(seen)])

    def on_generated(self, step: int, sample: int, kind: str) -> torch.Tensor:
        """Return the attention to generated tokens in the last row of a forward: ``[layers, num_heads]``.

        Args:
            step: Which forward.
            sample: Which sample of the batch.
            kind: ``"share"``: their sum. ``"mean"``: per token that the row sees.
        """
        seen, count = self.mass[step], self.num_generated[step]
        layers = sorted(seen)
        share = torch.stack([seen[at][sample, :, -1, _GENERATED] for at in layers])
        return share if kind == "share" else share / torch.stack([count[at][sample, :, -1] for at in layers])

    def see(self, attn_weights: torch.Tensor, allowed: torch.Tensor, layer: Layer) -> None:
        """Add up ``[batch, num_heads, rows, keys]`` over groups of keys."""
        at = layer.site.layer_idx
        if layer.forward is not self._forward:
            self._begin(layer.forward)
        self._first_rows[-1].setdefault(at, layer.rows[0])
        groups = layer.per_keys(lambda: self._groups_of_keys(attn_weights, layer), attn_weights)
        _append(self.mass[-1], at, attn_weights @ groups[:, None])
        generated = layer.keys("generated", attn_weights)[:, None, None] & allowed
        _append(self.num_generated[-1], at, generated.sum(-1))
        if self._with_maps:  # the last piece of a long prompt holds the row
            self.maps[-1][at] = self._map(attn_weights[:, :, -1].mean(1), layer)

    def _begin(self, forward: Forward) -> None:
        self._forward = forward
        for kept in (self.mass, self.maps, self.num_generated, self._first_rows):
            kept.append({})  # type: ignore[attr-defined]
        if forward.is_prefill:
            image = forward.image_mask
            self.num_image_tokens = tuple(image.sum(1).tolist())
            self._groups = self._groups_of_prompt(image)
            # Image columns first, in their order; behind a sample's last one, -1.
            order = (~image).to(torch.int8).argsort(dim=1, stable=True)[:, : max(1, *self.num_image_tokens)]
            self._positions = order.masked_fill(~image.gather(1, order), -1)

    def _groups_of_prompt(self, image: torch.Tensor) -> torch.Tensor:
        """Tell which tokens of the prompt belong to which group: bool ``[batch, prompt, groups]``."""
        num_objects = max(map(len, self._cells), default=0)
        groups = torch.zeros(*image.shape, _OBJECTS + num_objects, dtype=torch.bool, device=image.device)
        groups[..., _IMAGE] = image
        for sample, cells in enumerate(self._cells):
            positions = image[sample].nonzero()[:, 0]
            for number, (name, indices) in enumerate(cells.items()):
                if any(not 0 <= index < len(positions) for index in indices):
                    raise DataError(
                        f"The cells of {name!r} must be from 0 to {len(positions) - 1}, the image's tokens; got "
                        f"{min(indices)} to {max(indices)}."
                    )
                groups[sample, positions[list(indices)], _OBJECTS + number] = True
        return groups

    def _groups_of_keys(self, attn_weights: torch.Tensor, layer: Layer) -> torch.Tensor:
        """The same for the keys of a layer, ``[batch, keys, groups]``, as numbers."""
        groups = layer.visible_keys(self._groups, attn_weights.shape[-1])
        groups = F.pad(groups, (0, 0, 0, attn_weights.shape[-1] - groups.shape[1])).to(attn_weights)
        groups[..., _GENERATED] = layer.keys("generated", attn_weights).to(attn_weights)
        return groups

    def _map(self, row: torch.Tensor, layer: Layer) -> torch.Tensor:
        """Pick the weights of image tokens, ``[batch, image_tokens]``, from rows ``[batch, keys]``."""
        offset = layer.key_offset(row.shape[-1])
        positions = self._positions.to(row.device)
        is_there = (positions >= 0) & (positions >= offset)
        picked = row.gather(1, (positions - offset).clamp(0, row.shape[-1] - 1))
        return picked.masked_fill(~is_there, 0.0).float().cpu()


def _append(found: dict[int, torch.Tensor], at: int, rows: torch.Tensor) -> None:
    rows = rows.float().cpu()
    found[at] = torch.cat([found[at], rows], dim=2) if at in found else rows


def stack_by_layer(steps: Sequence[Mapping[int, torch.Tensor]], layers: Sequence[int]) -> torch.Tensor:
    """Stack ``[batch, n]`` by forward and layer: ``[batch, steps, layers, n]``."""
    return torch.stack([torch.stack([step[at] for at in layers], dim=1) for step in steps], dim=1)
