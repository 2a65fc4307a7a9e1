"""Statistics for AdaIAT (arXiv 2603.04908): attention to generated text at real and at hallucinated objects."""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch

from vlmfix.calibration.session import Contrast, Found, Session
from vlmfix.errors import DataError, MethodError
from vlmfix.methods.adaiat import AdaIAT
from vlmfix.methods.measured import HeadStatistics
from vlmfix.observe.samples import CalibrationSample
from vlmfix.observe.watch import AttentionLog, AttentionWatch

logger = logging.getLogger("vlmfix")


LEARNED = ("statistics",)


def search(session: Session, samples: Sequence[CalibrationSample], method: AdaIAT, *, min_generated: int = 8) -> Found:
    """Measure the statistics (ours: the paper's code for them is not released).

    Captions are greedy. In the row that predicts the first token of an object word, each head's attention to the
    generated tokens (the row's own included) is taken, per token or summed up as the method's ``gate`` says; the mean
    over real and that over hallucinated objects are the statistics. Costs one caption per sample.

    Args:
        session: The model.
        samples: Images with their objects.
        method: Parameters of AdaIAT.
        min_generated: Objects named behind fewer generated tokens are left out.

    Raises:
        DataError: No objects given, or no real or no hallucinated object named.
        MethodError: An option out of range, or no function that finds objects.
    """
    if min_generated < 1:
        raise MethodError(f"min_generated must be at least 1, got {min_generated!r}.")
    session.need_objects(samples, "adaiat")
    means, counts = Contrast(), Counter(mentions=0, unaligned=0, unknown=0, early=0)
    for batch, inputs in session.batches(samples):
        log = AttentionLog()
        rows = session.captions(inputs, AttentionWatch(log.see))
        for number, (sample, ids) in enumerate(zip(batch, rows, strict=True)):
            for mention, is_real in session.objects_in(sample, ids, counts):
                if mention.token < min_generated:
                    counts["early"] += 1
                else:
                    means.add(log.on_generated(mention.token, number, method.gate), positive=is_real)
        logger.info("adaiat: %d real and %d hallucinated objects", means.counts[True], means.counts[False])
    counts.update(real=means.counts[True], hallucinated=means.counts[False], dropped=means.dropped)
    if not all(means.counts.values()):
        missing = "real" if not means.counts[True] else "hallucinated"
        raise DataError(
            f"No {missing} object behind at least {min_generated} generated tokens in the captions of {len(samples)} "
            f"images ({dict(counts)}). Give more samples, allow longer captions (max_new_tokens=...), and check that "
            "mentions(...) finds the objects."
        )
    tables = {"real": means.mean(True), "hallucinated": means.mean(False)}
    name = str(session.model.config._name_or_path)
    statistics = HeadStatistics(
        real=_all_layers(session, tables["real"]),
        hallucinated=_all_layers(session, tables["hallucinated"]),
        num_real=means.counts[True],
        num_hallucinated=means.counts[False],
        kind=method.gate,
        model="" if Path(name).is_dir() else name,
        prompt=session.prompt(samples[0].question),
    )
    found = dataclasses.replace(method, statistics=statistics)
    return Found(found, counts, tables, session.layers(), {"min_generated": min_generated})


def _all_layers(session: Session, table: torch.Tensor) -> tuple[tuple[float, ...], ...]:
    """Fill up with zeros for layers without softmax attention."""
    full = torch.zeros(session.anatomy.num_layers, session.anatomy.num_heads, dtype=table.dtype)
    full[list(session.layers())] = table
    return tuple(tuple(float(f"{value:.6g}") for value in row) for row in full.tolist())
