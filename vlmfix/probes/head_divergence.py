"""Head divergence: how far each head's output moves when the image is taken away (VHD and T-VHD, arXiv 2412.13949)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vlmfix.engine.prompt_pass import HeadRecorder, read_text, text_only_inputs
from vlmfix.errors import MethodError, UnsupportedFeatureError
from vlmfix.methods.sequence import SequenceState
from vlmfix.methods.vhr import divergent_heads, vision_divergence
from vlmfix.methods.views import Layer
from vlmfix.observe.ask import Answered, Answers, Subject, look_at
from vlmfix.observe.watch import HeadWatch
from vlmfix.observe.words import prompt_tokens
from vlmfix.probes.result import ProbeResult


@dataclass(frozen=True, eq=False)
class HeadDivergence(ProbeResult):
    """VHD of every head at every answer token, and T-VHD.

    Attributes:
        divergence: fp32 ``[batch, steps, layers, num_heads]``: Euclidean distance between a head's output with and
            without the image, in the row that predicts token ``steps`` (eq. 4). Step 0 is the prompt's last row, where
            VHR chooses its heads. NaN behind a sample's last token; 0 for a sample without an image.
        selected: Bool ``[batch, layers, num_heads]``: the heads VHR would choose (eqs. 6 and 7).
        token_divergence: fp32 ``[batch, steps]``: T-VHD, the ``top_k`` largest divergences of each layer, summed over
            layers (eq. 5).
        top_k: See there; the paper does not state it.
        tokens: The answers' ids.
    """

    divergence: torch.Tensor
    selected: torch.Tensor
    token_divergence: torch.Tensor
    top_k: int
    tokens: tuple[tuple[int, ...], ...]

    def factors(self) -> list[list[float]]:
        """Return each head's mean divergence relative to that of its layer, ``[layers][num_heads]`` (ours).

        As ``head_factors`` of ``FIA``, in a model of which all layers were looked at; 1 where nothing diverges.
        """
        mean = self.divergence.nanmean((0, 1))
        of_layer = mean.mean(1, keepdim=True)
        found: list[list[float]] = torch.where(of_layer > 0, mean / of_layer, 1.0).tolist()
        return found

    def plot(self, ax: Any = None, *, sample: int = 0, step: int = 0, **options: Any) -> Any:
        """Draw the heads of one sample at one step as a map of layers and heads."""
        title = f"head divergence, token {step}"
        return self._map(ax, self.divergence[sample, step], xlabel="head", label="VHD", title=title)


class HeadLog:
    """Head outputs in the rows that predict the answer.

    Attributes:
        outputs: By layer, per step: fp32 ``[batch, num_heads, head_dim]`` on the CPU. Empty without any image.
        site_of: By layer, the index of its attention module.
        eps: Rounding of the model's dtype.
    """

    def __init__(self) -> None:
        self.outputs: dict[int, list[torch.Tensor]] = {}
        self.site_of: dict[int, int] = {}
        self.eps = 0.0

    def see(self, head_outputs: torch.Tensor, layer: Layer) -> None:
        """Copy the last row of each sample: methods may scale it in place."""
        forward, at = layer.forward, layer.site.layer_idx
        row = forward.at_last_position(head_outputs) if forward.is_prefill else head_outputs[:, -1]
        self.site_of[at], self.eps = layer.site.index, torch.finfo(head_outputs.dtype).eps
        self.outputs.setdefault(at, []).append(row.to("cpu", torch.float32, copy=True))


@torch.no_grad()
def head_divergence(
    model: object,
    inputs: Mapping[str, Any],
    *,
    layers: Sequence[int] | str | None = None,
    max_new_tokens: int = 1,
    answers: Answers | None = None,
    top_k: int = 8,
) -> HeadDivergence:
    """Measure how far every head's output moves when the image is taken away.

    The prompt without its image tokens, followed by the same answer, is run once more (the image-free pass of VHR,
    always the stock model). On a patched model the outputs with the image carry the edits of the layers below, and are
    taken before a method scales them in their own layer, as VHR itself sees them.

    Args:
        model: The model, patched or not.
        inputs: What ``model.generate`` takes, left-padded.
        layers: Layers to look at, see ``LayerSpec``. Default: all.
        max_new_tokens: Length of the greedy answer to follow; 1 looks at the prompt alone.
        answers: Ids to follow instead of the model's own.
        top_k: Heads per layer that count for T-VHD.

    Raises:
        UnsupportedFeatureError: See ``look_at``; or the image-free pass over an answer is not causal (PaliGemma).
        MethodError: ``top_k`` below 1, or ``layers`` or ``answers`` that fit no such model.
    """
    if top_k < 1:
        raise MethodError(f"top_k must be at least 1, got {top_k}.")
    subject = look_at(model, "head_divergence", inputs)
    wanted = subject.layers(layers)
    log = HeadLog()
    watch = HeadWatch(log.see, layers=wanted)
    answered = subject.answer(inputs, watch, max_new_tokens=max_new_tokens, answers=answers)
    if log.outputs:
        with subject.acting(watch):
            without = _image_free(subject, log, inputs, answered)
        has_image = prompt_tokens(subject.anatomy, inputs).image.any(1).cpu()
        divergence, selected = _compare(log, without, has_image, wanted)
    else:  # no image in the whole batch: nothing was compared
        shape = (len(answered.tokens), len(wanted), subject.anatomy.num_heads)
        divergence, selected = torch.zeros(shape)[:, None].repeat(1, answered.steps, 1, 1), torch.zeros(shape).bool()
    divergence = divergence.masked_fill(answered.behind[..., None, None], float("nan"))
    top = divergence.topk(min(top_k, divergence.shape[-1]), dim=-1).values
    return HeadDivergence(
        wanted, subject.patch, divergence, selected, top.sum((2, 3)), top_k=top_k, tokens=answered.tokens
    )


def _image_free(
    subject: Subject, log: HeadLog, inputs: Mapping[str, Any], answered: Answered
) -> dict[int, torch.Tensor]:
    """Run prompts and answers without their image tokens: by layer, ``[batch, steps, num_heads, head_dim]``."""
    recorder = HeadRecorder(frozenset(log.site_of.values()), answered.steps)
    read_text(subject.anatomy, image_free_inputs(subject, inputs, answered), recorder)
    return {at: recorder.head_outputs[site].float().cpu() for at, site in log.site_of.items()}


def _compare(
    log: HeadLog, without: Mapping[int, torch.Tensor], has_image: torch.Tensor, layers: tuple[int, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the divergence ``[batch, steps, layers, num_heads]``, and VHR's heads ``[batch, layers, num_heads]``."""
    by_layer, chosen = [], []
    for at in layers:
        with_image = torch.stack(log.outputs[at], dim=1)[:, : without[at].shape[1]]
        by_layer.append(vision_divergence(with_image, without[at], log.eps))
        chosen.append(divergent_heads(with_image[:, 0], without[at][:, 0], eps=log.eps))
    divergence = torch.stack(by_layer, dim=2) * has_image[:, None, None, None]
    return divergence, torch.stack(chosen, dim=1) & has_image[:, None, None]


