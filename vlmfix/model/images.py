"""Finds which tokens of a forward are image tokens: by ids, by embeddings, or by who may look at an image."""

from __future__ import annotations

import re
import threading
from collections import deque
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from vlmfix.errors import UnsupportedFeatureError
from vlmfix.model.anatomy import Anatomy
from vlmfix.model.uncopied import Uncopied


def of_new_tokens(per_token: torch.Tensor, past: int, q_len: int) -> torch.Tensor:
    """Return the columns of ``[batch, tokens, ...]`` that belong to the ``q_len`` new tokens behind ``past`` others.

    Given are those of all tokens, of as many as a static cache has room for, or of the new ones alone.
    """
    return per_token[:, past : past + q_len] if per_token.shape[1] >= past + q_len else per_token[:, -q_len:]


def attended_keys(attention_mask: Any, past: int, q_len: int, like: torch.Tensor) -> torch.Tensor:
    """Read from a model's attention mask which of the new tokens are no padding.

    Args:
        attention_mask: 2-D (nonzero = token), 4-D (bool or additive, as ``generate`` prepares it for static caches),
            a dict of those by layer type, a flex-attention block mask, or ``None``.
        past: Tokens in the cache.
        q_len: New tokens.
        like: A tensor ``[batch, q_len]`` on the device wanted.

    Returns:
        Bool ``[batch, q_len]``: the tokens that some query may see, other than those alone with themselves.
    """
    if isinstance(attention_mask, dict):
        attention_mask = attention_mask.get("full_attention", next(iter(attention_mask.values()), None))
    if attention_mask is None:
        return torch.ones_like(like, dtype=torch.bool)
    if not isinstance(attention_mask, torch.Tensor):
        rows = torch.arange(past + q_len, device=like.device)[past:]
        attended = block_mask_rows(attention_mask, like.shape[0], rows, rows).any(2)[:, 0]
    elif attention_mask.dim() == 2:
        attended = of_new_tokens(attention_mask, past, q_len).bool()
    else:
        past = min(past, attention_mask.shape[3] - q_len)  # a sliding cache has dropped what was before
        pairs = attention_mask[:, 0, :, : past + q_len]
        pairs = pairs if pairs.dtype == torch.bool else pairs > torch.finfo(pairs.dtype).min / 2
        attended = pairs[..., past:].any(1)
        if past + q_len > 1:  # padding may see itself, so that no row of a softmax is empty
            others = pairs & ~torch.ones_like(pairs[0]).triu(past).tril(past)
            attended &= others[..., past:].any(1) | others.any(2)
    return attended.to(like.device).expand(like.shape)


