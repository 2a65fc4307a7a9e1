"""Passes over a prompt before it is read: through the stock model as it is, and without its image tokens.

Methods that ask what the image contributes compare what they see with the image-free pass. It is a short text-only
forward (tens of tokens), run once per prompt before the prompt itself; no method edits it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from vlmfix.engine.forwards import STOCK, EditedForward, StockForward, StreamRecorder
from vlmfix.engine.plan import PatchedSite
from vlmfix.errors import UnsupportedFeatureError
from vlmfix.methods.sequence import SHARED, SequenceState
from vlmfix.methods.views import Prompt
from vlmfix.model.anatomy import FORWARD_KWARG, Anatomy, image_markers
from vlmfix.model.attention import AttentionCall
from vlmfix.model.images import Encoded, blank_images
from vlmfix.model.products import fast_products
from vlmfix.model.vision_tower import VisionRecorder

NO_TEXT = "A prompt of the batch has no text beside its image, so there is nothing to compare with. Add a question."


_OF_TOKENS = frozenset({"attention_mask", "position_ids", "token_type_ids"})
"""Arguments of a text that have a number for every token."""


class HeadRecorder(StockForward):
    """Keeps the head outputs of the last ``rows`` rows of some attention modules.

    Attributes:
        head_outputs: By site index, ``[batch, rows, num_heads, head_dim]``.
    """

    def __init__(self, sites: frozenset[int], rows: int = 1) -> None:
        self.head_outputs: dict[int, torch.Tensor] = {}
        self._sites = sites
        self._rows = rows

    def attend(self, site: PatchedSite, call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Run the base kernel and keep the last rows of its output."""
        head_outputs, attn_weights = call.base()
        if site.index in self._sites:
            self.head_outputs[site.index] = head_outputs[:, -self._rows :].clone()
        return head_outputs, attn_weights


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
    # A stable sort moves what is left out to the left and keeps the rest in its order: left padding.
    order = keep.to(torch.int8).argsort(dim=1, stable=True)[:, -max(lengths) :]
    attention_mask = keep.gather(1, order)
    text: dict[str, Any] = blank_images(inputs, max(lengths))
    if is_known and input_ids is not None:
        text["input_ids"] = input_ids.gather(1, order).masked_fill(~attention_mask, 0)
    else:
        assert embeds is not None
        text["inputs_embeds"] = embeds.gather(1, order[..., None].expand(-1, -1, embeds.shape[2]))
    token_types = inputs.get("token_type_ids")
    if isinstance(token_types, torch.Tensor) and token_types.shape[1] >= length:  # PaliGemma: who sees whom
        text["token_type_ids"] = token_types[:, :length].gather(1, order)  # without a cache the answer so far follows
    text["attention_mask"] = attention_mask.long()  # all ones too: GLM-4V of transformers 4.57 cannot do without
    if min(lengths) < max(lengths):
        text["position_ids"] = (attention_mask.long().cumsum(1) - 1).clamp_min(0)
    return text


@torch.no_grad()
def read_text(anatomy: Anatomy, text: dict[str, Any], recorder: StockForward) -> None:
    """Run a text (see ``text_only_inputs``) through the stock language model; ``recorder`` sees it."""
    with positions_kept(anatomy), fast_products(anatomy.model):
        anatomy.inner(**text, use_cache=False, **{FORWARD_KWARG: recorder})


def text_only_heads(
    anatomy: Anatomy,
    sites: frozenset[int],
    state: SequenceState,
    inputs: dict[str, Any],
    embeds: torch.Tensor | None = None,
) -> dict[int, torch.Tensor]:
    """Run the prompts of a batch without their image tokens.

    Args:
        anatomy: The model.
        sites: Indices of the attention modules to record.
        state: The sequences so far, the new prompt included.
        inputs: The arguments of the prompt's forward.
        embeds: The prompt's embeddings ``[batch, length, hidden_size]``, where its ids cannot be known.

    Returns:
        By site index, head outputs at the last position, ``[batch, num_heads, head_dim]``.

    Raises:
        UnsupportedFeatureError: The text is not known, or a prompt has none.
    """
    text, recorder = text_only_inputs(anatomy, state, inputs, embeds), HeadRecorder(sites)
    copies = _leave_out_copies(text)
    read_text(anatomy, text, recorder)
    found = {index: heads[:, -1] for index, heads in recorder.head_outputs.items()}
    return found if copies is None else {index: heads[copies.to(heads.device)] for index, heads in found.items()}


