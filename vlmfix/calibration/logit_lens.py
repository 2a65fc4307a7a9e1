"""The logit lens: what each attention head alone adds to the probability of tokens, read off inside the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from vlmfix.errors import UnsupportedFeatureError
from vlmfix.model.anatomy import Anatomy
from vlmfix.model.blocks import final_norm
from vlmfix.model.devices import states_device


class StreamLog:
    """What the lens reads: the residual stream entering each layer, and the slices of its heads, in every last row.

    Attributes:
        residuals: Per forward, by layer: ``[batch, hidden_size]``.
        slices: Per forward, by layer: what enters the output projection, ``[batch, num_heads, head_dim]``.
    """

    def __init__(self, anatomy: Anatomy) -> None:
        self.anatomy = anatomy
        self.residuals: list[dict[int, torch.Tensor]] = []
        self.slices: list[dict[int, torch.Tensor]] = []

    @contextmanager
    def watch(self) -> Iterator[StreamLog]:
        """Fill the log by every forward inside the block."""
        handles = [self.anatomy.decoder_layers[0].register_forward_pre_hook(self._begin)]
        try:
            for site in self.anatomy.sites:
                residual, slices = self._residual(site.layer_idx), self._slices(site.layer_idx)
                handles.append(site.decoder_layer.register_forward_pre_hook(residual, with_kwargs=True))
                handles.append(site.output_projection.register_forward_pre_hook(slices))
            yield self
        finally:
            for handle in handles:
                handle.remove()

    def _begin(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.residuals.append({})
        self.slices.append({})

    def _residual(self, at: int) -> Callable[..., None]:
        def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden_states = args[0] if args else kwargs["hidden_states"]
            if hidden_states.dim() != 3:
                raise UnsupportedFeatureError(
                    f"{type(module).__name__} carries a residual stream of shape {tuple(hidden_states.shape)}; "
                    "expected [batch, length, hidden_size]. Heads of this model cannot be scored by a logit lens."
                )
            self.residuals[-1][at] = hidden_states[:, -1].cpu()

        return see

    def _slices(self, at: int) -> Callable[..., None]:
        def see(module: nn.Module, args: tuple[Any, ...]) -> None:
            last = args[0].reshape(args[0].shape[0], -1, args[0].shape[-1])[:, -1]
            self.slices[-1][at] = last.reshape(len(last), self.anatomy.num_heads, -1).cpu()

        return see


class LogitLens:
    """Reads residual streams off by the language-model head.

    ``gain(S) = ln sum_{b in S} P(b | r + H) - ln sum_{b in S} P(b | r)`` with r the residual stream entering a layer, H
    the output projection of one head's slice alone (without its bias), and ``P(. | x) = softmax(head(x))``. A norm
    behind the projection, which some families have, is not applied to H.

    Args:
        anatomy: The model.
        use_norm: Apply the model's final norm before the head.

    Raises:
        UnsupportedFeatureError: The model has no such head or norm.
    """

    def __init__(self, anatomy: Anatomy, *, use_norm: bool) -> None:
        head = anatomy.model.get_output_embeddings()
        if not isinstance(head, nn.Module):
            raise UnsupportedFeatureError(
                f"{type(anatomy.model).__name__} has no language-model head for a logit lens."
            )
        self._head = head
        self._norm = final_norm(anatomy)() if use_norm else None
        self._projections = {site.layer_idx: site.output_projection for site in anatomy.sites}
        self._model = anatomy.model
        self._device, self._dtype = states_device(head, anatomy.model), anatomy.model.dtype

    def gains(
        self, streams: StreamLog, step: int, sample: int, token_sets: Sequence[Sequence[int]]
    ) -> list[torch.Tensor]:
        """Return what each head adds to the log probability of each set of tokens: fp32 ``[layers, num_heads]``.

        Args:
            streams: Recorded streams and slices.
            step: Which forward.
            sample: Which sample of the batch.
            token_sets: The sets.
        """
        by_layer = []
        for at in sorted(streams.slices[step]):
            residual = streams.residuals[step][at][sample]
            heads = self._contributions(at, streams.slices[step][at][sample])
            logits = self._read(torch.cat([residual[None].to(heads), residual.to(heads) + heads]))
            log_p = logits.log_softmax(-1)
            of_sets = torch.stack([log_p[:, list(tokens)].logsumexp(-1) for tokens in token_sets])
            by_layer.append((of_sets[:, 1:] - of_sets[:, :1]).cpu())
        return list(torch.stack(by_layer, dim=1))

    def _contributions(self, at: int, slices: torch.Tensor) -> torch.Tensor:
        """Project each head's slice ``[num_heads, head_dim]`` alone: fp32 ``[num_heads, hidden_size]``."""
        projection = self._projections[at]
        alone = torch.zeros(len(slices) + 1, *slices.shape, dtype=slices.dtype)  # the last one is no head: the bias
        alone[range(len(slices)), range(len(slices))] = slices
        device = states_device(projection, self._model)
        projected: torch.Tensor = projection(alone.flatten(1)[:, None].to(device))[:, 0].float()
        return (projected[:-1] - projected[-1:]).to(self._device)

    def _read(self, states: torch.Tensor) -> torch.Tensor:
        """Return logits, fp32 ``[n, vocab]``."""
        states = states.to(self._device, self._dtype)
        if self._norm is not None:
            states = self._norm(states)
        logits: torch.Tensor = self._head(states).float()
        return logits
