"""EAH / EVAS: Enhancing Vision Attention Sinks (Zhang, Quan et al., EMNLP 2025, arXiv 2411.09968)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from vlmfix.errors import UnsupportedFeatureError
from vlmfix.methods.base import Method
from vlmfix.methods.parameters import Range, parameter
from vlmfix.methods.selection import DefaultLayers
from vlmfix.methods.views import EditedRows, Layer
from vlmfix.model.anatomy import Anatomy


class Columns(NamedTuple):
    """Column sums of one layer's weights in a prompt, the diagonal left out.

    Attributes:
        sums: fp32 ``[batch, num_heads, keys]``, over the prompt's rows that are no padding.
        counts: fp32 ``[batch, keys]``: N_j, how many of those rows come later than the key and may see it.
    """

    sums: torch.Tensor
    counts: torch.Tensor


@dataclass(frozen=True)
class EAH(Method):
    """Give every head of a shallow layer the attention map of the head with the most sinks in the image.

    For image token j, ``r_hj`` is the mean weight it gets from the ``N_j`` rows behind it. j is a sink of head h if
    ``r_hj > threshold``. The head with the most sinks (the first of equals) has its whole map, all rows and columns,
    copied to the other heads, which keep their own values. Without any sink, nothing is edited. Only prompts are
    edited, image rows too; the method reaches the answer through the keys and values of later layers. It has no
    strength.

    What the paper's tables were made with is not known. Title and README speak of the second layer and a threshold of
    0.002. The released file edits layer 15 at 0.0008 and counts in another way, see ``counting``:
    ``EAH(layers=[15], threshold=0.0008, counting="released")`` is that file for one prompt; of a batch it edits the
    first alone. The released scripts decode with OPERA beside it.
    """

    name = "eah"
    paper = "arXiv 2411.09968"
    summary = "copies the map of the head with the most image sinks to all heads of a shallow layer"
    edits_weights = True
    edits_decode = False
    prompt_rows = "all"  # the whole map is copied
    observed_rows = "all"  # a column's mean is over every row behind it
    needs_whole_prompt = True
    default_layers = DefaultLayers("the second layer", lambda num_layers: (min(1, num_layers - 1),))

    threshold: float | Literal["auto"] = parameter(
        0.002,
        low=0,
        high=1,
        off=1,
        search=Range(0.0005, 0.02, log=True),
        help="Least mean weight of a sink; none exceeds 1, which switches the method off. 0.002 as in the README. Mean "
        'weights shrink with the length of the prompt: ``"auto"`` is 1.2 / T for T tokens (0.002 at 600; ours).',
    )
    counting: Literal["exact", "released"] = parameter(
        "exact",
        help='``"exact"``: every image token counts, and N_j is the number of rows behind it. ``"released"``: an '
        "image's first token does not count, N_j is 647 - j with j counted as if the image began at position 35, and "
        "nothing is edited if head 0 wins. These constants fit one image of 576 tokens and one length of prompt, so "
        "that other numbers of image tokens are refused.",
    )

    def notes(self, anatomy: Anatomy) -> tuple[str, ...]:
        """Say what is not known about the published tables."""
        return () if self.is_identity else ("eah: the layer and threshold behind the paper's tables are not known",)

    def acts_at(self, layer: Layer) -> bool:
        """Only in prompts."""
        return layer.forward.is_prefill

    def observe(self, attn_weights: torch.Tensor, allowed: torch.Tensor, layer: Layer) -> None:
        """Add rows to the column sums."""
        forward, (start, stop), num_keys = layer.forward, layer.rows, attn_weights.shape[-1]
        assert layer.row_mask is not None
        rows = torch.arange(start, stop, device=attn_weights.device)
        counted = layer.row_mask.to(rows.device) & (rows < forward.prompt_len)  # a draft may follow the prompt
        keys = torch.arange(num_keys, device=rows.device) + layer.key_offset(num_keys)
        later = counted[..., None] & (keys < rows[:, None] + forward.past)  # [batch, rows, keys]
        sums = attn_weights.masked_fill(~later[:, None], 0.0).sum(2)
        counts = (later & allowed.any(1)).sum(1).float()
        if start > 0:
            sums, counts = sums + layer.learned.sums, counts + layer.learned.counts
        layer.learned = Columns(sums, counts)

    def edit_weights(self, attn_weights: torch.Tensor, layer: Layer) -> EditedRows:
        """Copy the chosen head's rows of ``[batch, num_heads, rows, keys]``."""
        best, has_sink = self.choose_head(layer.learned, attn_weights, layer)
        batch, heads = (torch.arange(size, device=best.device) for size in attn_weights.shape[:2])
        edited = has_sink[:, None] & (heads != best[:, None])
        copied = torch.where(edited[..., None, None], attn_weights[batch, best][:, None], attn_weights)
        return copied, edited[..., None].expand(attn_weights.shape[:3])

    def choose_head(
        self, columns: Columns, attn_weights: torch.Tensor, layer: Layer
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return each sample's head with the most sinks, and whether it is copied: int64 and bool ``[batch]``."""
        image, counts = layer.keys("image", attn_weights), columns.counts
        if self.counting == "released":
            image, counts = layer.per_keys(lambda: _released_counts(layer, image), attn_weights)
        tokens = layer.forward.valid_mask.sum(1).to(attn_weights.device)
        threshold = 1.2 / tokens if isinstance(self.threshold, str) else counts.new_tensor([self.threshold])
        is_sink = (columns.sums > (threshold[..., None] * counts)[:, None]) & image[:, None]  # r_hj > threshold
        sinks = is_sink.sum(-1)  # [batch, num_heads]
        most = sinks.amax(1, keepdim=True)
        heads = torch.arange(sinks.shape[1], device=sinks.device)
        winner = torch.where(sinks == most, heads, sinks.shape[1]).amin(1)
        is_copied = most[:, 0] > 0
        return winner, is_copied & (winner > 0) if self.counting == "released" else is_copied


_PATCHES, _FIRST_IMAGE_KEY, _LAST_ROW = 576, 35, 647


def _released_counts(layer: Layer, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the image keys that count in the released file, and their ``N_j``, by image keys bool ``[batch, keys]``.

    Raises:
        UnsupportedFeatureError: A prompt's image tokens are not those of one image of LLaVA-1.5.
    """
    found = set(layer.forward.image_mask.sum(1).tolist()) - {0}
    if not found <= {_PATCHES}:
        raise UnsupportedFeatureError(
            f"eah: the constants of the released code belong to one image of {_PATCHES} tokens, and the prompts have "
            f"{', '.join(map(str, sorted(found)))} image tokens. Leave counting at 'exact'."
        )
    place = image.cumsum(1) - 1
    counts = (_LAST_ROW - _FIRST_IMAGE_KEY - place).clamp_min(1).float()
    return image & (place > 0), counts
