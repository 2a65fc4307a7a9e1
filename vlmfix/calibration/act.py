"""Heads for ACT (arXiv 2406.15765): those whose calibration alone makes the right answer more likely."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence

import torch

from vlmfix.calibration.session import Contrast, Found, Session, ranked
from vlmfix.errors import DataError, MethodError
from vlmfix.methods.act import ACT
from vlmfix.observe.samples import CalibrationSample
from vlmfix.observe.words import need_yes_no_tokens

logger = logging.getLogger("vlmfix")


LEARNED = ("heads",)


def search(session: Session, samples: Sequence[CalibrationSample], method: ACT, *, share: float = 0.1) -> Found:
    """Find the heads to calibrate.

    Each head of the method's layers is calibrated alone and judged by the margin ``logit(right) - logit(wrong)`` of yes
    and no at the first new token, averaged over the samples (ours: smoother than the paper's accuracy, and it needs
    prefills only). Heads that raise it are kept, at most the best ``share`` of those searched. This costs one prefill
    per sample and head, and one per sample without any.

    Args:
        session: The model.
        samples: Yes/no questions.
        method: Parameters of ACT.
        share: Largest part of the searched heads to keep, in (0, 1].

    Raises:
        DataError: No answers, or no sample with a finite margin.
        UnsupportedFeatureError: Yes or no is not a single token.
        MethodError: ``share`` out of range.
    """
    if not 0 < share <= 1:
        raise MethodError(f"share must be above 0 and at most 1, got {share!r}.")
    session.need_answers(samples, "act")
    answers = need_yes_no_tokens(session.tokenizer)
    layers = session.layers(method.bind(session.anatomy).layer_indices)
    heads = [(layer, head) for layer in layers for head in range(session.anatomy.num_heads)]
    gains = Contrast()
    for number, (batch, inputs) in enumerate(session.batches(samples), 1):
        sign = torch.tensor([1.0 if sample.answer else -1.0 for sample in batch])
        before = sign * answers.log_odds(session.next_logits(inputs)).cpu()
        margins = []
        for head in heads:
            alone = dataclasses.replace(method, heads=(head,))
            margins.append(sign * answers.log_odds(session.next_logits(inputs, alone)).cpu())
        table = (torch.stack(margins) - before).view(len(layers), -1, len(batch))  # [layers, num_heads, batch]
        for gain in table.unbind(-1):
            gains.add(gain, positive=True)
        logger.info("act: batch %d of %d, %d heads each", number, -(-len(samples) // session.batch_size), len(heads))
    if not gains.counts[True]:
        raise DataError(f"No finite margin in {len(samples)} samples. Load the model with another dtype.")
    mean = gains.mean(True)
    better = [head for head in ranked(mean, layers) if mean[layers.index(head[0]), head[1]] > 0]
    kept = better[: max(1, round(share * len(heads)))]
    if not kept:
        logger.warning("act: no head raises the margin; the recipe changes nothing.")
    counts = {"questions": gains.counts[True], "dropped": gains.dropped, "improving_heads": len(better)}
    return Found(
        dataclasses.replace(method, heads=tuple(kept)), counts, {"margin_gain": mean}, layers, {"share": share}
    )
