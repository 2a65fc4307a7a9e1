"""What methods may look at before a prompt is read: the stock model's answer, the vision tower's attention."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch

from vlmfix.engine.forwards import EditedForward, StreamRecorder
from vlmfix.engine.image_free import read_text, text_only_inputs
from vlmfix.methods.sequence import SHARED
from vlmfix.methods.views import Prompt
from vlmfix.model.anatomy import FORWARD_KWARG, image_markers

if TYPE_CHECKING:
    from torch import nn

    from vlmfix.model.anatomy import Anatomy
    from vlmfix.model.vision_tower import VisionRecorder


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
        return _first_logits(model, forward, inputs)

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


def _first_logits(model: nn.Module, forward: EditedForward, inputs: dict[str, Any]) -> torch.Tensor:
    logits = _read_prompt(model, forward, inputs, None)
    if forward.state.in_encoder:
        return logits[:, -1].float()
    if logits.shape[1] == forward.q_len:
        return forward.at_last_position(logits).float()
    return logits[:, forward.prompt_len - forward.q_len - 1].float()


@torch.no_grad()
def _read_prompt(
    model: nn.Module, forward: EditedForward, inputs: dict[str, Any], stand_in: StreamRecorder | None
) -> torch.Tensor:
    """Run a prompt through the stock model before its own forward, and leave its cache as it was: the logits."""
    # An empty cache need not be copied; the pass then runs without one.
    cache = inputs.get("past_key_values")
    if not forward.past and not getattr(cache, "is_compileable", False):  # masks are made for a static cache's length
        cache = None
    options = {
        **{name: value for name, value in inputs.items() if name not in ("labels", "output_attentions")},
        "past_key_values": copy.deepcopy(cache),  # the prompt itself must find it as it was
        "use_cache": cache is not None,
        "return_dict": True,
        FORWARD_KWARG: stand_in,
    }
    logits: torch.Tensor = model(**options).logits
    return logits
