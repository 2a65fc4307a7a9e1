"""FIA: Fixing Imbalanced Attention, renamed PAINT (Arif et al., arXiv 2501.12206)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F

from vlmfix.errors import UnsupportedFeatureError
from vlmfix.methods.base import Method
from vlmfix.methods.scores import raise_keys
from vlmfix.methods.selection import Range, Space
from vlmfix.methods.views import Layer, PromptRows

if TYPE_CHECKING:
    from vlmfix.methods.views import Prompt


_FIRST, _PENULTIMATE = 0, -2


@dataclass(frozen=True)
class FIA(Method):
    """Raise the scores of two sets of image tokens in the row that predicts the next token.

    Both sets come from the attention ``c[j]`` of the vision tower's class token, summed over heads: *local* tokens are
    the top ``int(local_ratio * n)`` patches of the first vision layer; *summary* tokens are the top patches of the
    second-to-last one, as many as exceed ``Q3 + 1.5 IQR``; summary wins. Then ``s_j <- s_j + alpha |s_j|`` for local
    and ``+ beta |s_j|`` for summary tokens, in all heads. Needs a CLIP-like tower and one token per patch.

    What the abstract of the paper's first version calls head-specific modulation is in no released code: all heads get
    the same factor, here too. The "spatial" tokens of the released code are top-k of softmax row sums, which are all 1:
    not offered. The headline setting (ratio .25, guidance on) makes captions loop; the default is the one logged
    setting with a gain and intact text, which was logged with guidance and has not been measured without.

    Attributes:
        alpha: Gain of local tokens, >= 0. Sharp: .5 does nothing, .8 breaks the text (Table 2).
        beta: Gain of summary tokens, >= 0.
        local_ratio: Share of local tokens, in [0, 1].
        edit_prompt: Edit the prompt's last row too; the published runs, with guidance, do not.
        layers: Default: all but the first two.
    """

    name: ClassVar[str] = "fia"
    paper: ClassVar[str] = "arXiv 2501.12206"
    summary: ClassVar[str] = "raises the scores of image tokens the vision tower's class token looks at"
    search_space: ClassVar[Space] = {"alpha": Range(0.05, 1.0), "beta": Range(0.05, 0.8)}
    edits_scores: ClassVar[bool] = True
    reads_prompt: ClassVar[bool] = True
    vision_layers: ClassVar[tuple[int, ...]] = (_FIRST, _PENULTIMATE)

    alpha: float = 0.7
    beta: float = 0.4
    local_ratio: float = 0.15
    edit_prompt: bool = True

    def validate(self) -> None:
        """Raise ``MethodError`` for a parameter out of range."""
        for parameter in ("alpha", "beta"):
            self.require(0 <= getattr(self, parameter) < math.inf, parameter, "a finite number >= 0")
        self.require(0 <= self.local_ratio <= 1, "local_ratio", "between 0 and 1")

    @property
    def is_identity(self) -> bool:
        """Whether both gains are 0."""
        return self.alpha == 0 == self.beta

    @property
    def prompt_rows(self) -> PromptRows:
        """The last row, unless switched off."""
        return "last" if self.edit_prompt else "none"

    @property
    def needs_whole_prompt(self) -> bool:
        """The patches of an image are ranked together."""
        return True

    def default_layers(self, num_layers: int) -> tuple[int, ...]:
        """All but the first two; the last layer of models of two layers or fewer."""
        return tuple(range(min(2, num_layers - 1), num_layers))

    def begin(self, prompt: Prompt) -> Prompt:
        """Wait: the vision tower may run inside the forward."""
        return prompt

    def crop(self, learned: Any, length: int) -> Any:
        """Keep the gains of the first ``length`` tokens."""
        return learned[:, :length] if isinstance(learned, torch.Tensor) else learned

    def edit_scores(
        self, scores: torch.Tensor, allowed: torch.Tensor, layer: Layer
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Raise the chosen columns of ``[batch, num_heads, rows, keys]``."""
        if not isinstance(layer.shared, torch.Tensor):
            layer.shared = self._gains(layer.shared)

        def gain() -> torch.Tensor:
            known = layer.visible_keys(layer.shared.to(scores.device), scores.shape[-1])
            return F.pad(known, (0, scores.shape[-1] - known.shape[1]))

        return raise_keys(scores, layer, gain)

    def _gains(self, prompt: Prompt) -> torch.Tensor:
        """Gains of all tokens so far, fp32 ``[batch, prompt]``; images of earlier turns keep theirs."""
        mask = prompt.forward.image_mask
        gains = torch.zeros(mask.shape, device=mask.device)
        past = 0
        if isinstance(prompt.known, torch.Tensor):
            past = prompt.known.shape[1]
            gains[:, :past] = prompt.known
        new = mask.clone()
        new[:, :past] = False
        if bool(new.any()):
            seen = prompt.patch_attention()
            per_image = [self.patch_gains(*maps) for maps in zip(seen[_FIRST], seen[_PENULTIMATE], strict=True)]
            flat = _in_order(per_image, new.sum(1).tolist())
            gains[new] = flat.to(gains)
        return gains

    def patch_gains(self, first: torch.Tensor, penultimate: torch.Tensor) -> torch.Tensor:
        """Return the gain of every patch of one image.

        Args:
            first: The class token's attention to the patches in the first vision layer, ``[patches]``.
            penultimate: The same in the second-to-last layer.
        """
        patches = first.shape[0]
        gains = torch.zeros_like(first)
        gains[first.topk(int(self.local_ratio * patches)).indices] = self.alpha
        low, high = torch.quantile(penultimate, torch.tensor([0.25, 0.75], device=penultimate.device)).unbind()
        num_summary = int((penultimate > high + 1.5 * (high - low)).sum())
        gains[penultimate.topk(num_summary).indices] = self.beta
        return gains


def _in_order(per_image: list[torch.Tensor], tokens: list[int]) -> torch.Tensor:
    """Lay out the gains of encoded images over the image tokens of a batch, row by row.

    Args:
        per_image: Gains of every encoded image, ``[patches]`` each.
        tokens: Image tokens of every row. Rows expanded for beams share their images.

    Raises:
        UnsupportedFeatureError: There is not one token per patch.
    """
    patches = per_image[0].shape[0]
    copies, rest = divmod(sum(tokens), patches * len(per_image))
    if rest or not copies or any(count % patches for count in tokens) or len(tokens) % copies:
        raise UnsupportedFeatureError(
            f"fia needs one image token per patch of the vision tower: {len(per_image)} images of {patches} patches "
            f"were encoded, the prompts have {tokens} image tokens. Leave prefill_chunk_size unset; models that tile "
            "or pool images have no such order: choose another method, such as vlmfix.patch(model, 'pai')."
        )
    parts, image = [], 0
    for row in range(0, len(tokens), copies):
        count = tokens[row] // patches
        parts += per_image[image : image + count] * copies
        image += count
    return torch.cat(parts)
