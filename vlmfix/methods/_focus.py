"""Focus of text on the image: what a text token looks at, and what the text it reads looks at."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from vlmfix.run import Layer


@dataclass(frozen=True)
class Focus:
    """What text looked at in a reference layer, and which image tokens the rows of a forward lose.

    Attributes:
        seen: Attention of text tokens to the image, fp32 ``[batch, prompt, keys]``, mean over heads: by image token
            (0 for others) and by text token, the latter aligned with the reference layer's keys.
        offset: Position of the first of those keys; a sliding cache drops early ones.
        dropped: Image tokens outside the focus of the rows of the forward, bool ``[batch, prompt, q_len]``.
    """

    seen: torch.Tensor
    offset: int | torch.Tensor
    dropped: torch.Tensor

    @classmethod
    def extended(cls, known: Focus | None, attn_weights: torch.Tensor, layer: Layer, rho: float) -> Focus:
        """Add the rows a method observes, see ``Method.observe``, and find what is outside their focus."""
        run, (start, stop) = layer.run, layer.rows
        prompt, num_keys = run.image_mask.shape[1], attn_weights.shape[-1]
        assert layer.call is not None
        size = layer.call.key.shape[2]  # a static cache has its final size from the start
        offset = run.key_offset(layer.site, num_keys)
        weights = attn_weights.mean(1)  # [batch, rows, keys]
        image = run.image_mask.to(weights.device)
        is_text = _text_rows(layer).to(weights.device)
        new = take(weights, -offset, prompt) * (image[:, None] & is_text[..., None])
        seen = weights.new_zeros(weights.shape[0], prompt, size)
        if known is not None:
            seen = take(known.seen.to(weights.device), offset - known.offset, size)
            seen = F.pad(seen, (0, 0, 0, prompt - seen.shape[1]))
        # Rows of drafts that were dropped stay until they are written anew: no row sees them before.
        positions = torch.arange(start, stop, device=weights.device) + _on(run.past - offset, weights.device)
        seen = seen.index_copy(2, positions, new.transpose(1, 2))
        dropped = low_focus(weights @ seen[..., :num_keys].transpose(1, 2), image, rho).transpose(1, 2)
        if start > 0 and known is not None:
            dropped = torch.cat([known.dropped.to(dropped.device), dropped], dim=2)
        return cls(seen, offset, dropped)

    def dropped_keys(self, layer: Layer, like: torch.Tensor) -> torch.Tensor:
        """Return what the rows in hand lose, by the keys of any layer: bool ``[batch, rows, keys]``, as ``like``."""
        start, stop = layer.rows
        by_key = layer.visible_keys(self.dropped[:, :, start:stop], like.shape[-1]).to(like.device)
        return F.pad(by_key, (0, 0, 0, like.shape[-1] - by_key.shape[1])).transpose(1, 2)

    def reordered(self, beams: torch.Tensor) -> Focus:
        """Return the focus with batch row ``i`` taken from row ``beams[i]``."""
        seen, dropped = (each.index_select(0, beams.to(each.device)) for each in (self.seen, self.dropped))
        return replace(self, seen=seen, dropped=dropped)

    def cropped(self, length: int) -> Focus:
        """Forget image tokens behind ``length``."""
        return replace(self, seen=self.seen[:, :length], dropped=self.dropped[:, :length])


def low_focus(focus: torch.Tensor, image: torch.Tensor, rho: float) -> torch.Tensor:
    """Return the image tokens outside the smallest set with a share ``rho`` of each row's focus.

    Args:
        focus: fp32 ``[batch, rows, prompt]``, 0 where there is no image token.
        image: Bool ``[batch, prompt]``.
        rho: The share, in (0, 1].

    Returns:
        Bool ``[batch, rows, prompt]``; none in rows without any focus.
    """
    ranked, order = focus.sort(dim=-1, descending=True, stable=True)
    before = ranked.cumsum(-1) - ranked
    total = ranked.sum(-1, keepdim=True)
    outside = (before >= rho * total) & (total > 0)
    return torch.zeros_like(outside).scatter(-1, order, outside) & image[:, None]


def take(per_key: torch.Tensor, start: int | torch.Tensor, length: int) -> torch.Tensor:
    """Return entries ``start..start + length - 1`` of the last dimension, 0 where there are none."""
    wanted = torch.arange(length, device=per_key.device) + _on(start, per_key.device)
    inside = (wanted >= 0) & (wanted < per_key.shape[-1])
    return per_key[..., wanted.clamp(0, per_key.shape[-1] - 1)] * inside


def _on(number: int | torch.Tensor, device: torch.device) -> int | torch.Tensor:
    return number.to(device) if isinstance(number, torch.Tensor) else number


def _text_rows(layer: Layer) -> torch.Tensor:
    """Which of the rows in hand are text tokens: bool ``[batch, rows]``."""
    run, (start, stop) = layer.run, layer.rows
    mask = run.has_image[:, None].expand(-1, stop - start) if layer.row_mask is None else layer.row_mask
    if not run.is_prefill:
        return mask
    image = run.image_mask[:, -run.prompt_len :][:, start:stop]
    return mask & ~F.pad(image, (0, stop - start - image.shape[1]))
