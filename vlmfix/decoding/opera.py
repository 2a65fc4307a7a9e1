"""OPERA: over-trust penalty and retrospection-allocation (Huang et al., CVPR 2024, arXiv 2311.17911)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from vlmfix.errors import MethodError
from vlmfix.methods.base import Method
from vlmfix.methods.parameters import Range, parameter
from vlmfix.methods.selection import DefaultLayers
from vlmfix.model.anatomy import Anatomy
from vlmfix.model.refusals import check_next_token

FIRST = 10
"""Rows of an answer in which the released code looks at the image instead, and first place it rolls back to."""


KAPPA = 1e-7


LARGEST = 100.0
"""The largest difference of penalties between a beam's candidates; e^-100 is no probability."""


LARGEST_IN_PAPER = 10.0


@dataclass(frozen=True)
class OPERA(Method):
    """Beam search that looks a token ahead, penalises knots of attention in the answer, and goes back where one stays.

    Of every beam's ``num_attn_candidates`` likeliest tokens, the last layer's attention row is looked at: maximum over
    heads, divided by its sum. Over the rows and columns of the answer, ``s_j = prod_i scale_factor w_i[j]`` is the
    product of column j from its own row down, and ``phi = max_j s_j``.

    ``mode="official"``, the released code: candidates' logits lose ``penalty_weights * 1e-7 phi``, or gain the row's
    attention to the image among the first 10 tokens of an answer; other tokens cannot be chosen. The softmax is over
    the candidates, so only differences between them count. Two fixes keep its ranking and make its numbers finite,
    where the code overflows in half precision: ``phi`` is taken relative to the beam's smallest, at most 100, from sums
    of logarithms; and other tokens are put 1000 below. ``mode="paper"``: ``min(penalty_weights phi, 10)`` is taken from
    log-probabilities over the whole vocabulary, and adds up in the beam's score.

    When the column of the maximum (the commonest among candidates and beams) has been the same more than ``threshold``
    times in every beam (paper: as often as ``threshold``), the search goes back behind it and chooses another token
    there, from the whole vocabulary, at most ``num_attn_candidates`` times at one place. The places recorded up to that
    choice still count, its own included. Official: not among the first 10 tokens, and a token taken there before keeps
    the probability of its beam's least likely one; paper: never back before an earlier such place, and such a token is
    out. Tokens rejected behind a place are forgotten when the search goes back before them; the released code means to,
    and clears other lists.

    ``generate`` is then this search, for one prompt at a time, at ``1 + num_attn_candidates`` forwards per token. What
    others measured: most of its gain is length; against greedy decoding of LLaVA-1.5 there is none on CHAIR.
    """

    name = "opera"
    paper = "arXiv 2311.17911"
    summary = "beam search that penalises knots of attention in the answer and goes back behind them"
    counts = "candidate tokens"
    attention_kinds = ("joint",)  # where the answer's rows look at image and answer alike
    replaces_logits = True
    searches = True
    default_layers = DefaultLayers("the last; it can be one only", lambda num_layers: (num_layers - 1,))

    num_beams: int = parameter(
        5, low=2, help="Number of beams; ``generate(num_beams=...)`` of more than one goes before."
    )
    scale_factor: float = parameter(50.0, above=0, search=Range(10.0, 100.0), help="Factor on attention weights.")
    threshold: int | None = parameter(15, low=1, help="How often a column may be the maximum; ``None``: never go back.")
    num_attn_candidates: int = parameter(5, low=1, help="Candidates per beam, and times to go back to one place.")
    penalty_weights: float = parameter(1.0, low=0, search=Range(0.1, 5.0), help="Strength of the penalty.")
    mode: Literal["official", "paper"] = parameter("official", help='``"official"`` or ``"paper"``.')

    def bind(self, anatomy: Anatomy) -> OPERA:
        """Find the last layer with attention.

        Raises:
            MethodError: There is none of the kind, ``generate`` runs another model or is not transformers' own, or
                ``layers`` names several.
        """
        check_next_token(self.name, anatomy.model)
        if anatomy.encoder is not None or anatomy.language_model is not anatomy.model or "image" in anatomy.kinds:
            raise MethodError(
                f"opera does not act in {type(anatomy.model).__name__}: no attention there is over the image's tokens "
                "and the answer's in the forward that gives the logits. Choose another method; "
                "vlmfix.list_methods() lists them."
            )
        if "generate" in vars(anatomy.model):
            raise MethodError(
                "opera is a search in the place of generate, and this model has a generate of its own (as its folder's "
                "custom_generate, or another tool, puts there). Load it without (trust_remote_code=False), or choose "
                "another method."
            )
        if self.layers is not None:
            bound = super().bind(anatomy)
            if len(bound.layer_indices) != 1:
                raise MethodError(f"opera reads the attention of one layer; layers={self.layers!r} names several.")
            return bound
        return dataclasses.replace(self, layers=(max(site.layer_idx for site in anatomy.sites),))

    # The penalty.

    def columns(self, row: torch.Tensor, sums: torch.Tensor) -> torch.Tensor:
        """Continue the logarithms of the column products by one row.

        Args:
            row: Attention of one token to the answer so far and to itself, fp32 ``[..., n + 1]``.
            sums: Those of the rows before, fp32 ``[..., n]``.
        """
        logs = (row * self.scale_factor).log()
        before, own = logs.tensor_split([sums.shape[-1]], dim=-1)
        return torch.cat([before + sums, own], dim=-1)

    def penalise(
        self, logits: torch.Tensor, candidates: torch.Tensor, peaks: torch.Tensor, looks: torch.Tensor, length: int
    ) -> torch.Tensor:
        """Penalise candidates, and put other tokens out of reach.

        Args:
            logits: fp32 ``[beams, vocab]``.
            candidates: int64 ``[beams, C]``.
            peaks: ``log phi`` of each candidate, fp32 ``[beams, C]``.
            looks: Its attention to the image, fp32 ``[beams, C]``.
            length: Rows of the answer, the candidate's included.

        Returns:
            Log-probabilities, fp32 ``[beams, vocab]``; in paper mode less the penalty, so that it adds up in scores.
        """
        if self.mode == "paper":
            logits = logits.log_softmax(-1)
            penalty = (peaks.double() + _log(self.penalty_weights)).clamp_max(_log(LARGEST_IN_PAPER)).exp()
        elif length <= FIRST:
            penalty = -self.penalty_weights * looks.double()
        else:
            penalty = above_least(peaks, _log(KAPPA * self.penalty_weights))
        scores = logits - logits.amax(-1, keepdim=True) - 1000.0
        scores = scores.scatter(-1, candidates, logits.gather(-1, candidates) - penalty.float())
        return scores if self.mode == "paper" else scores.log_softmax(-1)

    # The way back.

    def is_knot(self, peaks: torch.Tensor, place: int, last: int) -> bool:
        """Whether a column has been the maximum so often that the search goes back behind it.

        Args:
            peaks: Columns of the maximum of every step so far, int64 ``[steps, beams]``.
            place: The column.
            last: The column behind which the search last went back, or 0.
        """
        if self.threshold is None:
            return False
        times = (peaks == place).sum(0)
        if self.mode == "paper":
            return place >= last and bool((times >= self.threshold).all())
        return place >= FIRST and bool((times > self.threshold).all())

    def choose_again(self, logits: torch.Tensor, rejected: Sequence[tuple[int, int]]) -> torch.Tensor:
        """Return log-probabilities of the whole vocabulary for the choice behind a return, without a penalty.

        The released code gives rejected tokens, the (beam, token) pairs taken here before, the logit of their beam's
        least likely one; in paper mode they are out. Logits and what is returned are fp32 ``[beams, vocab]``.
        """
        beams, tokens = torch.tensor(rejected, device=logits.device).T
        least = logits.amin(-1) if self.mode == "official" else logits.new_full((len(logits),), -torch.inf)
        return logits.index_put((beams, tokens), least[beams]).log_softmax(-1)


def above_least(peaks: torch.Tensor, log_factor: float) -> torch.Tensor:
    """``f (phi - min phi)`` over the last dimension, at most ``LARGEST``, from ``log phi``; never overflows."""
    least = peaks.double().amin(-1, keepdim=True)
    difference = (peaks.double() - least).nan_to_num(0.0)  # both minus infinity: both are 0
    # log(e^d - 1) = d + log(1 - e^-d); where the least is 0, phi itself.
    logs = torch.where(least.isfinite(), least + difference + torch.log(-torch.expm1(-difference)), peaks.double())
    return (logs + log_factor).clamp_max(math.log(LARGEST)).exp()


def _log(value: float) -> float:
    return math.log(value) if value > 0 else -math.inf