def image_free_inputs(subject: Subject, inputs: Mapping[str, Any], answered: Answered) -> dict[str, Any]:
    """Return the arguments of a forward over prompts without image tokens, followed by all answer tokens but the last.

    Answers that are shorter than others are filled up, so that the last ``steps`` rows predict the answers' tokens.

    Raises:
        UnsupportedFeatureError: Answers of several tokens behind a prompt that sees itself in both directions.
    """
    more = answered.steps - 1
    if more and subject.model.config.model_type.startswith("paligemma"):
        raise UnsupportedFeatureError(
            "PaliGemma's prompt sees itself in both directions, so an answer behind it cannot be read in one forward "
            "without its image. Use max_new_tokens=1."
        )
    rows = [[*each[:more], *[0] * (more - len(each[:more]))] for each in answered.tokens]
    prompt, tokens = inputs["input_ids"], prompt_tokens(subject.anatomy, inputs)
    ids = torch.tensor(rows, dtype=prompt.dtype, device=prompt.device).reshape(len(rows), more)
    is_image = torch.zeros_like(ids, dtype=torch.bool)
    whole = SequenceState(
        (),
        torch.cat([tokens.image, is_image], dim=1),
        torch.cat([tokens.valid, ~is_image], dim=1),
        torch.cat([prompt, ids], dim=1),
        any_image=True,
    )
    types = inputs.get("token_type_ids")
    extra = {} if types is None else {"token_type_ids": torch.cat([types, torch.zeros_like(ids)], dim=1)}
    return text_only_inputs(subject.anatomy, whole, extra)
