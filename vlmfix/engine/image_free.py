"""The image-free stream: the same prompt without its image tokens, through the same language model.

Methods that ask what the image contributes (VHR) compare their head outputs with those of this stream. It is a short
text-only forward (tens of tokens), run once per prompt before the prompt itself. In ``"edited"`` mode the stream also
carries the edits: it is then advanced layer by layer beside the prompt, since the heads of a layer are chosen only when
the prompt reaches it.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from vlmfix.errors import UnsupportedFeatureError
from vlmfix.model.anatomy import FORWARD_KWARG
from vlmfix.model.attention import AttentionCall
from vlmfix.model.images import blank_images

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from vlmfix.engine.plan import Site
    from vlmfix.engine.stream import StreamRecorder
    from vlmfix.methods.base import Method
    from vlmfix.methods.views import Forward, Layer, SequenceState
    from vlmfix.model.anatomy import Anatomy
    from vlmfix.model.images import Encoded


_OF_TOKENS = frozenset({"attention_mask", "position_ids", "token_type_ids"})
"""Arguments of a text that have a number for every token."""


class TextOnlyForward:
    """A forward over the prompts without their images; takes the place of a ``Forward`` in the keyword arguments.

    Attributes:
        head_outputs: Per site index, head outputs at the last position, ``[batch, num_heads, head_dim]``.
    """

    def __init__(self, wanted: frozenset[int], *, edited: bool) -> None:
        self.head_outputs: dict[int, torch.Tensor] = {}
        self._wanted = wanted
        self._edited = edited
        self._frozen: dict[int, list[tuple[Method, Layer]]] = {}
        self._calls: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        self._hidden_states: torch.Tensor | None = None

    def distinct(self, text: dict[str, Any]) -> torch.Tensor | None:
        """Leave each text once in the arguments of the pass: beams, or one question about several images.

        Returns:
            Which of the texts left each sample had, int64 ``[batch]``; ``None`` when nothing was left out.
        """
        ids = text.get("input_ids")
        if self._edited or ids is None or not text.keys() <= {"input_ids", *_OF_TOKENS}:
            return None
        numbers: dict[tuple[int, ...], int] = {}
        rows = torch.cat([value.long() for value in text.values()], dim=1).tolist()
        copies = [numbers.setdefault(tuple(row), len(numbers)) for row in rows]
        if len(numbers) == len(rows):
            return None
        firsts = torch.tensor([copies.index(number) for number in range(len(numbers))], device=ids.device)
        text.update({name: value[firsts] for name, value in text.items()})
        return torch.tensor(copies, device=ids.device)

    def before_layer(self, site: Site, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Remember how the language model calls this layer, to advance the stream by hand later."""
        if self._edited and site.index not in self._calls:
            self._calls[site.index] = (args, kwargs)

    def after_layer(self, site: Site) -> None:
        """Nothing follows a layer of the stream itself."""

    def attend(self, site: Site, call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Run the base kernel, record the last position, and apply the heads frozen by the prompt, if any yet."""
        head_outputs, attn_weights = call.base()
        if site.index in self._wanted:
            self.head_outputs[site.index] = head_outputs[:, -1].clone()
        for method, layer in self._frozen.get(site.index, ()):
            head_outputs = method.reapply_heads(head_outputs, layer)
        return head_outputs, attn_weights

    # Beside the prompt's own forward, in "edited" mode.

    def before_layer_of_image_run(self, site: Site) -> None:
        """Advance through this layer without edits of its own: its heads are compared before they are chosen."""
        if self._edited and site.index in self._wanted:
            self._advance(site)

    def after_layer_of_image_run(self, site: Site, forward: Forward) -> None:
        """Leave this layer, with the edits the prompt has just chosen for it."""
        if not self._edited or site.index not in self._calls:  # without an image, some layers are skipped
            return
        self._frozen[site.index] = [
            (method, forward.layer(site, index)) for index, method in site.heads if method.text_only_stream == "edited"
        ]
        self._hidden_states = self._advance(site)

    @torch.no_grad()
    def _advance(self, site: Site) -> torch.Tensor:
        args, kwargs = self._calls[site.index]
        if self._hidden_states is not None:
            args, kwargs = _with_hidden_states(self._hidden_states, args, kwargs)
        output = site.decoder_layer(*args, **kwargs)
        hidden_states: torch.Tensor = output[0] if isinstance(output, tuple) else output
        return hidden_states


def _with_hidden_states(
    hidden_states: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if args:
        return (hidden_states, *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": hidden_states}


def text_only_inputs(
    anatomy: Anatomy,
    state: SequenceState,
    inputs: dict[str, Any],
    embeds: torch.Tensor | None = None,
    *,
    without: Sequence[int] = (),
) -> dict[str, Any]:
    """Return the arguments of a forward over the prompts of a batch without their image tokens.

    Kept are all other tokens, in order, with contiguous positions from 0; rows are left-padded to one length. Where no
    token stands for an image (Idefics), all tokens are kept and none of them sees the image.

    Args:
        anatomy: The model.
        state: The sequences so far, the new prompt included.
        inputs: The arguments of the prompt's forward.
        embeds: The prompt's embeddings ``[batch, length, hidden_size]``, where its ids cannot be known.
        without: Further ids to leave out.

    Raises:
        UnsupportedFeatureError: The text is not known, or a prompt has none.
    """
    input_ids, length = state.input_ids, state.image_mask.shape[1]
    is_known = input_ids is not None and not bool((input_ids < 0).any())
    if not is_known and (embeds is None or embeds.shape[1] < length):
        raise UnsupportedFeatureError(
            "This method compares the prompt with and without its image and needs the token ids of the whole "
            "conversation. Pass input_ids (not inputs_embeds), and start with an empty cache."
        )
    keep = state.valid_mask & ~state.image_mask if anatomy.image_token_ids else state.valid_mask
    if without and is_known and input_ids is not None:
        keep = keep & ~torch.isin(input_ids, torch.tensor(without, device=input_ids.device))
    lengths = _lengths(keep)
    order = keep.to(torch.int8).argsort(dim=1, stable=True)[:, -max(lengths) :]
    attention_mask = keep.gather(1, order)
    text: dict[str, Any] = blank_images(inputs, max(lengths))
    if is_known and input_ids is not None:
        text["input_ids"] = input_ids.gather(1, order).masked_fill(~attention_mask, 0)
    else:
        assert embeds is not None
        text["inputs_embeds"] = embeds.gather(1, order[..., None].expand(-1, -1, embeds.shape[2]))
    token_types = inputs.get("token_type_ids")
    if isinstance(token_types, torch.Tensor) and token_types.shape == keep.shape:  # PaliGemma: who sees whom
        text["token_type_ids"] = token_types.gather(1, order)
    if min(lengths) < max(lengths):
        text["attention_mask"] = attention_mask.long()
        text["position_ids"] = (attention_mask.long().cumsum(1) - 1).clamp_min(0)
    return text


@torch.no_grad()
def run_text_only(
    anatomy: Anatomy,
    sites: Sequence[Site],
    state: SequenceState,
    inputs: dict[str, Any],
    embeds: torch.Tensor | None = None,
) -> TextOnlyForward | None:
    """Run the prompts of a batch without their image tokens, see ``text_only_inputs``.

    Args:
        anatomy: The model.
        sites: The patched sites.
        state: The sequences so far, the new prompt included.
        inputs: The arguments of the prompt's forward.
        embeds: The prompt's embeddings ``[batch, length, hidden_size]``, where its ids cannot be known.

    Returns:
        The recorded stream, or ``None`` when no method at these sites asks for it.

    Raises:
        UnsupportedFeatureError: The text is not known, or a prompt has none.
    """
    stream = _stream(sites)
    if stream is None:
        return None
    text = text_only_inputs(anatomy, state, inputs, embeds)
    copies = stream.distinct(text)
    with positions_kept(anatomy):
        anatomy.inner(**text, use_cache=False, **{FORWARD_KWARG: stream})
    if copies is not None:
        stream.head_outputs = {index: heads[copies.to(heads.device)] for index, heads in stream.head_outputs.items()}
    return stream


@torch.no_grad()
def run_image_free(
    anatomy: Anatomy,
    state: SequenceState,
    inputs: dict[str, Any],
    embeds: torch.Tensor | None,
    stand_in: TextOnlyForward | StreamRecorder,
    *,
    without: Sequence[int] = (),
) -> None:
    """Run the prompts of a batch without their image tokens, see ``text_only_inputs``; ``stand_in`` records."""
    text = text_only_inputs(anatomy, state, inputs, embeds, without=without)
    with positions_kept(anatomy):
        anatomy.inner(**text, use_cache=False, **{FORWARD_KWARG: stand_in})


@contextmanager
def positions_kept(anatomy: Anatomy) -> Iterator[None]:
    """Keep what older Qwen-VL and GLM-V models remember of the last prompt's positions on the model itself."""
    owners = [module for module in dict.fromkeys([anatomy.model, anatomy.inner]) if "rope_deltas" in vars(module)]
    kept = [vars(module)["rope_deltas"] for module in owners]
    try:
        yield
    finally:
        for module, deltas in zip(owners, kept, strict=True):
            vars(module)["rope_deltas"] = deltas


@torch.no_grad()
def encode_text_only(
    anatomy: Anatomy, sites: Sequence[Site], encoded: Encoded, inputs: dict[str, Any]
) -> TextOnlyForward | None:
    """Let an encoder read the prompts of a batch without their image tokens, and the decoder begin its answer.

    Encoders count positions from the left, so rows are right-padded to one length.

    Args:
        anatomy: The model.
        sites: The patched sites.
        encoded: What the encoder has read.
        inputs: The arguments of the forward that begins the answer.

    Returns:
        The recorded stream, or ``None`` when no method at these sites asks for it.

    Raises:
        UnsupportedFeatureError: A prompt has no text, or how the answer begins is not said.
    """
    stream = _stream(sites)
    if stream is None:
        return None
    names = ("decoder_input_ids", "decoder_inputs_embeds", "decoder_attention_mask")
    answer = {name: inputs[name] for name in names if inputs.get(name) is not None}
    if "decoder_input_ids" not in answer and "decoder_inputs_embeds" not in answer:
        raise UnsupportedFeatureError(
            "This method compares how the answer begins with and without the image. Pass decoder_input_ids."
        )
    keep = encoded.valid_mask & ~encoded.image_mask
    lengths = _lengths(keep)
    order = (~keep).to(torch.int8).argsort(dim=1, stable=True)[:, : max(lengths)]
    if encoded.tokens.dim() == 2:
        text = {"input_ids": encoded.tokens.gather(1, order)}
    else:
        text = {"inputs_embeds": encoded.tokens.gather(1, order[..., None].expand(-1, -1, encoded.tokens.shape[2]))}
    text["attention_mask"] = keep.gather(1, order).long()
    anatomy.inner(**text, **answer, use_cache=False, **{FORWARD_KWARG: stream})
    return stream


def _stream(sites: Sequence[Site]) -> TextOnlyForward | None:
    modes = {site.index: {method.text_only_stream for _, method in site.heads} - {None} for site in sites}
    wanted = frozenset(index for index, asked in modes.items() if asked)
    return TextOnlyForward(wanted, edited=any("edited" in asked for asked in modes.values())) if wanted else None


def _lengths(keep: torch.Tensor) -> list[int]:
    """How many tokens of each prompt are kept."""
    lengths: list[int] = keep.sum(1).tolist()
    if min(lengths) == 0:
        raise UnsupportedFeatureError(
            "A prompt of the batch has no text beside its image, so there is nothing to compare with. Add a question."
        )
    return lengths
