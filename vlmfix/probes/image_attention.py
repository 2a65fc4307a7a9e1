"""Attention to the image, per layer, head and token, without ever writing out a whole map."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from vlmfix.methods.views import Forward, Layer
from vlmfix.observe.ask import Answers, look_at
from vlmfix.observe.watch import AttentionWatch
from vlmfix.probes.result import ProbeResult, heat_map, in_words


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
        return heat_map(
            ax,
            self.mass[sample, : len(self.tokens[sample])].mean(-1).T,
            self.layers,
            xlabel="answer token",
            label="attention on the image",
            title=f"attention to the image\n{in_words(self.patch)}",
        )


class _Images(NamedTuple):
    """Where image tokens are.

    Attributes:
        positions: int64 ``[batch, most]``: columns of the prompt, -1 behind a sample's last image token.
        last: int64 ``[batch]``: the row of a prompt that predicts the first answer token.
    """

    positions: torch.Tensor
    last: torch.Tensor


class ImageLog:
    """Sums up the attention weights it is shown, forward by forward: the prompt, then each generated token."""

    def __init__(self, *, with_maps: bool, with_prompt: bool) -> None:
        self.mass: list[dict[int, torch.Tensor]] = []
        self.maps: list[dict[int, torch.Tensor]] = []
        self.prompt: dict[int, torch.Tensor] = {}
        self.num_image_tokens: list[int] = []
        self._with_maps = with_maps
        self._with_prompt = with_prompt
        self._run: Forward | None = None
        self._images: _Images | None = None

    def see(self, attn_weights: torch.Tensor, allowed: torch.Tensor, layer: Layer) -> None:
        """Sum up ``[batch, num_heads, rows, keys]``."""
        forward, at = layer.forward, layer.site.layer_idx
        if forward is not self._run:
            self._run = forward
            self.mass.append({})
            self.maps.append({})
            if forward.is_prefill:
                self._images = _find_images(forward)
                self.num_image_tokens = (self._images.positions >= 0).sum(1).tolist()
        assert self._images is not None
        is_image = layer.keys("image", attn_weights)[:, None, :, None].to(attn_weights.dtype)
        mass = (attn_weights @ is_image)[..., 0]
        start, stop = layer.rows
        row = torch.zeros_like(self._images.last)
        here = torch.ones_like(row, dtype=torch.bool)
        if forward.is_prefill:
            here = (self._images.last >= start) & (self._images.last < stop)
            row = (self._images.last - start).clamp(0, stop - start - 1)
            if self._with_prompt:
                self._keep_prompt(mass, layer)
        samples = torch.arange(len(row), device=mass.device)
        row, here = row.to(mass.device), here.to(mass.device)
        self._add(self.mass[-1], at, mass[samples, :, row], here)
        if self._with_maps:
            self._add(self.maps[-1], at, self._map(attn_weights[samples, :, row].mean(1), layer), here)

    @staticmethod
    def _add(found: dict[int, torch.Tensor], at: int, values: torch.Tensor, here: torch.Tensor) -> None:
        """Keep the values of samples whose row this is: a long prompt is shown in pieces."""
        new = values.float().masked_fill(~here.view(-1, *[1] * (values.dim() - 1)), 0.0).cpu()
        found[at] = found[at] + new if at in found else new

    def _keep_prompt(self, mass: torch.Tensor, layer: Layer) -> None:
        """Keep the rows that are up: other methods of a layer may have more of them written out."""
        assert layer.row_mask is not None
        at, (start, stop) = layer.site.layer_idx, layer.rows
        if at not in self.prompt:
            self.prompt[at] = torch.full((*mass.shape[:2], layer.forward.q_len), float("nan"))
        told = ~layer.row_mask[:, None].to(mass.device)
        self.prompt[at][:, :, start:stop] = mass.masked_fill(told, float("nan")).float().cpu()

    def _map(self, row: torch.Tensor, layer: Layer) -> torch.Tensor:
        """Pick the weights of image tokens, ``[batch, image_tokens]``, from rows ``[batch, keys]``."""
        assert self._images is not None
        offset = layer.key_offset(row.shape[-1])
        positions = self._images.positions.to(row.device)
        there = (positions >= 0) & (positions >= offset)
        picked = row.gather(1, (positions - offset).clamp(0, row.shape[-1] - 1))
        return picked.masked_fill(~there, 0.0)


def _find_images(forward: Forward) -> _Images:
    image, valid = forward.image_mask, forward.valid_mask
    most = max(int(image.sum(1).max()), 1)
    columns = torch.arange(image.shape[1], device=image.device)
    # Image columns first, in their order; the others are cut off or marked.
    order = (~image).to(torch.int8).argsort(dim=1, stable=True)[:, :most]
    positions = order.masked_fill(~image.gather(1, order), -1)
    return _Images(positions, torch.where(valid, columns, -1).amax(1))


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
    log = ImageLog(with_maps=maps, with_prompt=prompt)
    watch = AttentionWatch(log.see, "text" if prompt else "last", layers=wanted)
    answered = subject.answer(inputs, watch, max_new_tokens=max_new_tokens, answers=answers)
    batch, steps, behind = len(answered.tokens), answered.steps, answered.behind
    heads = subject.anatomy.num_heads
    if not log.mass:  # no image in the whole batch: nothing was shown
        mass = torch.zeros(batch, steps, len(wanted), heads)
        where = torch.zeros(batch, steps, len(wanted), 0) if maps else None
        nothing = torch.zeros(batch, 0, len(wanted), heads) if prompt else None
        return ImageAttention(
            wanted, subject.patch, _blank(mass, behind), where, nothing, (), (0,) * batch, answered.tokens
        )
    mass = _stack(log.mass[:steps], wanted)
    where = _blank(_stack(log.maps[:steps], wanted), behind) if maps else None
    rows = None
    columns: list[int] = []
    if prompt:
        rows = torch.stack([log.prompt[at] for at in wanted], dim=1).permute(0, 3, 1, 2)
        columns = (~rows.isnan()).any(3).any(2).any(0).nonzero()[:, 0].tolist()
        rows = rows[:, columns]
    return ImageAttention(
        wanted,
        subject.patch,
        _blank(mass, behind),
        where,
        rows,
        tuple(columns),
        tuple(log.num_image_tokens),
        answered.tokens,
    )


def _stack(steps: Sequence[Mapping[int, torch.Tensor]], layers: Sequence[int]) -> torch.Tensor:
    """Stack ``[batch, n]`` by step and layer: ``[batch, steps, layers, n]``."""
    return torch.stack([torch.stack([step[at] for at in layers], dim=1) for step in steps], dim=1)


def _blank(values: torch.Tensor, behind: torch.Tensor) -> torch.Tensor:
    return values.masked_fill(behind[..., None, None], float("nan"))
