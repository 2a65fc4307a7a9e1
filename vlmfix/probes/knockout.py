"""Attention knockout: cut edges from some tokens to others, and see what the first answer token loses.

After "Cross-modal Information Flow in Multimodal Large Language Models" (CVPR 2025, arXiv 2411.18620).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from vlmfix.errors import MethodError
from vlmfix.methods.base import Method
from vlmfix.methods.views import EditedRows, Layer, PromptRows
from vlmfix.observe.ask import Answered, Subject, look_at
from vlmfix.probes.result import ProbeResult, new_axis
from vlmfix.probes.spans import Boxes, Spans, find_spans, is_subset

PAIRS = ("image->question", "question->last", "image->last", "last->last")
"""Cut by default: source->target, the target being the rows that can no longer see the source."""


BOX_PAIRS = ("object->question", "other->question")
"""Cut too where boxes are given."""


@dataclass(frozen=True, eq=False)
class Knockout(ProbeResult):
    """What the first answer token loses when edges are cut.

    Attributes:
        pairs: What was cut, as ``"source->target"``.
        windows: First and last layer of each window (inclusive).
        change: fp32 ``[pairs, windows, batch]``: change of the token's probability in percent of what it was.
        probability: fp32 ``[batch]``: what it was.
        counted: Bool ``[batch]``: samples with an image and a probability of at least ``floor``.
        tokens: The first answer token of each sample.
        floor: See ``counted``.
    """

    pairs: tuple[str, ...]
    windows: tuple[tuple[int, int], ...]
    change: torch.Tensor
    probability: torch.Tensor
    counted: torch.Tensor
    tokens: tuple[int, ...]
    floor: float

    def mean(self) -> torch.Tensor:
        """Return the mean change over the counted samples, fp32 ``[pairs, windows]``; NaN if there are none."""
        mean: torch.Tensor = self.change[..., self.counted].mean(-1)
        return mean

    def standard_error(self) -> torch.Tensor:
        """Return the standard error of the mean, fp32 ``[pairs, windows]``; NaN for fewer than two samples."""
        known = self.change[..., self.counted]
        if known.shape[-1] < 2:
            return torch.full(known.shape[:2], float("nan"))
        error: torch.Tensor = known.std(-1) / known.shape[-1] ** 0.5
        return error

    def plot(self, ax: Any = None, **options: Any) -> Any:
        """Draw one curve per pair over the layer a window is centred on, with its standard error."""
        ax = new_axis(ax)
        mean, error = self.mean(), self.standard_error().nan_to_num(0.0)
        for number, pair in enumerate(self.pairs):
            (line,) = ax.plot(self.layers, mean[number], marker="o", markersize=3, label=pair.replace("->", " → "))
            low, high = mean[number] - error[number], mean[number] + error[number]
            ax.fill_between(self.layers, low, high, color=line.get_color(), alpha=0.2)
        ax.axhline(0, color="0.7", linewidth=0.8)
        ax.legend()
        title = f"attention knockout, {int(self.counted.sum())} samples"
        return self._labelled(ax, "layer (centre of the window)", "change of the answer's probability, %", title)


def window_of(centre: int, size: int, num_layers: int) -> tuple[int, int]:
    """Return the first and the last layer of a window of ``size`` layers around one, cut off at the ends."""
    return max(0, centre - size // 2), min(num_layers, centre + (size + 1) // 2) - 1


@torch.no_grad()
def knockout(
    model: object,
    inputs: Mapping[str, Any],
    pairs: Sequence[str] | None = None,
    *,
    window: int = 9,
    layers: Sequence[int] | str | None = None,
    answers: Sequence[int] | None = None,
    boxes: Boxes | None = None,
    grid: tuple[int, int] | None = None,
    question: torch.Tensor | None = None,
    spans: Spans | None = None,
    floor: float = 0.05,
) -> Knockout:
    """Cut attention edges over a window of layers, one pair and one window at a time.

    A cut edge has weight 0, and the row's other weights grow as softmax has it. A token never loses sight of itself,
    but for ``last->last``, and that only while the row sees others. Costs one prefill, and one for every pair and
    window.

    Args:
        model: The model, patched or not. A patch's own edits of the weights come behind the cut.
        inputs: What ``model.generate`` takes, left-padded.
        pairs: ``"source->target"`` by names of spans: ``image``, ``question``, ``behind`` (all behind the image),
            ``last``, ``text`` (all but the image), ``object`` and ``other`` (image tokens inside and outside
            ``boxes``), or those of ``spans``. Default: ``PAIRS``, and object->question and other->question with boxes.
        window: Layers per window.
        layers: Layers the windows are centred on, see ``LayerSpec``. Default: all with softmax attention.
        answers: First answer token per sample. Default: the model's own.
        boxes: Per sample, boxes ``(left, top, right, bottom)`` in parts of the image, 0 to 1.
        grid: Rows and columns of the image's tokens, for boxes. Default: a square.
        question: The question's tokens, bool ``[batch, length]``. The study's are those of its text alone:
            ``probes.text_span(processor.tokenizer, inputs, questions)``. Default: all behind the image but the last
            one, line breaks, instructions and words of the template included, which gives other curves.
        spans: More named sets of tokens, bool ``[batch, length]``.
        floor: Least probability of a sample that counts for ``mean``.

    Raises:
        UnsupportedFeatureError: See ``look_at``; or a layer adds terms to its scores that cannot be written out.
        MethodError: Unknown names, a window below 1, boxes outside the image or an unknown grid.
    """
    if window < 1:
        raise MethodError(f"window must be at least 1, got {window}.")
    subject = look_at(model, "knockout", inputs)
    known = find_spans(subject.anatomy, inputs, question=question, boxes=boxes, grid=grid, more=spans)
    if pairs is None:
        pairs = PAIRS if boxes is None else (*PAIRS, *BOX_PAIRS)
    named = {pair: _read(pair, known) for pair in pairs}
    centres = subject.layers(layers)
    there = set(subject.layers(None))
    windows = tuple(window_of(centre, window, subject.anatomy.num_layers) for centre in centres)
    given = None if answers is None else [[token] for token in answers]
    base = subject.answer(inputs, answers=given, logits=True)
    has_image = known["image"].any(1).cpu()
    change = torch.zeros(len(named), len(windows), len(base.tokens))
    for row, (source, target) in enumerate(named.values()):
        for column, (first, last) in enumerate(windows):
            inside = tuple(layer for layer in range(first, last + 1) if layer in there)
            if inside:
                change[row, column] = _change(subject, inputs, base, _cut(known, source, target, inside)) * has_image
    probability = base.log_probs()[:, 0].exp()
    return Knockout(
        centres,
        subject.patch,
        tuple(named),
        windows,
        change,
        probability,
        counted=has_image & (probability >= floor),
        tokens=tuple(each[0] for each in base.tokens),
        floor=floor,
    )


def _read(pair: str, known: Spans) -> tuple[str, str]:
    source, arrow, target = pair.partition("->")
    if not arrow or source not in known or target not in known:
        raise MethodError(
            f"Cannot read the pair {pair!r}: write 'source->target' with names out of {', '.join(known)}"
            f"{'' if 'object' in known else '; object and other need boxes=...'}."
        )
    return source, target


def _cut(known: Spans, source: str, target: str, layers: tuple[int, ...]) -> Cut:
    return Cut(
        known[source],
        known[target],
        rows="text" if is_subset(known[target], known["behind"]) else "all",
        keep_self=(source, target) != ("last", "last"),
        layers=layers,
    )


def _change(subject: Subject, inputs: Mapping[str, Any], base: Answered, cut: Cut) -> torch.Tensor:
    """Return the change of the first token's probability in percent, fp32 ``[batch]``."""
    after = subject.answer(inputs, cut, answers=[each[:1] for each in base.tokens], logits=True).log_probs()[:, 0]
    return 100 * torch.expm1(after - base.log_probs()[:, 0])