def _leave_out_copies(text: dict[str, Any]) -> torch.Tensor | None:
    """Leave each text once in the arguments of a pass: beams, or one question about several images.

    Returns:
        Which of the texts left each sample had, int64 ``[batch]``; ``None`` when nothing was left out.
    """
    ids = text.get("input_ids")
    if ids is None or not text.keys() <= {"input_ids", *_OF_TOKENS}:
        return None
    # Texts are the same if all that is given per token is: ids, mask, positions, types.
    numbers: dict[tuple[int, ...], int] = {}
    rows = torch.cat([value.long() for value in text.values()], dim=1).tolist()
    copies = [numbers.setdefault(tuple(row), len(numbers)) for row in rows]
    if len(numbers) == len(rows):
        return None
    firsts = torch.tensor([copies.index(number) for number in range(len(numbers))], device=ids.device)
    text.update({name: value[firsts] for name, value in text.items()})
    return torch.tensor(copies, device=ids.device)


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


def encoded_text_only_heads(
    anatomy: Anatomy, sites: frozenset[int], encoded: Encoded, inputs: dict[str, Any], num_given: int
) -> dict[int, torch.Tensor]:
    """Let an encoder read the prompts of a batch without their image tokens, and the decoder begin its answer.

    Encoders count positions from the left, so rows are right-padded to one length.

    Args:
        anatomy: The model.
        sites: Indices of the attention modules to record.
        encoded: What the encoder has read.
        inputs: The arguments of the forward that begins the answer.
        num_given: How many of its tokens come before the first one that is predicted.

    Returns:
        By site index, head outputs at the last of these, ``[batch, num_heads, head_dim]``.

    Raises:
        UnsupportedFeatureError: A prompt has no text, or how the answer begins is not said.
    """
    names = ("decoder_input_ids", "decoder_inputs_embeds", "decoder_attention_mask")
    answer = {name: inputs[name][:, :num_given] for name in names if inputs.get(name) is not None}
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
    recorder = HeadRecorder(sites)
    read_text(anatomy, {**text, "attention_mask": keep.gather(1, order).long(), **answer}, recorder)
    return {index: heads[:, -1] for index, heads in recorder.head_outputs.items()}


def _lengths(keep: torch.Tensor) -> list[int]:
    """Return how many tokens of each prompt are kept."""
    lengths: list[int] = keep.sum(1).tolist()
    if min(lengths) == 0:
        raise UnsupportedFeatureError(NO_TEXT)
    return lengths


# What methods may look at before a prompt is read.


def begin_methods(
    anatomy: Anatomy,
    model: nn.Module,
    forward: EditedForward,
    inputs: dict[str, Any],
    vision: VisionRecorder | None,
    embeds: torch.Tensor | None = None,
) -> None:
    """Let methods look at a prompt before it is read; what they learn becomes ``layer.shared``.

    Args:
        anatomy: The model.
        model: The model with a language-model head that ``inputs`` are for.
        forward: The forward that is about to begin.
        inputs: Its arguments.
        vision: What the vision tower attended to, for methods that ask for it.
        embeds: The prompt's embeddings ``[batch, length, hidden_size]``, where its ids cannot be known.
    """
    if not forward.state.any_image:
        return

    def first_logits() -> torch.Tensor:
        logits = _read_prompt(model, forward, inputs, STOCK).logits
        return (forward.at_last_position(logits) if logits.shape[1] == forward.q_len else logits[:, -1]).float()

    def patch_attention() -> dict[int, torch.Tensor]:
        assert vision is not None
        return vision.patch_attention()

    def last_states() -> dict[int, torch.Tensor]:
        recorder = StreamRecorder(forward.at_last_position)
        _read_prompt(model, forward, inputs, recorder)
        return recorder.states

    def last_states_text_only() -> dict[int, torch.Tensor]:
        recorder = StreamRecorder(lambda states: states[:, -1])
        markers = image_markers(anatomy.model.config)
        read_text(anatomy, text_only_inputs(anatomy, forward.state, inputs, embeds, without=markers), recorder)
        return recorder.states

    for index, method in enumerate(forward.methods):
        if method.reads_prompt and not method.is_identity:
            known = forward.state.learned.get((index, SHARED))
            forward.state.learned[index, SHARED] = method.begin(
                Prompt(forward, first_logits, patch_attention, last_states, last_states_text_only, known)
            )


@torch.no_grad()
def _read_prompt(model: nn.Module, forward: EditedForward, inputs: dict[str, Any], stand_in: StockForward) -> Any:
    """Run a prompt through the stock model before its own forward, and leave its cache as it was: the output."""
    # An empty cache need not be copied; the pass then runs without one.
    cache = inputs.get("past_key_values")
    if not forward.past and not getattr(cache, "is_compileable", False):  # masks are made for a static cache's length
        cache = None
    left_out = {"labels", "output_attentions"}
    # Where an answer follows, or logits are asked for by position, the last ones are not those of the prompt.
    if forward.q_len != forward.prompt_len or isinstance(inputs.get("logits_to_keep"), torch.Tensor):
        left_out.add("logits_to_keep")
    options = {
        **{name: value for name, value in inputs.items() if name not in left_out},
        "past_key_values": copy.deepcopy(cache),  # the prompt itself must find it as it was
        "use_cache": cache is not None,
        "return_dict": True,
        FORWARD_KWARG: stand_in,
    }
    return model(**options)
