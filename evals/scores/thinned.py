"""The controls that take something from the unpatched model's descriptions, and need no method for it.

Each is a family of shorter descriptions with one knob; turning it costs no generation. All its settings together give a
curve of hallucination against recall. A method has to leave that curve, not only to move along it.

*Early stop* ends descriptions earlier. Let g_t be the largest logit of a token other than EOS minus the EOS logit at
greedy step t. With a bias b >= 0 on EOS greedy decoding takes the same tokens until the first step with g_t <= b and
ends there: the description is an exact prefix of the unbiased one.

*Self-verification* leaves out what the model denies. It was asked once for every object that a description names
("Is there a dog in the image?", see :mod:`vlmfix.evals.run.mentions`), and phrases with those whose probability of yes
is at most a threshold are left out, as ``vlmfix.verify`` does it.

A knob changes a description at few of its settings. So the benchmark scores the answers as they are, then with every
image changed once, twice and so on, and every setting is one of these per image. (Recall need not fall steadily: a cut
through a word may leave another.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from vlmfix.errors import DataError
from vlmfix.verification.leave_out import edited_sentences
from vlmfix.verification.phrases import NounPhrase, read_sentences

from ..benchmarks.base import EARLY_STOP, SELF_VERIFICATION, Benchmark
from ..data.samples import Answer, Answers, Sample
from ..stats.table import Table

# Nothing changes at 0: there a step where EOS ties with the chosen token (gap 0) does not end the description.
_SMALLEST_KNOB = float(np.nextafter(0.0, 1.0))

Thinning = Callable[[Sample, Answer], Iterable[tuple[float, str]]]
"""From a description to all that a knob can make of it: the smallest setting that does, and the text, in order."""


def thinned_versions(
    benchmark: Benchmark, answers: Answers, decode: Callable[[list[int]], str]
) -> dict[str, list[Table]]:
    """The baseline's tables under each of these controls: every image changed not at all, once, twice, ...

    Args:
        benchmark: What was asked; the samples that record gaps are descriptions, and the images of its tables are those
            of its samples.
        answers: The baseline's, with tokens and stop margins.
        decode: Token ids to text, special tokens skipped.

    Returns:
        Control -> what :class:`~vlmfix.evals.scores.bias_curves.Thinned` takes. Empty without descriptions; without
        self-verification where the model was not asked.

    Raises:
        DataError: A description without stop margins, or with some that are NaN or do not fit its tokens.
    """
    samples = [sample for sample in benchmark.samples if sample.records == "gaps"]
    if not samples:
        return {}
    ways: dict[str, Thinning] = {EARLY_STOP: lambda sample, answer: _ended_earlier(sample, answer, decode)}
    if all(answers[sample.key].asked is not None for sample in samples):
        ways[SELF_VERIFICATION] = lambda _, answer: _without_denied(answer)
    return {control: _versions(benchmark, answers, samples, thin) for control, thin in ways.items()}


def _versions(benchmark: Benchmark, answers: Answers, samples: Sequence[Sample], thin: Thinning) -> list[Table]:
    changes: dict[int, list[tuple[float, Sample, str]]] = {}
    for sample in samples:
        found = thin(sample, answers[sample.key])
        changes.setdefault(sample.image_id, []).extend((knob, sample, text) for knob, text in found)
    for each in changes.values():
        each.sort(key=lambda change: change[0])
    now = dict(answers)
    return [_version(benchmark, now, changes, number) for number in range(1 + max(map(len, changes.values())))]


def _version(
    benchmark: Benchmark,
    now: dict[tuple[str, int, str], Answer],
    changes: Mapping[int, Sequence[tuple[float, Sample, str]]],
    number: int,
) -> Table:
    """Make every image's change of a number (0 for none) in ``now``, and score that."""
    reached = {}
    for image_id, each in changes.items():
        if number and number <= len(each):
            reached[image_id], sample, text = each[number - 1]
            now[sample.key] = replace(now[sample.key], text=text)
    table = benchmark.score(now)
    assert table is not None, "descriptions are scored without a judge"
    knobs = [reached.get(i, np.nan) if number else 0.0 for i in table.image_ids.tolist()]
    columns = {**table.columns, "knob": np.asarray(knobs, dtype=np.float64)}
    return Table(table.image_ids, columns, table.splits, table.items, table.truth)


def _ended_earlier(sample: Sample, answer: Answer, decode: Callable[[list[int]], str]) -> Iterable[tuple[float, str]]:
    """All that a bias on EOS can cut a description to: it does where the gaps reach a new minimum."""
    _check(sample, answer)
    cuts: list[tuple[float, int]] = []
    lowest = np.inf
    for t, gap in enumerate(answer.eos_gaps[: len(answer.tokens)]):
        if gap < lowest and lowest > 0:
            lowest = gap
            cuts.append((max(float(gap), _SMALLEST_KNOB), t))
    return ((bias, decode(list(answer.tokens[:length]))) for bias, length in reversed(cuts))


def _without_denied(answer: Answer) -> Iterable[tuple[float, str]]:
    """A description without its most doubtful object, without the two most doubtful ones, ..."""
    sentences = read_sentences(answer.text)
    named = {phrase.name for sentence in sentences for phrase in sentence.phrases if phrase.is_object}
    levels: dict[float, set[str]] = {}
    for name, odds in (answer.asked or {}).items():
        if name in named:  # Objects of a thinking trace were asked for too, and may have been left out with it.
            levels.setdefault(max(1 / (1 + math.exp(-odds)), _SMALLEST_KNOB), set()).add(name)
    gone: set[str] = set()

    def is_gone(phrase: NounPhrase) -> bool:
        return phrase.name in gone

    for probability in sorted(levels):
        gone |= levels[probability]
        yield probability, "".join(edited_sentences(answer.text, sentences, is_gone)).strip()


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