@dataclass(frozen=True)
class Cut(Method):
    """Hide some tokens from some rows, in prompts with an image and in their answers.

    ``source`` and ``target`` are bool ``[batch, tokens]``, by position in prompt and answer: the tokens to hide, and
    the rows to hide them from; none behind the end. ``rows`` are the rows of the prompt that may be targets: no more
    than these are written out. With ``keep_self``, a row goes on seeing itself.
    """

    name = "knockout"
    edits_scores = True
    hides_keys = True
    needs_text_keys = False
    needs_past = True
    needs_whole_prompt = True
    attention_kinds = ("joint",)

    source: torch.Tensor = field(compare=False, repr=False)
    target: torch.Tensor = field(compare=False, repr=False)
    rows: PromptRows = field(default="all", compare=False)
    keep_self: bool = field(default=True, compare=False)

    def edit_scores(self, scores: torch.Tensor, allowed: torch.Tensor, layer: Layer) -> EditedRows:
        """Give cut pairs of ``[batch, num_heads, rows, keys]`` the lowest score there is."""
        num_keys, device = scores.shape[-1], scores.device
        source = layer.visible_keys(self.source.to(device), num_keys)
        source = F.pad(source, (0, num_keys - source.shape[1]))
        rows = torch.arange(*layer.rows, device=device) + layer.forward.past
        length = self.target.shape[1]
        target = self.target.to(device)[:, rows.clamp_max(length - 1)] & (rows < length)
        cut = target[:, None, :, None] & source[:, None, None] & allowed
        if self.keep_self:
            keys = torch.arange(num_keys, device=device) + layer.key_offset(num_keys)
            cut = cut & (keys != rows[:, None])
        cut = cut & (allowed & ~cut).any(-1, keepdim=True)  # no row loses all it sees
        cut = cut.expand(-1, scores.shape[1], -1, -1)
        return scores.masked_fill_(cut, torch.finfo(scores.dtype).min), cut.any(-1)
