"""AllPath: Intervene-All-Paths (Qian, Zheng, Zhu and Yang, NeurIPS 2025, arXiv 2511.17254)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from vlmfix.errors import MethodError
from vlmfix.methods.base import Method
from vlmfix.methods.scores import scale_heads
from vlmfix.methods.selection import HeadSpec, Range, Space, bind_heads
from vlmfix.methods.views import Layer, PromptRows
from vlmfix.model.anatomy import Anatomy


@dataclass(frozen=True)
class AllPath(Method):
    """Scale good heads up and bad heads down, by lists made offline for one model and one format of answers.

    The outputs of head (l, n) are multiplied by ``up`` if it is in Z+ only, by ``down`` if it is in Z- only, and by 1
    otherwise, also if it is in both. All rows of prompts with an image, image rows too, and every decode step. The
    paper takes Z- from the worst heads of its text score, and Z+ from the best heads of its text score and of its image
    score together (``vlmfix.calibrate``): 40 and 40 + 50 of 1024 heads for captions with LLaVA-1.5, else 20 and
    20 + 10. No lists are shipped.

    Attributes:
        up: Factor of the good heads, >= 0. The paper's 2; with ``down``, 1 switches the method off.
        down: Factor of the bad heads, >= 0. The paper's 0.
        up_heads: Z+, (layer, head) pairs. A head that is listed twice is scaled once.
        down_heads: Z-. One of the two lists must be given; ``None`` is then an empty one.
        answers: Which answers the lists were made for. The lists of one format say little about another (ranks
            correlate by .12); kept in recipes, it changes nothing else.
        layers: Default: those of the lists.
    """

    name: ClassVar[str] = "allpath"
    paper: ClassVar[str] = "arXiv 2511.17254"
    summary: ClassVar[str] = "scales good heads up and bad heads down, by lists made offline"
    search_space: ClassVar[Space] = {"up": Range(1.0, 3.0), "down": Range(0.0, 1.0)}
    edits_heads: ClassVar[bool] = True
    needs_text_keys: ClassVar[bool] = False

    up: float = 2.0
    down: float = 0.0
    up_heads: HeadSpec = None
    down_heads: HeadSpec = None
    answers: Literal["caption", "yesno", "mcq"] = "caption"

    def validate(self) -> None:
        """Raise ``MethodError`` for a parameter out of range."""
        for parameter in ("up", "down"):
            self.require(0 <= getattr(self, parameter) < math.inf, parameter, "a finite number >= 0")
        self.require(self.answers in ("caption", "yesno", "mcq"), "answers", "caption, yesno or mcq")

    @property
    def factors(self) -> dict[tuple[int, int], float]:
        """The factor of every head whose factor is not 1."""
        up = {(layer, head) for layer, head in self.up_heads or ()}
        down = {(layer, head) for layer, head in self.down_heads or ()}
        factors = dict.fromkeys(up - down, self.up) | dict.fromkeys(down - up, self.down)
        return {head: factor for head, factor in factors.items() if factor != 1}

    @property
    def is_identity(self) -> bool:
        """Whether both factors are 1, or no head of the lists has another one."""
        has_lists = self.up_heads is not None or self.down_heads is not None
        return self.up == self.down == 1 or (has_lists and not self.factors)

    @property
    def prompt_rows(self) -> PromptRows:
        """No scores or weights are edited."""
        return "none"

    def bind(self, anatomy: Anatomy) -> AllPath:
        """Resolve the layers that have listed heads.

        Raises:
            MethodError: No list was given.
        """
        bound = super().bind(anatomy)
        listed = (*(self.up_heads or ()), *(self.down_heads or ()))
        bind_heads(bound, bound, listed, anatomy)  # all of them must exist, also those whose factor is 1
        if self.is_identity:
            return bound
        if not listed:
            raise MethodError(
                "allpath needs lists of heads, and none are shipped. Make them with "
                "vlmfix.calibrate(model, 'allpath', data), or pass up_heads=[(layer, head), ...] and down_heads=[...]."
            )
        return bind_heads(self, bound, tuple(self.factors), anatomy)

    def edit_heads(self, head_outputs: torch.Tensor, layer: Layer) -> torch.Tensor:
        """Scale ``[batch, q_len, num_heads, head_dim]``."""
        return scale_heads(head_outputs, layer.constant(lambda: self._scale(head_outputs, layer)), layer)

    def _scale(self, head_outputs: torch.Tensor, layer: Layer) -> torch.Tensor:
        factors, at = self.factors, layer.site.layer_idx
        scale = [factors.get((at, head), 1.0) for head in range(head_outputs.shape[2])]
        return torch.tensor(scale, device=head_outputs.device)
