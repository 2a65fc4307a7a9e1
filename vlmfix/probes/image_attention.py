"""Attention to the image, per layer, head and token, without ever writing out a whole map."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vlmfix.observe.ask import Answers, look_at
from vlmfix.observe.watch import AttentionLog, AttentionWatch, stack_by_layer
from vlmfix.observe.words import prompt_tokens
from vlmfix.probes.result import ProbeResult


@dataclass(frozen=True, eq=False)
class ImageAttention(ProbeResult):
    """How much each row looks at the image, and where.

    Attributes:
        mass: fp32 ``[batch, steps, layers, num_heads]``: attention on all image tokens in the row that predicts answer
            token ``steps`` (step 0: the prompt's last row). NaN behind a sample's last token, 0 without an image.
        maps: fp32 ``[batch, steps, layers, image_tokens]``: the same per image token, mean over heads, in the order of
            the prompt; 0 behind a sample's last image token. ``None`` unless asked for.
        prompt: fp32 ``[batch, rows, layers, num_heads]``: attention on all image tokens in the prompt's rows behind its
            last image token; NaN where a row is not one of a sample. ``None`` unless asked for.
        prompt_rows: Column of ``input_ids`` each of those rows stands in.
        num_image_tokens: Per sample.
        tokens: The answers' ids.
    """

    mass: torch.Tensor
    maps: torch.Tensor | None
    prompt: torch.Tensor | None
    prompt_rows: tuple[int, ...]
    num_image_tokens: tuple[int, ...]
    tokens: tuple[tuple[int, ...], ...]

    def plot(self, ax: Any = None, *, sample: int = 0, **options: Any) -> Any:
        """Draw the mass on the image, mean over heads, as a map of layers and answer tokens."""
        mass = self.mass[sample, : len(self.tokens[sample])].mean(-1).T
        title = "attention to the image"
        return self._map(ax, mass, xlabel="answer token", label="attention on the image", title=title)


@torch.no_grad()
def attention_to_image(
    model: object,
    inputs: Mapping[str, Any],
    *,
    layers: Sequence[int] | str | None = None,
    max_new_tokens: int = 1,
    answers: Answers | None = None,
    maps: bool = False,
    prompt: bool = False,
) -> ImageAttention:
    """Measure how much every head looks at the image while a prompt is read and answered.

    The weights are those the model uses, edits of an active patch included. Only sums are kept; softmax is written out
    for the rows behind the image and for generated tokens, a piece at a time.

    Args:
        model: The model, patched or not.
        inputs: What ``model.generate`` takes, left-padded.
        layers: Layers to look at, see ``LayerSpec``. Default: all.
        max_new_tokens: Length of the greedy answer to follow; 1 looks at the prompt alone.
        answers: Ids to follow instead of the model's own.
        maps: Also keep the weight of every image token, mean over heads, for each answer token.
        prompt: Also keep the rows of the prompt behind its last image token.

    Raises:
        UnsupportedFeatureError: See ``look_at``; or a layer adds terms to its scores that cannot be written out.
        MethodError: ``layers`` or ``answers`` that fit no such model.
    """
    subject = look_at(model, "attention_to_image", inputs)
    wanted = subject.layers(layers)
    log = AttentionLog(maps=maps)
    watch = AttentionWatch(log.see, "text" if prompt else "last", layers=wanted)
    answered = subject.answer(inputs, watch, max_new_tokens=max_new_tokens, answers=answers)
    batch, steps, heads = len(answered.tokens), answered.steps, subject.anatomy.num_heads
    behind = answered.behind[..., None, None]
    is_shown = bool(log.mass)  # nothing is, without any image in the whole batch
    mass = log.on_image(wanted)[:, :steps] if is_shown else torch.zeros(batch, steps, len(wanted), heads)
    weights, rows, columns = None, None, torch.zeros(0)
    if maps:
        weights = stack_by_layer(log.maps[:steps], wanted) if is_shown else mass[..., :0]
        weights = weights.masked_fill(behind, float("nan"))
    if prompt:
        own = prompt_tokens(subject.anatomy, inputs).behind.cpu() & is_shown
        columns = own.any(0).nonzero()[:, 0]
        rows = torch.zeros(batch, 0, len(wanted), heads)
        if is_shown:
            rows = torch.stack([_rows(log, at, columns) for at in wanted], dim=2)
            rows = rows.masked_fill(~own[:, columns, None, None], float("nan"))
    return ImageAttention(
        wanted,
        subject.patch,
        mass=mass.masked_fill(behind, float("nan")),
        maps=weights,
        prompt=rows,
        prompt_rows=tuple(columns.tolist()),
        num_image_tokens=log.num_image_tokens or (0,) * batch,
        tokens=answered.tokens,
    )


def _rows(log: AttentionLog, layer: int, columns: torch.Tensor) -> torch.Tensor:
    """Return the mass on the image in some rows of the prompt, ``[batch, rows, num_heads]``."""
    first, seen = log.rows_on_image(layer)
    return seen.transpose(1, 2)[:, columns - first]
