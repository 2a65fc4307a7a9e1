"""AdaptVis and ScalingVis: confidence-gated scaling of image attention (Chen et al., ICML 2025, arXiv 2503.01773)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from vlmfix.methods.base import Method
from vlmfix.methods.parameters import Range, parameter
from vlmfix.methods.scores import visible
from vlmfix.methods.views import EditedRows, Layer, Prompt
from vlmfix.model.anatomy import Anatomy
from vlmfix.model.refusals import check_next_token


@dataclass(frozen=True)
class AdaptVis(Method):
    """Multiply the image's scores in the prompt's last row by a factor, ``s_j <- w s_j``, chosen by confidence.

    ``w = low`` (look wider) where the unedited model gives its first new token less than ``threshold``, else ``high``
    (trust what it sees). In all heads, for all image tokens. The method was made for short spatial questions: rows of
    the answer are not edited. Where answers begin with a blank or an article, confidence means little; see
    ``probe_tokens``.

    The confidence is read from a stock prefill of the same prompt, so that a prompt costs two prefills. The released
    code repeats the whole generation, though it needs no more than this first distribution. Confidence is not rounded;
    the release rounds it to two decimals, and on one data set (VSR) takes the largest logit in its place. The release
    scales everything from the first image token to the last, here only image tokens are; and it stops at layer 31 of
    models that have more.
    """

    name = "adaptvis"
    paper = "arXiv 2503.01773"
    summary = "sharpens or smooths the image's scores in the prompt's last row, by confidence"
    edits_scores = True
    reads_prompt = True
    prompt_rows = "last"

    mode: Literal["adaptive", "fixed"] = parameter(
        "adaptive",
        help='``"adaptive"`` (AdaptVis), or ``"fixed"`` (ScalingVis): ``factor`` always, and no further prefill.',
    )
    threshold: float = parameter(
        0.4,
        low=0,
        high=1,
        search=Range(0.1, 0.9),
        help="Confidence below it takes ``low``. 0.4 as in the released script, which tunes it per data set.",
    )
    low: float = parameter(
        0.5, remark="1 changes nothing", search=Range(0.3, 1.0), help="Factor when unsure; the released script's 0.5."
    )
    high: float = parameter(
        1.5,
        remark="1 changes nothing",
        search=Range(1.0, 2.0),
        help="Factor when sure; the released script's 1.5. With ``low``, 1 switches the method off.",
    )
    factor: float = parameter(
        1.0,
        remark="1 changes nothing",
        help='Factor of ``mode="fixed"``, of which the paper has no one value; 1 switches the method off.',
    )
    center: bool = parameter(
        False,
        help="Scale around the mean m of the row's image scores, ``m + w (s_j - m)`` (ours, untested): a temperature "
        "that does not move the image's mean score.",
    )
    decode: bool = parameter(
        False, help="Edit the rows of generated tokens too (untested; the released code does not)."
    )
    probe_tokens: Sequence[int] | None = parameter(
        None,
        low=0,
        help="Ids of answer words: confidence is the largest probability among them alone (ours). ``None``: the whole "
        "vocabulary.",
    )

    def validate(self) -> None:
        """Check that a fixed factor is asked for where one is given, and that there is a word to probe."""
        self.require(self.mode == "fixed" or self.factor == 1, "factor", "left at 1 unless mode='fixed'")
        self.require(self.probe_tokens != (), "probe_tokens", "ids >= 0, at least one")

    @property
    def is_identity(self) -> bool:
        """Whether every factor it may choose is 1."""
        return self.factor == 1 if self.mode == "fixed" else self.low == self.high == 1

    @property
    def edits_decode(self) -> bool:
        """As chosen."""
        return self.decode

    @property
    def _only_factor(self) -> float | None:
        """The factor, where confidence does not decide on it."""
        if self.mode == "fixed":
            return self.factor
        return self.low if self.low == self.high else None

    def bind(self, anatomy: Anatomy) -> AdaptVis:
        """Refuse a model without a next token to be confident of."""
        if not self.is_identity and self._only_factor is None:
            check_next_token(self.name, anatomy.model)
        return super().bind(anatomy)

    def notes(self, anatomy: Anatomy) -> tuple[str, ...]:
        """Say what confidence costs."""
        if self.is_identity:
            return ("adaptvis: the factor is 1, nothing is edited",)
        if self._only_factor is not None:
            return ()
        return ("adaptvis: reads every prompt with an image twice; the first time unedited, for its confidence",)

    def begin(self, prompt: Prompt) -> torch.Tensor:
        """Choose the factor of every sample: fp32 ``[batch]``."""
        image = prompt.forward.image_mask
        if self._only_factor is not None:
            return torch.full((image.shape[0],), self._only_factor, device=image.device)
        logits = prompt.first_logits()
        if self.probe_tokens is not None:
            limit = f"below the model's vocabulary of {logits.shape[-1]}"
            self.require(max(self.probe_tokens) < logits.shape[-1], "probe_tokens", limit)
            logits = logits[:, list(self.probe_tokens)]
        confidence = logits.float().softmax(-1).amax(-1)
        return torch.where(confidence < self.threshold, self.low, self.high)

    def edit_scores(self, scores: torch.Tensor, allowed: torch.Tensor, layer: Layer) -> EditedRows:
        """Scale the image columns of ``[batch, num_heads, rows, keys]``."""
        factor: torch.Tensor = layer.shared.to(scores.device)[:, None, None, None]
        image = visible(layer.keys("image", scores), allowed)
        scaled = factor * scores
        if self.center:
            total = torch.where(image, scores, 0.0).sum(-1, keepdim=True)
            scaled = scaled + (1 - factor) * total / image.sum(-1, keepdim=True).clamp_min(1)
        edited = image & (factor != 1)
        return torch.where(edited, scaled, scores), edited.any(-1).expand(scores.shape[:3])
