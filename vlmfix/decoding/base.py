"""The contract of methods that contrast two branches of one answer, and the contrast itself."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch

from vlmfix.engine.prompt_pass import NO_TEXT
from vlmfix.errors import MethodError, UnsupportedFeatureError
from vlmfix.methods.base import Method
from vlmfix.methods.parameters import Range, parameter
from vlmfix.methods.selection import DefaultLayers
from vlmfix.model.anatomy import Anatomy
from vlmfix.model.refusals import check_next_token


class OtherTokens(NamedTuple):
    """The prompt of the other branch, of one sample.

    Attributes:
        ids: Its tokens.
        sources: Per token, its place in the sample's own tokens, or -1 for a token that is new.
        is_swapped: Whether the sample's own prompt is the one to contrast against.
    """

    ids: tuple[int, ...]
    sources: tuple[int, ...]
    is_swapped: bool = False


class AnswerToken(NamedTuple):
    """Which token of an answer is being chosen.

    Attributes:
        number: 1 for the first token behind the prompt, in every turn anew.
        first_logits: The model's own logits of that first token, fp32 ``[batch, vocab]``; ``None`` unless the method
            ``keeps_first_logits``.
    """

    number: int
    first_logits: torch.Tensor | None = None


def strength(default: float, source: str = "") -> float:
    """Declare the parameter ``alpha``; ``source`` says where its default comes from."""
    text = f"Strength of the contrast. {source}".strip()
    return parameter(default, low=0, remark="0: no contrast", search=Range(0.05, 2.0), help=text)


def plausibility(default: float, source: str = "") -> float:
    """Declare the parameter ``beta``, searched unless it is off; ``source`` says where its default comes from."""
    text = "Plausibility cut: only tokens with ``l >= max l + ln(beta)`` may be chosen. 0 cuts nothing."
    remark = "0: no cut; 1: only the most likely token is left"
    search = Range(0.02, 0.9) if default else None
    return parameter(default, low=0, high=1, remark=remark, search=search, help=f"{text} {source}".strip())


@dataclass(frozen=True)
class DecodingMethod(Method):
    """Base class of methods that replace the logits of the next token by a contrast of two branches.

    The engine (``vlmfix.decoding.two_branches``) runs the other branch beside the model's own: the same answer behind a
    prompt with another image (:meth:`other_images`) or with other tokens (:meth:`other_tokens`).
    """

    counts = "next tokens"
    default_layers = DefaultLayers("none, and none can be given: it acts on logits", lambda num_layers: ())
    replaces_logits = True
    needs_whole_prompt = True  # its last row is contrasted
    needs_cache = False
    changes_image: ClassVar[bool] = False
    """Whether the other branch has another image: the same tokens, at the same positions."""
    removes_image: ClassVar[bool] = False
    """Whether the other branch has no image."""
    is_gated: ClassVar[bool] = False
    """Whether :meth:`combine` may leave some tokens alone, so that a few unmoved ones do not prove it has no effect."""
    keeps_first_logits: ClassVar[bool] = False
    """Whether :meth:`combine` is shown the logits of the answer's first token again."""

    def validate(self) -> None:
        """Refuse layers."""
        self.require(self.layers is None, "layers", "left out: the method acts on logits, not in layers")

    @property
    def is_identity(self) -> bool:
        """Whether a parameter switches the method off, or nothing is contrasted and nothing cut."""
        return super().is_identity or not (self.uses_branch or self.beta)

    @property
    def uses_branch(self) -> bool:
        """Whether the other branch is needed at all."""
        return True

    @property
    def beta(self) -> float:
        """The plausibility cut; methods that have one declare it as a parameter, see :func:`plausibility`."""
        return 0.0

    def bind(self, anatomy: Anatomy) -> DecodingMethod:
        """Check that the other branch can be run in this model.

        Raises:
            MethodError: The model predicts no next token, an encoder reads the prompt, ``generate`` hands merged
                embeddings to a model inside, or an edit of the other branch means nothing there.
        """
        check_next_token(self.name, anatomy.model)
        if anatomy.encoder is not None or anatomy.language_model is not anatomy.model:
            raise MethodError(
                f"{self.name} does not act in {type(anatomy.model).__name__}: what reads the prompt there is not the "
                "forward that gives the logits, so no second branch can be run beside it. Choose a method that edits "
                "attention; vlmfix.list_methods() lists them."
            )
        self.branch_edit(anatomy)
        return self

    def branch_edit(self, anatomy: Anatomy) -> Method | None:
        """Return a bound attention method that acts in the other branch, which then reads the same prompt."""
        return None

    def other_images(self, name: str, images: torch.Tensor, per_image: Sequence[int] | None) -> torch.Tensor:
        """Make the other branch's images.

        Args:
            name: The argument's name (``"pixel_values"``).
            images: What the processor gave: ``[..., channels, height, width]``, or flattened patches ``[..., size]``.
            per_image: Where flattened patches of several images follow each other: how many each has.

        Returns:
            A new tensor of the same shape and dtype.
        """
        raise NotImplementedError

    def other_tokens(self, ids: Sequence[int], is_image: Sequence[bool]) -> OtherTokens | None:
        """Make the other branch's prompt of one sample.

        Args:
            ids: The tokens, without padding.
            is_image: Which of them stand for an image.

        Returns:
            The other prompt; ``None`` leaves the sample alone.
        """
        raise NotImplementedError

    def weight(self, logits: torch.Tensor, other: torch.Tensor, token: AnswerToken) -> float | torch.Tensor:
        """Return ``w`` of the contrast ``l + w (l - l')``: a number, or fp32 ``[batch, 1]``.

        Args:
            logits: Of the model's own branch, fp32 ``[batch, vocab]``.
            other: Of the other branch.
            token: Which token is chosen. A method that asks must set ``needs_cache``: without a cache, every forward
                reads a prompt.
        """
        raise NotImplementedError

    def combine(self, logits: torch.Tensor, other: torch.Tensor, token: AnswerToken) -> torch.Tensor:
        """Contrast the logits of two branches for the next token, and cut implausible ones.

        Args:
            logits: Of the model's own branch, fp32 ``[batch, vocab]``; must not be changed in place.
            other: Of the other branch; without one, those of the model's own.
            token: See :meth:`weight`.
        """
        return cut(contrast(logits, other, self.weight(logits, other, token)), logits, self.beta)

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready dict ``{"method": name, **parameters}``."""
        found = super().to_dict()
        del found["layers"]
        return found


@dataclass(frozen=True)
class Contrast(DecodingMethod):
    """``(1 + alpha) l - alpha l'`` over tokens that ``l`` finds plausible; base class.

    ``alpha`` 0 takes the model's own logits, which are still cut: the answer is the stock one with ``beta`` 0 too.
    """

    alpha: float = strength(1.0)
    beta: float = plausibility(0.1)

    @property
    def uses_branch(self) -> bool:
        """Not for the cut alone."""
        return self.alpha != 0

    def weight(self, logits: torch.Tensor, other: torch.Tensor, token: AnswerToken) -> float:
        """``alpha``."""
        return self.alpha


@dataclass(frozen=True)
class WithoutImage(DecodingMethod):
    """Base class of methods whose other prompt is the same text with the image's tokens taken out."""

    removes_image = True

    def other_tokens(self, ids: Sequence[int], is_image: Sequence[bool]) -> OtherTokens:
        """Take the image's tokens out.

        Raises:
            UnsupportedFeatureError: Nothing is left.
        """
        kept = tuple(place for place, image in enumerate(is_image) if not image)
        if not kept:
            raise UnsupportedFeatureError(NO_TEXT)
        return OtherTokens(tuple(ids[place] for place in kept), kept)


def contrast(logits: torch.Tensor, other: torch.Tensor, weight: float | torch.Tensor) -> torch.Tensor:
    """``l + w (l - l')``; where either is infinite, ``l``, so that nothing becomes NaN."""
    difference = torch.where(logits.isfinite() & other.isfinite(), logits - other, 0.0)
    return logits + weight * difference


def cut(contrasted: torch.Tensor, logits: torch.Tensor, beta: float) -> torch.Tensor:
    """Remove (minus infinity) tokens with ``l < max l + ln(beta)``; the most likely ones always stay."""
    if beta == 0:
        return contrasted
    return contrasted.masked_fill(logits < logits.amax(-1, keepdim=True) + math.log(beta), -torch.inf)
