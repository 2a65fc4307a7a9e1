"""Retrieval score: how often a head looks at what is about to be said (Wu et al., arXiv 2404.15574)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vlmfix.errors import MethodError
from vlmfix.methods.views import Layer
from vlmfix.observe.ask import Answers, look_at
from vlmfix.observe.watch import AttentionWatch, stack_by_layer
from vlmfix.observe.words import prompt_tokens
from vlmfix.probes.result import ProbeResult


@dataclass(frozen=True, eq=False)
class Retrieval(ProbeResult):
    """Which heads retrieve a needle while a model answers.

    Attributes:
        score: fp32 ``[batch, layers, num_heads]``: share of the counted tokens that a head retrieved; 0 in a batch
            without any image.
        counted: Per sample, how many tokens count.
        tokens: The answers' ids.
    """

    score: torch.Tensor
    counted: tuple[int, ...]
    tokens: tuple[tuple[int, ...], ...]

    def plot(self, ax: Any = None, *, sample: int = 0, **options: Any) -> Any:
        """Draw the heads of one sample as a map of layers and heads."""
        title = f"retrieval of {self.counted[sample]} tokens"
        return self._map(ax, self.score[sample], xlabel="head", label="retrieval score", title=title)


@torch.no_grad()
def retrieval(
    model: object,
    inputs: Mapping[str, Any],
    needle: torch.Tensor,
    *,
    layers: Sequence[int] | str | None = None,
    max_new_tokens: int = 32,
    answers: Answers | None = None,
) -> Retrieval:
    """Score every head by how often it looks most at the part of the prompt that the answer takes its words from.

    A needle of text (section 2 of the paper): a head copies a token w when, in the row that predicts w, the key with
    its largest weight is a token w of the needle. The score is ``|copied| / |needle|`` over distinct tokens. Image
    tokens spell no words, so for a needle of image tokens (ours) the score is the share of the answer's tokens in
    whose rows the largest weight falls on the needle: give the ids that name the object as ``answers``.

    Args:
        model: The model, patched or not.
        inputs: What ``model.generate`` takes, left-padded.
        needle: Bool ``[batch, length]``: tokens of the prompt, of text (``probes.text_span``) or of the image.
        layers: Layers to look at, see ``LayerSpec``. Default: all.
        max_new_tokens: Length of the greedy answer to follow.
        answers: Ids to follow instead of the model's own.

    Raises:
        UnsupportedFeatureError: See ``look_at``; or a layer adds terms to its scores that cannot be written out.
        MethodError: A needle of another shape, of both text and image tokens, or an empty one; ``layers`` or
            ``answers`` that fit no such model.
    """
    subject = look_at(model, "retrieval", inputs)
    wanted, image = subject.layers(layers), prompt_tokens(subject.anatomy, inputs).image
    needle = torch.as_tensor(needle, device=image.device)
    if needle.shape != image.shape or needle.dtype != torch.bool or not needle.any(1).all():
        raise MethodError(
            f"needle must be bool {tuple(image.shape)} with at least one token per prompt, got {needle.dtype} "
            f"{tuple(needle.shape)}."
        )
    of_image = (needle & image).any(1)
    if bool((of_image & (needle & ~image).any(1)).any()):
        raise MethodError("A needle is either text or image tokens of a prompt, not both. Score them one by one.")
    strongest: list[dict[int, torch.Tensor]] = []

    def see(attn_weights: torch.Tensor, allowed: torch.Tensor, layer: Layer) -> None:
        if not strongest or layer.site.layer_idx in strongest[-1]:
            strongest.append({})
        last = attn_weights[:, :, -1].argmax(-1) + layer.key_offset(attn_weights.shape[-1])
        strongest[-1][layer.site.layer_idx] = last.cpu()

    watch = AttentionWatch(see, "last", layers=wanted)
    answered = subject.answer(inputs, watch, max_new_tokens=max_new_tokens, answers=answers)
    nowhere = torch.full((len(needle), answered.steps, len(wanted), subject.anatomy.num_heads), needle.shape[1])
    places = stack_by_layer(strongest[: answered.steps], wanted) if strongest else nowhere
    scores, counted = [], []
    for sample, said in enumerate(answered.tokens):
        here, ids = needle[sample].cpu(), inputs["input_ids"][sample].cpu()
        at = places[sample, : len(said)]
        inside = at.clamp_max(len(here) - 1)
        hit = here[inside] & (at < len(here))
        if of_image[sample]:
            found, count = hit.float().sum(0), len(said)
        else:
            hit &= ids[inside] == torch.tensor(said)[:, None, None]
            distinct = ids[here].unique()
            copied = [hit[torch.tensor(said) == token].any(0) for token in distinct]
            found, count = torch.stack(copied).float().sum(0), len(distinct)
        scores.append(found / count)
        counted.append(count)
    return Retrieval(wanted, subject.patch, torch.stack(scores), tuple(counted), answered.tokens)
