"""MaskCD: contrast with image heads masked (Findings of EMNLP 2025, arXiv 2510.02790)."""

from __future__ import annotations

from dataclasses import dataclass

from vlmfix.decoding.base import plausibility, strength
from vlmfix.decoding.edited import AgainstEdit
from vlmfix.errors import MethodError
from vlmfix.methods.allpath import AllPath
from vlmfix.methods.base import Method
from vlmfix.methods.measured import how_to_measure
from vlmfix.methods.parameters import parameter
from vlmfix.methods.selection import HeadSpec
from vlmfix.model.anatomy import Anatomy


@dataclass(frozen=True)
class MaskCD(AgainstEdit):
    """Contrast the answer with that without the heads that look at the image: ``(1 + alpha) l - alpha l'``.

    ``l'`` are the logits where the outputs of ``heads`` are zero in every row. Only tokens with
    ``l >= max l + ln(beta)`` may be chosen. ``vlmfix calibrate maskcd`` finds the heads by how much they look at the
    image.

    The paper's code could not be had, and its text was read as an abstract and a summary: strength, cut and the
    threshold that makes a head an image head are ours.
    """

    name = "maskcd"
    paper = "arXiv 2510.02790"
    summary = "contrasts the answer with that without the heads that look at the image"

    alpha: float = strength(1.0)
    beta: float = plausibility(0.1)
    heads: HeadSpec = parameter(
        None,
        off=(),
        help="The image heads, (layer, head) pairs. Required; ``vlmfix.calibrate(model, 'maskcd', data)`` finds them.",
    )

    def bind(self, anatomy: Anatomy) -> MaskCD:
        """Check the heads.

        Raises:
            MethodError: There are none, or some that the model does not have.
        """
        if self.heads is None and self.alpha:
            raise MethodError(f"maskcd needs a list of heads. {how_to_measure('maskcd', anatomy)}")
        super().bind(anatomy)
        return self

    def edit_of_branch(self) -> Method:
        """Switch the heads off."""
        return AllPath(down=0.0, down_heads=self.heads or ())
