"""Heads for AD-HH (ICLR 2025): those that make hallucinated objects likelier than real ones."""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from vlmfix.calibration.session import Contrast, Found, Head, Session, ranked, scaled_count
from vlmfix.engine.calls import parameter_names
from vlmfix.errors import DataError, MethodError, UnsupportedFeatureError
from vlmfix.methods.adhh import ADHH
from vlmfix.methods.base import Method
from vlmfix.methods.views import Layer
from vlmfix.model.devices import input_device
from vlmfix.observe.samples import CalibrationSample

logger = logging.getLogger("vlmfix")


LEARNED = ("heads",)


def search(
    session: Session,
    samples: Sequence[CalibrationSample],
    method: ADHH,
    *,
    count: int | None = None,
    variants: int = 64,
) -> Found:
    """Find hallucination heads.

    Captions are greedy; those with a hallucinated object are read again, token by token. At each token that begins an
    object word, ``I(l, h) = p - p~(l, h)`` is how much the token's probability falls when the head's slice is set to 0
    in that step alone. A head's score is the mean over hallucinated objects minus that over real ones. Costs, per
    object, ``layers * heads`` decode steps, ``variants`` in a batch. An object word that is the caption's very first
    token is left out: there is no step of its own to change.

    Args:
        session: The model.
        samples: Images with their objects.
        method: Parameters of AD-HH.
        count: Heads to keep. Default: 20 of 1024, scaled to the model's number of heads (a heuristic).
        variants: Heads per batch.

    Raises:
        DataError: No objects given, or no caption with a hallucinated one, or none with a real one.
        UnsupportedFeatureError: The model's cache cannot be repeated.
        MethodError: An option out of range, or no function that finds objects.
    """
    count = scaled_count(20, len(session.heads)) if count is None else count
    for name, value in (("count", count), ("variants", variants)):
        if value < 1:
            raise MethodError(f"{name} must be at least 1, got {value!r}.")
    session.need_objects(samples, "adhh")
    influence, counts = Contrast(), Counter(captions=0)
    for batch, inputs in session.batches(samples):
        rows = session.captions(inputs)
        for sample, ids in zip(batch, rows, strict=True):
            is_real = {mention.token: real for mention, real in session.objects_in(sample, ids, counts)}
            if all(real for token, real in is_real.items() if token > 0):
                continue
            counts["captions"] += 1
            for token, record in _influences(session, sample, ids, is_real.keys() - {0}, variants):
                influence.add(record, positive=not is_real[token])
        logger.info("adhh: %d captions with a hallucinated object, %s events", counts["captions"], influence.counts)
    counts.update(hallucinated=influence.counts[True], real=influence.counts[False], dropped=influence.dropped)
    if not all(influence.counts.values()):
        missing = "hallucinated" if not influence.counts[True] else "real"
        raise DataError(
            f"No {missing} object in the captions of {len(samples)} images that name a hallucinated one "
            f"({dict(counts)}). Give more samples, and check that mentions(...) finds the objects in the captions."
        )
    scores = influence.difference()
    heads = tuple(ranked(scores, session.layers())[:count])
    tables = {"score": scores, "hallucinated": influence.mean(True), "real": influence.mean(False)}
    return Found(dataclasses.replace(method, heads=heads), counts, tables, session.layers(), {"count": count})


def _influences(
    session: Session, sample: CalibrationSample, ids: Sequence[int], wanted: Collection[int], variants: int
) -> Iterator[tuple[int, torch.Tensor]]:
    """Read a caption again; yield, for each wanted token, how much each head raises its probability.

    Yields:
        The token's index in the caption and fp32 ``[layers, num_heads]``.
    """
    inputs = session.encode([sample])
    with session.acting(HeadAblation()):
        cache = session.model(**inputs, use_cache=True).past_key_values
    if not hasattr(cache, "reorder_cache"):
        raise UnsupportedFeatureError(
            f"adhh tries all heads of a step at once, which needs a cache that can be repeated; {type(cache).__name__} "
            "cannot. Pass the model's heads yourself: vlmfix.patch(model, 'adhh', heads=[...])."
        )
    for index in range(1, max(wanted, default=0) + 1):
        # No attention mask: nothing is padded, and some models count positions by it.
        step = torch.tensor([[ids[index - 1]]], device=input_device(session.model))
        if index in wanted:
            yield index, _influence(session, cache, step, ids[index], variants)
        with session.acting(HeadAblation()):
            _decode(session, step, cache)


def _decode(session: Session, step: torch.Tensor, cache: Any) -> Any:
    """Take a decode step ``[batch, 1]`` behind a prompt, as ``generate`` does."""
    positions, deltas = {}, vars(session.anatomy.inner).get("rope_deltas")
    if deltas is not None and "cache_position" in parameter_names(session.model):
        # Before transformers 5.1, Qwen-VL and GLM-4V miscount positions behind a prompt that was repeated like this.
        positions["position_ids"] = (cache.get_seq_length() + deltas.to(step.device)).expand(3, len(step), 1)
    return session.model(input_ids=step, past_key_values=cache, use_cache=True, **positions)


def _influence(session: Session, cache: Any, step: torch.Tensor, token: int, variants: int) -> torch.Tensor:
    """Take one decode step with each head zeroed; the fall of a token's probability, fp32 ``[layers, num_heads]``."""
    heads = session.heads
    falls = []
    for start in range(0, len(heads), variants):
        targets = (None, *heads[start : start + variants])  # the first row is the model as it is
        repeated = copy.deepcopy(cache)
        repeated.reorder_cache(torch.zeros(len(targets), dtype=torch.int64, device=step.device))
        with session.acting(HeadAblation(targets)):
            logits = _decode(session, step.expand(len(targets), -1), repeated).logits[:, -1]
        probability = logits.float().softmax(-1)[:, token]
        falls.append(probability[:1] - probability[1:])
    return torch.cat(falls).view(len(session.layers()), -1)


@dataclass(frozen=True)
class HeadAblation(Method):
    """Set one head's output to 0, another one in each sample; meant for single decode steps.

    ``targets`` holds one (layer, head) pair per sample, or ``None`` for a sample that is left alone. They do not count
    when two ablations are compared, so that a cache filled without any can be continued with each.
    """

    name = "head_ablation"
    edits_heads = True
    needs_text_keys = False
    prompt_rows = "none"

    targets: tuple[Head | None, ...] = field(default=(), compare=False)

    def edit_heads(self, head_outputs: torch.Tensor, layer: Layer) -> torch.Tensor:
        """Zero slices of ``[batch, 1, num_heads, head_dim]``."""
        at = layer.site.layer_idx
        here = [(row, target[1]) for row, target in enumerate(self.targets) if target is not None and target[0] == at]
        if not here:
            return head_outputs
        edited = head_outputs.clone()
        for row, head in here:
            edited[row, :, head] = 0
        return edited
