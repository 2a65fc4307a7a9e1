"""AllPath: Intervene-All-Paths (Qian, Zheng, Zhu and Yang, NeurIPS 2025, arXiv 2511.17254)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from vlmfix.errors import MethodError
from vlmfix.methods.base import Method
from vlmfix.methods.parameters import Range, parameter
from vlmfix.methods.scores import scale_heads
from vlmfix.methods.selection import DefaultLayers, HeadSpec, check_heads
from vlmfix.methods.views import Layer
from vlmfix.model.anatomy import Anatomy


@dataclass(frozen=True)
class AllPath(Method):
    """Scale good heads up and bad heads down, by lists made offline for one model and one format of answers.

    The outputs of head (l, n) are multiplied by ``up`` if it is in Z+ only, by ``down`` if it is in Z- only, and by 1
    otherwise, also if it is in both. This holds for all rows of prompts with an image, image rows too, and for every
    decode step. The release scales what a head adds behind the output projection, which is the same. Leaving prompts
    without an image alone is ours.

    The paper takes Z- from the worst heads of its text score, and Z+ from the best heads of its text score and of its
    image score together: 40 and 40 + 50 of 1024 heads for captions with LLaVA-1.5, else 20 and 20 + 10. No lists are
    shipped. ``vlmfix.calibrate`` makes them, and reads an answer as the sum over all spellings and cases of its word
    (ours); the release reads one token id per answer.
    """

    name = "allpath"
    paper = "arXiv 2511.17254"
    summary = "scales good heads up and bad heads down, by lists made offline"
    edits_heads = True
    scales_heads = True
    minds_text_before_image = True  # heads are scaled in all rows
    needs_text_keys = False
    needs_cache = False
    prompt_rows = "none"  # no scores or weights are edited
    default_layers = DefaultLayers("those of the lists", lambda num_layers: tuple(range(num_layers)))

    up: float = parameter(
        2.0,
        low=0,
        search=Range(1.0, 3.0),
        help="Factor of the good heads. The paper's 2; with ``down``, 1 switches the method off.",
    )
    down: float = parameter(0.0, low=0, search=Range(0.0, 1.0), help="Factor of the bad heads. The paper's 0.")
    up_heads: HeadSpec = parameter(None, help="Z+, (layer, head) pairs. A head that is listed twice is scaled once.")
    down_heads: HeadSpec = parameter(
        None, help="Z-. One of the two lists must be given; ``None`` is then an empty one."
    )
    answers: Literal["caption", "yesno", "mcq"] = parameter(
        "caption",
        help="Which answers the lists were made for. The lists of one format say little about another (ranks correlate "
        "by 0.12). It is kept in recipes, and changes nothing else.",
    )

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
    def only_heads(self) -> HeadSpec:
        """Those with a factor other than 1."""
        return None if self.is_identity else tuple(self.factors)

    def bind(self, anatomy: Anatomy) -> AllPath:
        """Resolve the layers that have listed heads.

        Raises:
            MethodError: No list was given.
        """
        listed = (*(self.up_heads or ()), *(self.down_heads or ()))
        check_heads(self.name, listed, anatomy, self.attention_kinds)  # also those whose factor is 1
        if not listed and not self.is_identity:
            raise MethodError(
                "allpath needs lists of heads, and none are shipped. Make them with "
                "vlmfix.calibrate(model, 'allpath', data), or pass up_heads=[(layer, head), ...] and down_heads=[...]."
            )
        return super().bind(anatomy)

    def fixed_factors(self, num_heads: int) -> dict[tuple[int, int], float]:
        """Those of the lists, in the chosen layers."""
        return {place: factor for place, factor in self.factors.items() if place[0] in self.layer_indices}

    def edit_heads(self, head_outputs: torch.Tensor, layer: Layer) -> torch.Tensor:
        """Scale ``[batch, q_len, num_heads, head_dim]``."""
        return scale_heads(head_outputs, layer.constant(lambda: self._scale(head_outputs, layer)), layer)

    def _scale(self, head_outputs: torch.Tensor, layer: Layer) -> torch.Tensor:
        """Return the factors of a layer's heads, fp32 ``[num_heads]``."""
        factors, at = self.factors, layer.site.layer_idx
        scale = [factors.get((at, head), 1.0) for head in range(head_outputs.shape[2])]
        return torch.tensor(scale, device=head_outputs.device)
