"""VISTA: Visual Information Steering with Token-logit Augmentation (Li et al., ICML 2025, arXiv 2502.03628)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F

from vlmfix.methods.base import Method
from vlmfix.methods.parameters import Range, parameter
from vlmfix.methods.scores import turned_towards
from vlmfix.methods.selection import LAYERS_IN_WORDS, LayerSpec, resolve_layers
from vlmfix.methods.views import Block, Prompt
from vlmfix.model.anatomy import Anatomy

LEAST_SHARE = 1e-3
"""Least length of a vector, as a share of the stream's, that is a direction and not noise."""


_STRENGTHS = {"caption": 0.17, "short": 0.01, None: 0.1}


@dataclass(frozen=True)
class VISTA(Method):
    """Turn the MLP outputs towards what the image adds to the residual stream, and mix in early layers' logits.

    Per prompt and layer, ``v_l`` is what leaves layer l at the last position of the prompt minus the same without the
    image's tokens (and those that mark its begin and end), both of the stock model. Every MLP output x of every token
    is edited in fp32 before it is added to the stream:
    ``x <- |x| unit(unit(x) + lam (1 + max(0, -cos(x, v_l))) unit(v_l))``. It keeps its length and turns by about
    ``lam`` radians, more where it points away. The logits that predict a token become
    ``sla_alpha mean_k head(h_k) + (1 - sla_alpha) logits``, k over early layers. As released, this is without the final
    norm; ``sla_alpha`` is therefore no share, since those logits have another scale.

    The strength must match the task: the authors run .17 for captions, .1 for open questions and .01 for yes/no
    questions, and a user of their code found .17 on yes/no questions much worse than .01.

    The released code is followed, which edits MLP outputs and not the stream itself. Its direction comes from a PCA of
    one vector, which adds 1 to the first coordinate of layer 0; that is left out unless ``paper_code``. It mixes the
    logits of all prompt rows; here, rows that predict no token keep theirs, which has no consequence. It gives one
    vector to a whole batch, and returns half precision whatever the model's is.

    Two things are ours. A layer in which the image moves the last position by less than a thousandth of its length (or
    two rounding errors of the model's dtype) is left alone, since only the direction of ``v_l`` counts, and that one
    would be noise. In a further turn on the same cache, ``v_l`` is computed anew, with the earlier turns as the cache
    holds them.
    """

    name = "vista"
    paper = "arXiv 2502.03628"
    summary = "turns MLP outputs towards what the image adds to the stream; mixes in early logits"
    edits_blocks = ("mlp",)
    prompt_rows = "all"  # image tokens too
    needs_whole_prompt = True  # the vector belongs to the end of the prompt
    reads_prompt = True
    needs_ids = True

    lam: float | None = parameter(
        None,
        low=0,
        search=Range(0.005, 0.3, log=True),
        help="Strength. ``None``: by ``task``. With ``sla_alpha``, 0 switches the method off.",
    )
    task: Literal["caption", "short"] | None = parameter(
        None, help='``"caption"``: lam 0.17; ``"short"``: 0.01; ``None``: 0.1.'
    )
    sla_alpha: float = parameter(
        0.3,
        low=0,
        high=1,
        search=Range(0.0, 0.5),
        remark="0 leaves logits alone",
        help="Weight of the early logits. 0 leaves logits alone.",
    )
    sla_layers: LayerSpec = parameter(
        None,
        expected=LAYERS_IN_WORDS,
        help="Early layers, see ``LayerSpec``. Default: 25 to 30 of 32; for other depths from there scaled to the last "
        "but one (a heuristic).",
    )
    sla_final_norm: bool = parameter(
        False, help="Apply the model's final norm to early states (ours; the release does not)."
    )
    paper_code: bool = parameter(False, help="Keep the first coordinate's artefact of the released code.")

    def validate(self) -> None:
        """Refuse two strengths."""
        self.require(self.lam is None or self.task is None, "task", "left out where lam is given")

    @property
    def strength(self) -> float:
        """The strength chosen, or that of the task."""
        return _STRENGTHS[self.task] if self.lam is None else self.lam

    @property
    def is_identity(self) -> bool:
        """Whether nothing is steered and no logits are mixed."""
        return self.strength == 0 == self.sla_alpha

    @property
    def early_layers(self) -> tuple[int, ...]:
        """The early layers of a bound method."""
        if self.sla_alpha == 0:
            return ()
        return tuple(layer for layer in self.sla_layers or () if isinstance(layer, int))

    @property
    def early_norm(self) -> bool:
        """As chosen."""
        return self.sla_final_norm

    def bind(self, anatomy: Anatomy) -> VISTA:
        """Resolve both sets of layers."""
        bound, depth = super().bind(anatomy), anatomy.num_layers
        if self.sla_layers is None:
            early = tuple(range(min(round(25 / 32 * depth), max(depth - 2, 0)), max(depth - 1, 1)))
        else:
            early = resolve_layers(self.sla_layers, depth, "vista (sla_layers)")
        return dataclasses.replace(bound, sla_layers=early)

    def notes(self, anatomy: Anatomy) -> tuple[str, ...]:
        """Say that the strength belongs to a task."""
        if self.lam is not None or self.task is not None:
            return ()
        return ("vista: lam must match the task; task='caption' takes .17, task='short' (yes/no) .01, neither .1",)

    def begin(self, prompt: Prompt) -> dict[int, torch.Tensor] | None:
        """Return the unit vectors of the layers to steer, fp32 ``[batch, hidden_size]``."""
        if self.strength == 0:
            return None
        with_image, without = prompt.last_states(), prompt.last_states_text_only()
        vectors = {}
        for layer in self.layer_indices:
            vector = beyond_rounding(with_image[layer], without[layer])
            if self.paper_code and layer == 0:
                vector[:, 0] += 1
            vectors[layer] = F.normalize(vector, dim=-1)
        return vectors

    def edit_block(self, states: torch.Tensor, block: Block) -> torch.Tensor:
        """Turn ``[batch, rows, hidden_size]``."""
        vectors: dict[int, Any] | None = block.shared
        if vectors is None:
            return states
        return steered(states.float(), vectors[block.layer_idx].to(states.device)[:, None], self.strength)

    def mix_logits(self, logits: torch.Tensor, early: Sequence[torch.Tensor]) -> torch.Tensor:
        """Mix ``[batch, rows, vocab]``."""
        mean: torch.Tensor = torch.stack(list(early)).mean(0)
        return logits.lerp(mean, self.sla_alpha)


def beyond_rounding(states: torch.Tensor, without: torch.Tensor) -> torch.Tensor:
    """Subtract ``[batch, hidden_size]`` in fp32; zero where hardly more than rounding errors are left."""
    difference = states.float() - without.float().to(states.device)
    least = max(LEAST_SHARE, 2 * torch.finfo(states.dtype).eps)
    lengths = [torch.linalg.vector_norm(each.float(), dim=-1, keepdim=True) for each in (difference, states)]
    return torch.where(lengths[0] > least * lengths[1], difference, 0.0)


def steered(states: torch.Tensor, vector: torch.Tensor, lam: float) -> torch.Tensor:
    """Turn vectors towards a unit vector and keep their lengths.

    Args:
        states: fp32 ``[..., hidden_size]``; a zero vector stays zero.
        vector: fp32, of the same shape or broadcastable to it: unit vectors, or zero to leave the states alone.
        lam: Strength.
    """
    cosine = (F.normalize(states, dim=-1) * vector).sum(-1, keepdim=True)
    return turned_towards(states, vector, lam * (1 + F.relu(-cosine)))
