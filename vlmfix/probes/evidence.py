"""What speaks for every word of an answer: the image, or the words alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from vlmfix.errors import MethodError
from vlmfix.observe.ask import Answered, Answers, Subject, look_at, stock_logits
from vlmfix.probes.head_divergence import image_free_inputs
from vlmfix.probes.image_attention import attention_to_image
from vlmfix.probes.knockout import Cut
from vlmfix.probes.result import ProbeResult, new_axis
from vlmfix.probes.spans import find_spans

DOUBT_THRESHOLD = 0.4
"""From which doubt on a word is flagged: best F1 on the testbed's calibration split (``evals/testbed/doubt.py``)."""


@dataclass(frozen=True, eq=False)
class Evidence(ProbeResult):
    """Probabilities of every token of an answer, as it was said and under four changes.

    All are fp32 ``[batch, steps]``; NaN behind a sample's last token.

    Attributes:
        probability: With everything in place.
        without_image: For the same prompt and words without the image tokens, by the stock model.
        image_hidden: With the attention edges from the image to everything behind it cut, in all layers.
        context_hidden: With the edges from ``context`` to everything behind it cut, in all layers; NaN without context.
        mass: Attention on the image in the row that predicts the token, mean over layers and heads.
        tokens: The answers' ids.
        context: Per sample, indices of the answer's tokens that were hidden.
    """

    probability: torch.Tensor
    without_image: torch.Tensor
    image_hidden: torch.Tensor
    context_hidden: torch.Tensor
    mass: torch.Tensor
    tokens: tuple[tuple[int, ...], ...]
    context: tuple[tuple[int, ...], ...]

    def gain(self) -> torch.Tensor:
        """Return how much the image raises every token, in nats: ``ln P(with image) - ln P(without)``."""
        return (self.probability / self.without_image).log()

    def plot(self, ax: Any = None, *, sample: int = 0, **options: Any) -> Any:
        """Draw the probabilities of one sample's tokens."""
        ax = new_axis(ax)
        length = len(self.tokens[sample])
        lines = {
            "as said": self.probability,
            "without the image": self.without_image,
            "image hidden": self.image_hidden,
            "context hidden": self.context_hidden,
        }
        for label, values in lines.items():
            ax.plot(values[sample, :length].numpy(), marker="o", markersize=3, label=label)
        ax.legend()
        return self._labelled(ax, "answer token", "probability", "evidence")


def doubt(probability: float, without_image: float, asked: float | None = None) -> float:
    """Return how doubtful an object word is, in [0, 1]: ``(1 - p q) (1 + min(1, p0 / p)) / 2``.

    It is high when the model was not sure of the word (p), denies the object when asked for it (q), and would have said
    the word as well without the image (p0). It is no probability that the object is absent: an object that is there and
    usually stands in such a place is doubtful too, and one that was misread with confidence is not.

    Args:
        probability: p, of the word where it was said.
        without_image: p0, of the word after the same words without the image.
        asked: q, the probability of yes against no to "Is there a ... in the image?". ``None``: not asked, as if 1.
    """
    certain = probability * (1.0 if asked is None else asked)
    return (1 - certain) * (1 + min(1.0, without_image / max(probability, 1e-12))) / 2


@torch.no_grad()
def evidence(
    model: object,
    inputs: Mapping[str, Any],
    *,
    max_new_tokens: int = 32,
    answers: Answers | None = None,
    context: Sequence[Sequence[int]] | None = None,
) -> Evidence:
    """Measure what every token of an answer rests on. Costs three or four answers and one text-only prefill.

    Args:
        model: The model, patched or not; the patch acts in everything but ``without_image``.
        inputs: What ``model.generate`` takes, left-padded.
        max_new_tokens: Length of the greedy answer.
        answers: Ids to look at instead of the model's own.
        context: Per sample, indices of answer tokens to hide from those behind them.

    Raises:
        UnsupportedFeatureError: See ``look_at``; PaliGemma, see ``head_divergence``.
        MethodError: ``answers`` or ``context`` that do not fit.
    """
    subject = look_at(model, "evidence", inputs)
    said = subject.answer(inputs, max_new_tokens=max_new_tokens, answers=answers, logits=True)
    looks = attention_to_image(model, inputs, answers=said.tokens)
    spans = {name: F.pad(span, (0, said.steps)) for name, span in find_spans(subject.anatomy, inputs).items()}
    behind = spans["behind"].clone()
    length = inputs["input_ids"].shape[1]
    behind[:, length:] = True
    hidden = _answer_under(subject, inputs, said, Cut(spans["image"], behind, rows="text"))
    chosen = _checked(context, said)
    without_context = torch.full_like(hidden, float("nan"))
    if any(chosen):
        source = torch.zeros_like(behind)
        for sample, indices in enumerate(chosen):
            source[sample, [length + index for index in indices]] = True
        without_context = _answer_under(subject, inputs, said, Cut(source, behind, rows="text"))
        without_context[[not indices for indices in chosen]] = float("nan")
    return Evidence(
        subject.layers(None),
        subject.patch,
        probability=said.log_probs().exp(),
        without_image=_without_image(subject, inputs, said),
        image_hidden=hidden,
        context_hidden=without_context,
        mass=looks.mass.mean((2, 3)),
        tokens=said.tokens,
        context=chosen,
    )


def _answer_under(subject: Subject, inputs: Mapping[str, Any], said: Answered, cut: Cut) -> torch.Tensor:
    return subject.answer(inputs, cut, answers=said.tokens, logits=True).log_probs().exp()


def _without_image(subject: Subject, inputs: Mapping[str, Any], said: Answered) -> torch.Tensor:
    """Return the probabilities of the answers' tokens behind the prompts without their images."""
    logits = stock_logits(subject.model, image_free_inputs(subject, inputs, said), said.steps)
    return dataclasses.replace(said, logits=tuple(logits.unbind(1))).log_probs().exp()


def _checked(context: Sequence[Sequence[int]] | None, said: Answered) -> tuple[tuple[int, ...], ...]:
    if context is None:
        return ((),) * len(said.tokens)
    chosen = tuple(tuple(int(index) for index in indices) for indices in context)
    if len(chosen) != len(said.tokens) or any(
        not 0 <= index < len(tokens) for indices, tokens in zip(chosen, said.tokens, strict=True) for index in indices
    ):
        raise MethodError(
            f"context must hold indices of each answer's tokens, for {len(said.tokens)} samples with "
            f"{', '.join(str(len(tokens)) for tokens in said.tokens)} tokens; got {chosen!r}."
        )
    return chosen
