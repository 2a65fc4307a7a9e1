"""FIA: Fixing Imbalanced Attention, renamed PAINT (Arif et al., arXiv 2501.12206)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from vlmfix.errors import MethodError, UnsupportedFeatureError
from vlmfix.methods.base import Method
from vlmfix.methods.parameters import Range, parameter
from vlmfix.methods.scores import raise_keys
from vlmfix.methods.selection import all_but
from vlmfix.methods.views import EditedRows, Layer, Prompt, PromptRows
from vlmfix.model.anatomy import Anatomy

_FIRST, _PENULTIMATE = 0, -2


@dataclass(frozen=True)
class FIA(Method):
    """Raise the scores of two sets of image tokens in the row that predicts the next token.

    Both sets come from the attention ``c[j]`` of the vision tower's class token, summed over heads. *Local* tokens are
    the top ``int(local_ratio * n)`` patches of the first vision layer. *Summary* tokens are the top patches of the
    second-to-last one, as many as exceed ``Q3 + 1.5 IQR``. A patch in both is a summary token. Then
    ``s_j <- s_j + alpha |s_j|`` for local and ``+ beta |s_j|`` for summary tokens, in all heads. The method needs a
    CLIP-like tower and one token per patch.

    The abstract of the paper's first version speaks of head-specific modulation. No released code has it: all heads get
    the same factor, here too unless ``head_factors`` says otherwise. The "spatial" tokens of the released code are the
    top k of softmax row sums, which are all 1; they are not offered. The published runs use guidance beside it, and do
    not edit the prompt's last row then: ``[FIA(edit_prompt=False), Guidance()]``. The headline setting (ratio 0.25,
    guidance on) makes captions loop. The default is the one logged setting with a gain and intact text. It was logged
    with guidance, and has not been measured without. In the vision tower, quartiles are interpolated, and every image
    is ranked by itself.
    """

    name = "fia"
    paper = "arXiv 2501.12206"
    summary = "raises the scores of image tokens the vision tower's class token looks at"
    edits_scores = True
    reads_prompt = True
    vision_layers = (_FIRST, _PENULTIMATE)
    needs_whole_prompt = True  # the patches of an image are ranked together
    default_layers = all_but("all but the first two", first=2)

    alpha: float = parameter(
        0.7,
        low=0,
        search=Range(0.05, 1.0),
        help="Gain of local tokens. It is sharp: 0.5 does nothing, 0.8 breaks the text (Table 2). With ``beta``, 0 "
        "switches the method off.",
    )
    beta: float = parameter(
        0.4,
        low=0,
        search=Range(0.05, 0.8),
        help="Gain of summary tokens. 0.4 as in the tables; the released code's default is 0.3.",
    )
    local_ratio: float = parameter(0.15, low=0, high=1, help="Share of local tokens.")
    edit_prompt: bool = parameter(
        True, help="Edit the prompt's last row too; the published runs, with guidance, do not."
    )
    head_factors: tuple[tuple[float, ...], ...] | None = parameter(
        None,
        low=0,
        expected="a table [layers][heads] of finite numbers >= 0",
        help="Experimental, ours: ``[num_layers][num_heads]``, factors of both gains by head, such as ``.factors()`` "
        "of ``vlmfix.probes.head_divergence``. Default: 1 for all.",
    )

    @property
    def is_identity(self) -> bool:
        """Whether both gains are 0."""
        return self.alpha == 0 == self.beta

    def bind(self, anatomy: Anatomy) -> FIA:
        """Resolve the layers, and check the factors.

        Raises:
            MethodError: They are those of a model of another shape.
        """
        factors, shape = self.head_factors, (anatomy.num_layers, anatomy.num_heads)
        if factors is not None and {(len(factors), len(row)) for row in factors} != {shape}:
            raise MethodError(f"fia: head_factors must have {shape[0]} layers of {shape[1]} heads for this model.")
        return super().bind(anatomy)

    @property
    def prompt_rows(self) -> PromptRows:
        """The last row, unless switched off."""
        return "last" if self.edit_prompt else "none"

    def begin(self, prompt: Prompt) -> Prompt:
        """Return the prompt unread; the vision tower may not have run yet."""
        return prompt

    def crop(self, learned: Any, length: int) -> Any:
        """Keep the gains of the first ``length`` tokens."""
        return learned[:, :length] if isinstance(learned, torch.Tensor) else learned

    def edit_scores(self, scores: torch.Tensor, allowed: torch.Tensor, layer: Layer) -> EditedRows:
        """Raise the chosen columns of ``[batch, num_heads, rows, keys]``."""
        if not isinstance(layer.shared, torch.Tensor):
            layer.shared = self._gains(layer.shared)

        def gain() -> torch.Tensor:
            known = layer.visible_keys(layer.shared.to(scores.device), scores.shape[-1])
            return F.pad(known, (0, scores.shape[-1] - known.shape[1]))

        return raise_keys(scores, layer, gain, layer.constant(lambda: self._factors(layer, scores)))

    def _factors(self, layer: Layer, scores: torch.Tensor) -> torch.Tensor | None:
        """Return the factors of the heads in hand, fp32 ``[num_heads, 1, 1]``; ``None`` without any."""
        if self.head_factors is None:
            return None
        return torch.tensor(self.head_factors[layer.site.layer_idx], device=scores.device)[:, None, None]

    def _gains(self, prompt: Prompt) -> torch.Tensor:
        """Return the gains of all tokens so far, fp32 ``[batch, prompt]``; images of earlier turns keep theirs."""
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
