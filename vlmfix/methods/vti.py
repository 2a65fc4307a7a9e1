"""VTI: Visual and Textual Intervention (Liu, Ye and Zou, ICLR 2025, arXiv 2410.15778)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F

from vlmfix.errors import MethodError, UnsupportedFeatureError, UnsupportedModelError
from vlmfix.methods.base import Method
from vlmfix.methods.measured import Directions, how_to_measure
from vlmfix.methods.parameters import Range, parameter
from vlmfix.methods.scores import turned_towards
from vlmfix.methods.views import Block
from vlmfix.model.anatomy import Anatomy
from vlmfix.model.blocks import BlockKind
from vlmfix.model.vision_tower import find_vision_layers

STEP = 0.1
"""Radians that a strength of 1 turns an output by, at most."""


@dataclass(frozen=True)
class VTI(Method):
    """Turn the MLP outputs of the decoder and of the vision tower in fixed directions, measured once per model.

    Every MLP output x of every token is edited before it is added to the residual stream, in fp32:
    ``x <- |x| unit(unit(x) + 0.1 alpha unit(d_l))``. It keeps its length. In the decoder, ``d_l`` points from
    hallucinated captions to right ones, as the last token's state of layer l holds them. In the vision tower it points
    from pictures to the mean of masked pictures: to what stays when most of a picture is hidden. Prompts without an
    image are left alone (ours). ``vlmfix calibrate vti`` measures the directions, see ``vlmfix.calibration.vti``.

    The released code has a direction per token of the vision tower. So can these; by default the tokens of a picture
    share their mean, because towers that read pictures of any size have no fixed tokens. The released code's defaults
    are .8 and 0, those of its README .9 and .9. It reads the whole text anew for every token (no cache) and searches
    with 5 beams; every row is edited alike, so a cache changes nothing. Which half carries the published gain is not
    known.
    """

    name = "vti"
    paper = "arXiv 2410.15778"
    summary = "turns MLP outputs of decoder and vision tower in fixed directions, away from hallucinated captions"
    edits_blocks = ("mlp",)
    prompt_rows = "all"  # image tokens too
    minds_text_before_image = True
    needs_cache = False  # every row is edited alike

    alpha_text: float = parameter(
        0.9,
        search=Range(0.1, 2.0),
        help="Strength in the decoder; below 0, towards hallucinated captions. With ``alpha_image``, 0 switches the "
        "method off.",
    )
    alpha_image: float = parameter(
        0.9, search=Range(0.1, 2.0), help="Strength in the vision tower. 0 for models whose tower is not known."
    )
    directions: Directions | Mapping[str, Any] | str | None = parameter(
        None,
        expected="Directions, their dict, or the path of a JSON file",
        help="``Directions``, their dict, or a JSON file with them, read when a model is patched. Required; made by "
        "``vlmfix.calibrate(model, 'vti', data)``, for one checkpoint. None are shipped.",
    )

    @property
    def is_identity(self) -> bool:
        """Whether both strengths are 0."""
        return self.alpha_text == 0 == self.alpha_image

    @property
    def edits_vision(self) -> tuple[BlockKind, ...]:
        """The MLPs, unless they are left alone."""
        return ("mlp",) if self.alpha_image else ()

    def bind(self, anatomy: Anatomy) -> VTI:
        """Resolve layers and directions.

        Raises:
            MethodError: No directions, those of another checkpoint, or a vision tower that is not known.
        """
        bound = super().bind(anatomy)
        if self.is_identity:
            return bound
        if self.directions is None:
            raise MethodError(
                f"vti needs directions of this checkpoint, and none are shipped. {how_to_measure('vti', anatomy)}"
            )
        directions = Directions.load(self.directions) if isinstance(self.directions, str) else self.directions
        assert isinstance(directions, Directions)
        directions.check(anatomy)
        if self.alpha_image:
            try:
                num_layers = len(find_vision_layers(anatomy.model))
            except UnsupportedModelError as error:
                raise MethodError(f"{error} For vti, choose alpha_image=0.") from error
            if len(directions.vision) != num_layers:
                raise MethodError(
                    f"vti: the directions are of a vision tower with {len(directions.vision)} layers, and this model's "
                    f"has {num_layers}. {how_to_measure('vti', anatomy)} Or choose alpha_image=0."
                )
        return dataclasses.replace(bound, directions=directions)

    @cached_property
    def _units(self) -> dict[Any, torch.Tensor]:
        """Unit directions by device and place, made when they are first asked for."""
        return {}

    def _unit(self, place: tuple[str, int], device: torch.device) -> torch.Tensor:
        """Return the direction of the decoder's layer ``("text", l)``, or of the tower's ``("vision", l)``."""
        assert isinstance(self.directions, Directions)
        if (device, place) not in self._units:
            table: Any = self.directions.text if place[0] == "text" else self.directions.vision
            self._units[device, place] = F.normalize(torch.tensor(table[place[1]], device=device), dim=-1)
        return self._units[device, place]

    def edit_block(self, states: torch.Tensor, block: Block) -> torch.Tensor:
        """Turn ``[batch, rows, hidden_size]``."""
        if self.alpha_text == 0:
            return states
        vector = self._unit(("text", block.layer_idx), states.device)
        return turned_towards(states.float(), vector, STEP * self.alpha_text)

    def edit_vision(self, states: torch.Tensor, kind: BlockKind, layer_idx: int) -> torch.Tensor:
        """Turn ``[..., tokens, width]``.

        Raises:
            UnsupportedFeatureError: There are directions for other tokens.
        """
        vectors = self._unit(("vision", layer_idx), states.device)
        if len(vectors) not in (1, states.shape[-2]) or vectors.shape[1] != states.shape[-1]:
            raise UnsupportedFeatureError(
                f"vti: the directions are for {len(vectors)} tokens of width {vectors.shape[1]} in layer {layer_idx} "
                f"of the vision tower, and it now has {states.shape[-2]} of width {states.shape[-1]}. Measure "
                "directions that all tokens share (the default of vlmfix calibrate vti)."
            )
        return turned_towards(states.float(), vectors, STEP * self.alpha_image)
