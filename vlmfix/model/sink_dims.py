"""Sink dimensions: the hidden dimensions whose extreme values mark attention sinks."""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

import torch
from torch import nn

from vlmfix.errors import MethodError
from vlmfix.model.anatomy import FORWARD_KWARG, SITE_ATTRIBUTE, Anatomy, analyse
from vlmfix.model.devices import states_device

logger = logging.getLogger("vlmfix")


class KnownSinkDims(NamedTuple):
    """Sink dimensions of one language model, recognised by its shape.

    Attributes:
        shape: (model_type, hidden_size, num_hidden_layers, intermediate_size, vocab_size up to padding).
        dims: The dimensions.
        source: Where they come from.
    """

    shape: tuple[str, int, int, int, range]
    dims: tuple[int, ...]
    source: str


_RELEASED = "arXiv 2503.03321 and its released code"


KNOWN_SINK_DIMS = (
    KnownSinkDims(("llama", 4096, 32, 11008, range(32000, 32129)), (1415, 2533), _RELEASED),
    KnownSinkDims(("llama", 5120, 40, 13824, range(32000, 32129)), (2100, 4743), _RELEASED),
    KnownSinkDims(("qwen2_vl", 3584, 28, 18944, range(151936, 152065)), (458, 2570), "arXiv 2503.03321, appendix A.1"),
    KnownSinkDims(
        ("qwen2_vl_text", 3584, 28, 18944, range(151936, 152065)), (458, 2570), "arXiv 2503.03321, appendix A.1"
    ),
)
"""LLaMA-2/Vicuna 7B and 13B, Qwen2-VL 7B."""


def known_sink_dims(text_config: Any) -> KnownSinkDims | None:
    """Return the published sink dimensions of a language model, or ``None``."""
    names = ("model_type", "hidden_size", "num_hidden_layers", "intermediate_size")
    for known in KNOWN_SINK_DIMS:
        *shape, vocab = known.shape
        if text_config.vocab_size in vocab and shape == [getattr(text_config, name) for name in names]:
            return known
    return None


def sink_dims_for(anatomy: Anatomy) -> tuple[int, ...]:
    """Return the known sink dimensions of a model, else search for them; say which in the log."""
    known = known_sink_dims(anatomy.text_config)
    if known is not None:
        logger.info("Sink dimensions %s, from %s.", known.dims, known.source)
        return known.dims
    found = find_sink_dims(anatomy.model)
    logger.info("Sink dimensions %s, found by vlmfix.find_sink_dims.", found or "none")
    return found


@torch.no_grad()
def find_sink_dims(
    model: object, input_ids: torch.Tensor | None = None, *, max_dims: int = 3, dominance: float = 5.0
) -> tuple[int, ...]:
    """Find the hidden dimensions that mark attention sinks in a language model.

    The first token of a text is a sink of any language model that has sinks. In every layer between 25 and 75 % of the
    depth, ``|x_d| / rms(x)`` of the first token is averaged over the texts. Kept are the dimensions that stand out
    ``dominance`` times above the rest in the median layer, and half as much in three quarters of those layers: some
    models drop their sinks in a layer midway and build them up again.

    Args:
        model: The vision-language model, patched or not.
        input_ids: Texts to look at, int64 ``[batch, length]``, no padding, no image tokens. Default: 8 texts of 16
            tokens that begin with the model's first token and go on at random (own seed); at a first token, massive
            activations do not depend on what follows.
        max_dims: Most dimensions to return.
        dominance: How far a dimension must stand out.

    Returns:
        The dimensions, largest first; empty when none stands out.

    Raises:
        MethodError: ``input_ids`` is not a batch of texts, or the model reads no image's tokens by self-attention.
    """
    anatomy = analyse(model)
    if "joint" not in anatomy.kinds:
        raise MethodError(
            f"find_sink_dims: {type(anatomy.model).__name__} has no self-attention over a prompt that holds the "
            "image's tokens, in which sinks could be found. Choose a method without them, such as "
            "vlmfix.patch(model, 'vhr')."
        )
    embedding = anatomy.model.get_input_embeddings()
    if input_ids is None:
        input_ids = _random_texts(anatomy)
    if input_ids.dim() != 2 or not input_ids.shape[1]:
        raise MethodError(f"find_sink_dims: input_ids must be [batch, length], got {tuple(input_ids.shape)}.")
    peaks: dict[int, torch.Tensor] = {}
    depth = len(anatomy.decoder_layers)
    watched = range(depth // 4, max(depth // 4 + 1, round(0.75 * depth)))

    def watch(layer: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            first = (args[0] if args else kwargs["hidden_states"])[..., 0, :].float()
            rms = first.square().mean(-1, keepdim=True).add(1e-6).sqrt()
            peaks[layer] = (first.abs() / rms).reshape(-1, first.shape[-1]).mean(0).cpu()

        return hook

    handles = [
        anatomy.decoder_layers[layer].register_forward_pre_hook(watch(layer), with_kwargs=True) for layer in watched
    ]
    # Asks a patched model for its stock self; a stock model is called as always.
    stock = {FORWARD_KWARG: None} if any(hasattr(site.module, SITE_ATTRIBUTE) for site in anatomy.sites) else {}
    try:
        anatomy.inner(input_ids=input_ids.to(states_device(embedding, anatomy.model)), use_cache=False, **stock)
    finally:
        for handle in handles:
            handle.remove()
    by_layer = torch.stack([peaks[layer] for layer in sorted(peaks)])
    typical, weak = by_layer.median(0).values, by_layer.sort(0).values[len(by_layer) // 4]
    rest = typical.topk(max_dims + 1).values[-1]
    standing_out = (typical >= dominance * rest) & (weak >= 0.5 * dominance * rest)
    order = typical.argsort(descending=True)[:max_dims].tolist()
    return tuple(dim for dim in order if standing_out[dim])


def _random_texts(anatomy: Anatomy) -> torch.Tensor:
    ids = torch.randint(0, anatomy.text_config.vocab_size, (8, 16), generator=torch.Generator().manual_seed(0))
    first = anatomy.text_config.bos_token_id
    if isinstance(first, int):
        ids[:, 0] = first
    for image_id in anatomy.image_token_ids:
        ids[ids == image_id] = ids[0, 0]
    return ids
