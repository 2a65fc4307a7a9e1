"""What several methods share: base classes, and edits of scores, weights and heads."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from vlmfix.errors import MethodError
from vlmfix.methods.base import Method
from vlmfix.methods.parameters import described, parameter
from vlmfix.methods.selection import scaled_layers
from vlmfix.methods.views import EditedRows, Layer, PromptRows
from vlmfix.model.anatomy import Anatomy


@dataclass(frozen=True)
class RaisesImageScores(Method):
    """Base of the methods that raise the image's scores in the row that predicts the next token."""

    edits_scores = True

    alpha: float = parameter(1.0, low=0, off=0, help="Strength.")
    edit_prompt: bool = parameter(True, help="Edit the prompt's last row too, not only those of generated tokens.")

    @property
    def prompt_rows(self) -> PromptRows:
        """The last row, unless switched off."""
        return "last" if self.edit_prompt else "none"


@dataclass(frozen=True)
class RaisesGeneratedText(Method):
    """Base of the methods that raise attention to generated text, in the rows of generated tokens alone."""

    prompt_rows = "none"
    attention_kinds = ("joint", "text")  # self-attention over prompt and answer: the one is weighed against the other
    default_layers = scaled_layers(5, 17)  # the scaling to other depths is ours

    alpha: float = parameter(1.0, low=0, off=0, help="Strength.")

    def notes(self, anatomy: Anatomy) -> tuple[str, ...]:
        """Warn about layers outside the default ones."""
        scope = self.default_layers(anatomy.num_layers)
        if set(self.layer_indices) <= set(scope):
            return ()
        return (
            f"{self.name}: layers outside {scope[0]}..{scope[-1]} (5..17 of 32, scaled): wider scopes broke the "
            "paper's texts",
        )


@dataclass(frozen=True)
class ExperimentalMethod(Method):
    """A method that no publication supports in this form: nobody gets one without asking for it."""

    caveat: ClassVar[str] = ""
    """What it is, for the error message."""

    experimental: bool = dataclasses.field(
        default=False, kw_only=True, metadata=described("Must be true: says that you know.")
    )

    def validate(self) -> None:
        """Raise ``MethodError`` unless ``experimental``."""
        if not self.experimental:
            raise MethodError(
                f"{self.name} is {self.caveat}. To try it all the same: "
                f"vlmfix.patch(model, {self.name!r}, experimental=True)."
            )

    def notes(self, anatomy: Anatomy) -> tuple[str, ...]:
        """Say what it is."""
        return (f"{self.name} is {self.caveat}",)


def raise_scores(scores: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
    """Add ``gain_j |s_j|`` to the scores, in place where autograd does not mind: never lowers one.

    Args:
        scores: ``[batch, num_heads, rows, keys]``.
        gain: fp32, broadcastable to it, >= 0.
    """
    if scores.requires_grad:
        return torch.addcmul(scores, scores.abs(), gain)
    return scores.addcmul_(scores.abs(), gain)


def raise_keys(
    scores: torch.Tensor, layer: Layer, make_gain: Callable[[], torch.Tensor], by_head: torch.Tensor | None = None
) -> EditedRows:
    """Raise the scores of a layer by gains that all layers with the same keys share.

    Args:
        scores: ``[batch, num_heads, rows, keys]``.
        layer: The layer.
        make_gain: Returns the gains, fp32 ``[batch, keys]``, >= 0.
        by_head: Factors of the gains in this layer, fp32 ``[num_heads, 1, 1]``, >= 0.

    Returns:
        The scores and which rows have a raised key, bool ``[batch, num_heads, rows]``.
    """

    def make() -> tuple[torch.Tensor, torch.Tensor]:
        gain = make_gain()[:, None, None]
        return gain, (gain > 0).any(3)

    gain, edited = layer.per_keys(make, scores)
    return raise_scores(scores, gain if by_head is None else gain * by_head), edited.expand(scores.shape[:3])


def visible(keys: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
    """Return which of some keys, bool ``[batch, keys]``, each row sees by the ``allowed`` of ``Method.edit_scores``.

    Returns:
        Bool ``[batch, 1 or num_heads, 1 or rows, keys]``.
    """
    return keys[:, None, None] & allowed


def take_keys(per_key: torch.Tensor, start: int | torch.Tensor, length: int) -> torch.Tensor:
    """Return entries ``start..start + length - 1`` of the last dimension, 0 where there are none.

    So values by key follow a layer whose first key moves on, because its window slides.
    """
    if isinstance(start, int) and start >= 0:
        kept = per_key if start == 0 and per_key.shape[-1] <= length else per_key[..., start : start + length]
        return F.pad(kept, (0, length - kept.shape[-1])) if kept.shape[-1] < length else kept
    wanted = torch.arange(length, device=per_key.device) + on_device(start, per_key.device)
    inside = (wanted >= 0) & (wanted < per_key.shape[-1])
    return per_key[..., wanted.clamp(0, per_key.shape[-1] - 1)] * inside


def on_device(number: int | torch.Tensor, device: torch.device) -> int | torch.Tensor:
    """Return a number that may be a 0-d tensor, as it is with a static cache, on a device."""
    return number.to(device) if isinstance(number, torch.Tensor) else number


def log_mass(scores: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Return the log of the unnormalised weight of some keys: ``log sum_j exp(s_j)``.

    Args:
        scores: ``[batch, num_heads, rows, keys]``, fp32.
        keys: Bool, broadcastable to ``scores``.

    Returns:
        fp32 ``[batch, num_heads, rows]``; minus infinity where there are no keys.
    """
    return scores.masked_fill(~keys, -torch.inf).logsumexp(-1)


def scale_heads(head_outputs: torch.Tensor, scale: torch.Tensor, layer: Layer) -> torch.Tensor:
    """Multiply head outputs in all rows of samples with an image, and count them.

    Args:
        head_outputs: ``[batch, q_len, num_heads, head_dim]``.
        scale: fp32 ``[num_heads]``; heads with 1 come back bit for bit.
        layer: The layer.
    """
    has_image, num_rows = layer.once(lambda: _rows_with_image(layer))
    layer.count(num_rows.to(scale.device) * (scale != 1).sum())
    per_sample = torch.where(has_image.to(scale.device)[:, None], scale, 1.0)
    return head_outputs * per_sample[:, None, :, None].to(head_outputs.dtype)


def _rows_with_image(layer: Layer) -> tuple[torch.Tensor, torch.Tensor]:
    """Return which samples have an image, bool ``[batch]``, and how many rows these have in all, padding left out."""
    forward = layer.forward
    has_image = forward.has_image
    num_rows = forward.num_prompt_rows() if forward.is_prefill else forward.q_len
    return has_image, (has_image * num_rows).sum()


def best(values: torch.Tensor, count: int) -> torch.Tensor:
    """Return which heads have the ``count`` largest of ``[batch, num_heads, ...]``; of equal ones, the first.

    Returns:
        Bool, of the same shape.
    """
    ranks = values.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return ranks < count


def turned_towards(states: torch.Tensor, vector: torch.Tensor, strength: float | torch.Tensor) -> torch.Tensor:
    """Turn vectors towards a unit vector by about ``strength`` radians: ``|x| unit(unit(x) + strength v)``.

    Args:
        states: fp32 ``[..., size]``; a zero vector stays zero.
        vector: fp32, broadcastable to it: unit vectors, or zero to leave the states alone.
        strength: A number, or fp32 ``[..., 1]``.
    """
    length: torch.Tensor = torch.linalg.vector_norm(states, dim=-1, keepdim=True)
    return length * F.normalize(F.normalize(states, dim=-1) + strength * vector, dim=-1)