def block_mask_rows(mask: Any, batch: int, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Evaluate the rule behind a flex-attention block mask for some rows: bool ``[batch, 1, rows, keys]``."""
    samples = torch.arange(batch, device=rows.device)[:, None, None, None]
    head = torch.zeros_like(samples)
    allowed: torch.Tensor = mask.mask_mod(samples, head, rows[:, None], columns)
    return allowed.expand(batch, 1, rows.shape[0], columns.shape[0])


REMEMBERED = 4
"""How many batches of image features and of encoded prompts are kept per thread: branches of a contrast take turns."""


LEADING = 8
"""How many leading components of a vector are compared first."""


class Encoded(NamedTuple):
    """A batch of prompts that an encoder has read.

    Attributes:
        leading: Leading components of its output, ``[batch, encoded, LEADING]``: recognises it.
        image_mask: bool ``[batch, encoded]``: image tokens.
        valid_mask: bool ``[batch, encoded]``: tokens that are no padding.
        tokens: What the encoder read: ids ``[batch, encoded]`` or embeddings ``[batch, encoded, hidden_size]``.
    """

    leading: torch.Tensor
    image_mask: torch.Tensor
    valid_mask: torch.Tensor
    tokens: torch.Tensor

    def expanded(self, times: int) -> Encoded:
        """Repeat every prompt for its beams."""
        return Encoded(*(each.repeat_interleave(times, 0) for each in self))


class ImageFinder:
    """Finds image tokens, and remembers what ``generate`` does to a prompt before any patched forward.

    Some models merge image features into the embeddings of a prompt inside ``generate``. Image tokens are then the rows
    that equal one of the last features that left the projector, in the same thread. Where an encoder reads the prompt,
    its mask is kept until the decoder comes with the encoder's output.
    """

    def __init__(self, anatomy: Anatomy) -> None:
        self._anatomy = anatomy
        self._features: Uncopied[int, deque[torch.Tensor]] = Uncopied()
        self._encoded: Uncopied[int, deque[Encoded]] = Uncopied()

    def attach(self) -> list[Any]:
        """Register the hooks and return their handles."""
        handles = []
        if self._anatomy.projector is not None:
            handles.append(self._anatomy.projector.register_forward_hook(self.after_projector))
        if self._anatomy.encoder is not None:
            handles.append(self._anatomy.encoder.register_forward_hook(self.after_encoder, with_kwargs=True))
        return handles

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def after_projector(self, module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
        """Remember image features."""
        known = self._features.setdefault(threading.get_ident(), deque(maxlen=REMEMBERED))
        known.appendleft(output.detach().reshape(-1, output.shape[-1]))

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def after_encoder(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Remember where the images of an encoded prompt are."""
        inputs = {"input_ids": args[0], **kwargs} if args else kwargs
        known = self._encoded.setdefault(threading.get_ident(), deque(maxlen=REMEMBERED))
        known.appendleft(self._as_encoded(inputs, output[0].detach()))

    def find(self, inputs: dict[str, Any], *, past: int, is_inside: bool, must_know: bool = True) -> torch.Tensor:
        """Find the image tokens of a forward.

        Args:
            inputs: The forward's arguments by name.
            past: Tokens in the cache.
            is_inside: Whether the forward is that of a language model inside the vision-language model.
            must_know: Whether it is an error if they cannot be told from the arguments; else there are none.

        Returns:
            Bool ``[batch, length]``.

        Raises:
            UnsupportedFeatureError: They cannot be told from the arguments.
        """
        ids, embeds = inputs.get("input_ids"), inputs.get("inputs_embeds")
        if not self._anatomy.image_token_ids:
            return first_looks(inputs, past)
        has_pictures = bool(past and "image" in self._anatomy.kinds) or brings_pictures(inputs)
        try:
            return self._among_tokens(ids, embeds, has_pictures, is_inside=is_inside, past=past)
        except UnsupportedFeatureError:
            if must_know or embeds is None:
                raise
            return torch.zeros(embeds.shape[:2], dtype=torch.bool, device=embeds.device)

    def find_encoded(self, inputs: dict[str, Any], *, is_inside: bool) -> Encoded:
        """Find out what an encoder reads or has read, by the arguments of the forward that begins an answer.

        Raises:
            UnsupportedFeatureError: The images cannot be told from the arguments.
        """
        encoded = inputs.get("encoder_outputs")
        if encoded is not None:
            return self._of_encoded(encoded[0])
        return self._as_encoded(inputs, is_inside=is_inside)

    def _as_encoded(
        self, inputs: Mapping[str, Any], states: torch.Tensor | None = None, *, is_inside: bool = True
    ) -> Encoded:
        input_ids, embeds = inputs.get("input_ids"), inputs.get("inputs_embeds")
        image_mask = self._among_tokens(input_ids, embeds, brings_pictures(inputs), is_inside=is_inside)
        valid_mask = attended_keys(inputs.get("attention_mask"), 0, image_mask.shape[1], image_mask)
        tokens = embeds if input_ids is None else input_ids
        assert tokens is not None
        leading = tokens[..., :0] if states is None else states[..., :LEADING].clone()
        return Encoded(leading, image_mask & valid_mask, valid_mask, tokens.detach())

    def _among_tokens(
        self,
        input_ids: torch.Tensor | None,
        embeds: torch.Tensor | None,
        has_pictures: bool,
        *,
        is_inside: bool,
        past: int = 0,
    ) -> torch.Tensor:
        """Find image tokens; without a picture, the model reads a placeholder as a word, be it id or embedding."""
        ids = self._anatomy.image_token_ids
        if input_ids is not None and not has_pictures:
            return torch.zeros_like(input_ids, dtype=torch.bool)
        if input_ids is not None:
            mask: torch.Tensor = input_ids == ids[0]
            for other in ids[1:]:
                mask = mask | (input_ids == other)
            return mask
        assert embeds is not None
        embedding: Any = self._anatomy.language_model.get_input_embeddings()
        if is_inside and self._anatomy.projector is not None:
            for features in self._features.get(threading.get_ident(), ()):
                mask = rows_among(embeds, features)
                if bool(mask.any()):
                    return mask
            if past:
                return torch.zeros(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
        else:
            rows = embedding(torch.tensor(ids, device=embeds.device).clamp_max(embedding.num_embeddings - 1))
            mask = (embeds[:, :, None] == rows.to(embeds)).all(-1).any(-1)
            if (is_inside or has_pictures) and bool(mask.any()):
                return mask
        if _are_words(embeds, embedding):
            return torch.zeros(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
        raise UnsupportedFeatureError(
            "The model was called with inputs_embeds that hold no image placeholder, so vlmfix cannot tell which "
            "of them are image tokens. Pass input_ids and pixel_values and let the model merge them, or call "
            "vlmfix.unpatch(model) first."
        )

    def _of_encoded(self, states: torch.Tensor) -> Encoded:
        leading = states.detach()[..., :LEADING]
        for known in self._encoded.get(threading.get_ident(), ()):
            times, rest = divmod(leading.shape[0], known.leading.shape[0])
            if rest or leading.shape[1] != known.leading.shape[1]:
                continue
            if torch.equal(known.leading.repeat_interleave(times, 0).to(leading), leading):  # beams
                return known.expanded(times)
        raise UnsupportedFeatureError(
            "The model was called with encoder_outputs that vlmfix did not see being made (in this thread, since the "
            "model was patched), so it cannot tell where the image is. Pass input_ids and pixel_values."
        )


def rows_among(embeds: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """Return which vectors ``[batch, length, size]`` equal one of ``[n, size]``: bool ``[batch, length]``."""
    features = features.to(embeds.device, embeds.dtype)
    mask = torch.zeros(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
    for row, tokens in enumerate(embeds):
        # A few components decide nearly always, so that no [length, n, size] is made.
        alike = (tokens[:, None, :LEADING] == features[None, :, :LEADING]).all(-1)
        token, feature = alike.nonzero(as_tuple=True)
        mask[row, token[(tokens[token] == features[feature]).all(-1)]] = True
    return mask


def blank_images(inputs: dict[str, Any], length: int) -> dict[str, Any]:
    """Return image arguments for ``length`` tokens without an image, for models that insist on some (Idefics)."""
    looks = inputs.get("image_attention_mask")
    if looks is None or looks.dim() != 3:  # Phi-4's is of patches
        return {}
    names = ("pixel_values", "image_encoder_embeddings", "perceiver_embeddings")
    images = {name: torch.zeros_like(inputs[name][:, :1]) for name in names if inputs.get(name) is not None}
    return {**images, "image_attention_mask": looks.new_zeros(looks.shape[0], length, 1)}


def first_looks(inputs: dict[str, Any], past: int) -> torch.Tensor:
    """Find images that no token stands for, by the rows at which other images come into view."""
    tokens = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"]
    looks = inputs.get("image_attention_mask")
    if looks is None:
        return torch.zeros(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
    q_len = tokens.shape[1]
    sees = looks[:, -q_len:].bool()
    attention_mask = inputs.get("attention_mask")
    if isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2:
        sees = sees & of_new_tokens(attention_mask, past, q_len)[..., None].bool()
    # An image comes into view at the row that sees it and whose predecessor did not. Of a further turn, the first row
    # counts as continued.
    before = torch.cat([sees[:, :1] if past else torch.zeros_like(sees[:, :1]), sees[:, :-1]], dim=1)
    comes_into_view: torch.Tensor = (sees & ~before).any(-1)
    return comes_into_view


_PICTURES = re.compile("pixel|image|video|vision|visual|mm_encoder|cross_attention_states|perceiver|patches")


def brings_pictures(inputs: Mapping[str, Any]) -> bool:
    """Whether a call has pictures among its arguments: pixels or features of any name, encoded or not."""
    given = (value for name, value in inputs.items() if _PICTURES.search(name))
    return any(isinstance(value, (torch.Tensor, list, tuple, Mapping)) and len(value) > 0 for value in given)


@torch.no_grad()
def _are_words(embeds: torch.Tensor, embedding: Any) -> bool:
    """Whether all vectors are what a model's embedding makes of words: a prompt without an image."""
    # It is called, not read: its weights may be offloaded, quantised or scaled.
    ids = torch.arange(embedding.num_embeddings, device=embeds.device)
    table = torch.cat([embedding(part)[:, :LEADING] for part in torch.split(ids, 4096)])
    rows = embeds[..., :LEADING].detach().reshape(-1, LEADING).to(table)
    # If no row is new to the table, the number of distinct rows stays the same.
    known = torch.unique(table, dim=0)
    return len(torch.unique(torch.cat([known, rows]), dim=0)) == len(known)
