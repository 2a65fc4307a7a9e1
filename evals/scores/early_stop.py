"""The early-stop control: the unpatched model's descriptions, ended earlier.

Let g_t be the largest logit of a token other than EOS minus the EOS logit at greedy step t. With a bias b >= 0 on EOS
greedy decoding takes the same tokens until the first step with g_t <= b and ends there: the description is an exact
prefix of the unbiased one. All biases together give a curve of hallucination against recall that costs no generation; a
method has to leave that curve, not only to move along it.

A bias cuts a description only where its gaps reach a new minimum, which happens a few times per description. So the
benchmark scores the answers as they are, then with every image cut once, twice and so on, and every bias is one of
these per image. (Recall need not fall steadily: a cut through a word may leave another.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from vlmfix.errors import DataError

from ..benchmarks.base import Benchmark
from ..data.samples import Answer, Answers, Sample
from ..stats.table import Table

# A step where EOS ties with the chosen token (gap 0) ends the description under any positive bias, but not under none.
_SMALLEST_BIAS = float(np.nextafter(0.0, 1.0))


def stopped_versions(benchmark: Benchmark, answers: Answers, decode: Callable[[list[int]], str]) -> list[Table]:
    """The baseline's tables with every image cut not at all, once, twice, ...

    Args:
        benchmark: What was asked; the samples that record gaps are descriptions, and the images of its tables are those
            of its samples.
        answers: The baseline's, with tokens and stop margins.
        decode: Token ids to text, special tokens skipped.

    Returns:
        What :class:`~vlmfix.evals.scores.bias_curves.EarlyStop` takes; nothing without descriptions.

    Raises:
        DataError: A description without stop margins, or with some that are NaN or do not fit its tokens.
    """
    samples = [sample for sample in benchmark.samples if sample.records == "gaps"]
    cuts: dict[int, list[tuple[float, Sample, int]]] = {}
    for sample in samples:
        answer = answers[sample.key]
        _check(sample, answer)
        cuts.setdefault(sample.image_id, []).extend((bias, sample, length) for bias, length in _cuts(answer))
    for changes in cuts.values():
        changes.sort(key=lambda change: change[0])
    if not samples:
        return []
    now = dict(answers)
    return [
        _version(benchmark, now, cuts, number, decode) for number in range(1 + max(map(len, cuts.values()), default=0))
    ]


def _version(
    benchmark: Benchmark,
    now: dict[tuple[str, int, str], Answer],
    cuts: Mapping[int, Sequence[tuple[float, Sample, int]]],
    number: int,
    decode: Callable[[list[int]], str],
) -> Table:
    """Make every image's change of a number (0 for none) in ``now``, and score that."""
    reached = {}
    for image_id, changes in cuts.items():
        if number and number <= len(changes):
            reached[image_id], sample, length = changes[number - 1]
            answer = now[sample.key]
            now[sample.key] = replace(answer, text=decode(list(answer.tokens[:length])))
    table = benchmark.score(now)
    assert table is not None, "descriptions are scored without a judge"
    biases = [reached.get(i, np.nan) if number else 0.0 for i in table.image_ids.tolist()]
    columns = {**table.columns, "stop_bias": np.asarray(biases, dtype=np.float64)}
    return Table(table.image_ids, columns, table.splits, table.items, table.truth)


def _cuts(answer: Answer) -> list[tuple[float, int]]:
    """All lengths a bias can cut a description to, as (smallest such bias, length), by ascending bias."""
    cuts: list[tuple[float, int]] = []
    lowest = np.inf
    for t, gap in enumerate(answer.eos_gaps[: len(answer.tokens)]):
        if gap < lowest and lowest > 0:
            lowest = gap
            cuts.append((max(float(gap), _SMALLEST_BIAS), t))
    return cuts[::-1]


def _check(sample: Sample, answer: Answer) -> None:
    gaps, tokens = answer.eos_gaps, answer.tokens
    if not gaps and tokens:
        raise DataError(
            f"the caption of image {sample.image_id} has no stop margins (eos_gaps): run the baseline again with them "
            "stored"
        )
    if len(gaps) not in (len(tokens), len(tokens) + 1) or any(np.isnan(gap) for gap in gaps):
        raise DataError(
            f"image {sample.image_id} has {len(tokens)} tokens and {len(gaps)} stop margins; expected one number per "
            "step, none of them NaN"
        )
