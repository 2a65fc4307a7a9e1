"""Controls: what a plain shift of a threshold would have done to the unpatched model.

A method that makes a model say "no" more often, or stop earlier, moves along a trade-off that needs no method. Both
controls start from what the unpatched model already gave (scores and stop margins), so they cost no generation.

**Yes bias (POPE).** Let s_q be the logit of yes minus the logit of no. With a bias b on yes the answer is yes iff s_q +
b > 0. The ranking of the questions, and with it the AUC, does not depend on b; accuracy and F1 do. The bias is chosen
so that the yes-ratio is the method's.

**Early stop (CHAIR).** Let g_t be the largest logit of a token other than EOS minus the EOS logit at greedy step t.
With a bias b >= 0 on EOS greedy decoding takes the same tokens until the first step with g_t <= b and ends there: the
caption is an exact prefix of the unbiased one. The bias is chosen so that the recall is the method's.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from vlmfix.errors import DataError

from .metrics.chair import ChairMatcher, ChairTable, score_captions
from .metrics.pope import PopeTable, score_logits

# A step where EOS ties with the chosen token (gap 0) ends the caption under any positive bias, but not under none.
_SMALLEST_BIAS = float(np.nextafter(0.0, 1.0))


@dataclass(frozen=True, eq=False)
class YesBiasControl:
    """The unpatched model's answers under a bias on yes.

    Attributes:
        bias: Added to the logit of yes.
        target_yes_ratio: What was asked for; ``table.summary()["yes_ratio"]`` is what ties allow.
        table: Answers under the bias; its scores, and so its AUC, are the unpatched model's.
    """

    bias: float
    target_yes_ratio: float
    table: PopeTable


def yes_bias_control(baseline: PopeTable, target_yes_ratio: float) -> YesBiasControl:
    """Shift the unpatched model's yes/no decision until it says yes as often as a method does.

    Answers are taken from the scores alone. Equal scores cannot be parted, so the yes-ratio is the nearest possible
    one; of two equally near ones, and of all biases that give it, the one closest to zero is taken (zero itself, or the
    middle between two scores).

    Args:
        baseline: Answers of the unpatched model with scores (logit of yes minus logit of no, float64 [n]).
        target_yes_ratio: Share of yes answers to match, 0 to 1.

    Raises:
        DataError: the table has no scores, or the target is not in [0, 1].
    """
    if baseline.score is None:
        raise DataError("the yes-bias control needs yes/no scores: run the baseline with scores stored")
    if not 0 <= target_yes_ratio <= 1:
        raise DataError(f"the target yes-ratio must be between 0 and 1, not {target_yes_ratio}")
    levels, counts = np.unique(baseline.score, return_counts=True)
    levels, counts = levels[::-1], counts[::-1]
    said_yes = np.concatenate([[0], np.cumsum(counts)])  # with the j highest levels as yes
    thresholds = [_threshold(levels, j) for j in range(len(levels) + 1)]
    distance = np.abs(said_yes - target_yes_ratio * len(baseline))
    best = min(range(len(thresholds)), key=lambda j: (distance[j], abs(thresholds[j])))
    bias = 0.0 - thresholds[best]
    table = score_logits(
        baseline.label.tolist(),
        baseline.score.tolist(),
        image_ids=baseline.image_ids.tolist(),
        question_ids=baseline.question_ids,
        bias=bias,
    )
    return YesBiasControl(bias, target_yes_ratio, table)


def _threshold(levels: NDArray[np.float64], j: int) -> float:
    """A threshold that exactly the j highest levels exceed, zero if possible; ``levels`` descend."""
    upper = float(levels[j - 1]) if j else np.inf
    lower = float(levels[j]) if j < len(levels) else -np.inf
    if lower <= 0 < upper:
        return 0.0
    if j == 0:
        return lower
    if j == len(levels):
        return upper - max(1.0, abs(upper) * 1e-6)
    middle = (lower + upper) / 2
    return middle if lower <= middle < upper else lower


@dataclass(frozen=True, eq=False)
class EarlyStopControl:
    """The unpatched model's captions under a bias on EOS.

    Attributes:
        bias: Added to the EOS logit, >= 0.
        target_recall: What was asked for; ``table.summary()["recall"]`` is what was reached. Above the unpatched
            model's own recall nothing is cut.
        captions: Image id -> caption, cut.
        lengths: Image id -> tokens kept.
        table: CHAIR of the cut captions.
    """

    bias: float
    target_recall: float
    captions: dict[int, str] = field(repr=False)
    lengths: dict[int, int] = field(repr=False)
    table: ChairTable


def stop_length(num_tokens: int, eos_gaps: Sequence[float], bias: float) -> int:
    """How many tokens greedy decoding keeps under an EOS bias: the first step t with ``eos_gaps[t] <= bias``.

    Args:
        num_tokens: Tokens of the unbiased caption.
        eos_gaps: Per step, the largest logit of another token minus the EOS logit.
        bias: On the EOS logit, >= 0; 0 keeps everything.
    """
    if bias <= 0:
        return num_tokens
    return next((t for t, gap in enumerate(eos_gaps[:num_tokens]) if gap <= bias), num_tokens)


def early_stop_control(
    token_ids: Mapping[int, Sequence[int]],
    eos_gaps: Mapping[int, Sequence[float]],
    decode: Callable[[list[int]], str],
    target_recall: float,
    ground_truth: Mapping[int, Collection[str]],
    matcher: ChairMatcher,
) -> EarlyStopControl:
    """End the unpatched model's captions earlier until their recall is that of a method.

    A bias cuts a caption only where its gaps reach a new minimum, which happens a few times per caption, so the recall
    is known exactly for every possible bias and the nearest one is found without search; of equally near ones the
    smallest bias is taken. (Recall need not fall
    steadily: a cut through a word may leave another word.)

    Args:
        token_ids: Image id -> greedy tokens of the unpatched model, with or without the final EOS.
        eos_gaps: Image id -> per step, the largest logit of a token other than EOS minus the EOS logit. One number per
            token, or one more (the step that gave an EOS not among the tokens).
        decode: Token ids -> text, special tokens skipped.
        target_recall: Recall to match, 0 to 1.
        ground_truth: Image id -> objects in the image.
        matcher: Finds the mentions.

    Raises:
        DataError: no captions, ids without gaps or ground truth, gaps that are NaN or do not fit the tokens, no object
            in the ground truth, or a target outside [0, 1].
    """
    _check_captions(token_ids, eos_gaps, ground_truth, target_recall)
    total = sum(len(set(ground_truth[i])) for i in token_ids)
    if not total:
        raise DataError(
            "the ground truth of these images has no object, so there is no recall to match: use other images"
        )

    def recalled(image_id: int, length: int) -> int:
        text = decode(list(token_ids[image_id][:length]))
        return len(set(matcher.match(text).nodes).intersection(ground_truth[image_id]))

    uncut = 0
    events: list[tuple[float, int]] = []  # (bias from which on it holds, change of the recalled objects)
    for image_id, tokens in token_ids.items():
        here = recalled(image_id, len(tokens))
        uncut += here
        for bias, length in _cuts(len(tokens), eos_gaps[image_id]):
            fewer = recalled(image_id, length)
            events.append((bias, fewer - here))
            here = fewer
    bias = _nearest_bias(uncut, events, target_recall * total)
    lengths = {i: stop_length(len(tokens), eos_gaps[i], bias) for i, tokens in token_ids.items()}
    captions = {i: decode(list(token_ids[i][:length])) for i, length in lengths.items()}
    return EarlyStopControl(bias, target_recall, captions, lengths, score_captions(captions, ground_truth, matcher))


def _cuts(num_tokens: int, eos_gaps: Sequence[float]) -> list[tuple[float, int]]:
    """All lengths a bias can cut a caption to, as (smallest such bias, length), bias rising and length falling."""
    cuts: list[tuple[float, int]] = []
    lowest = np.inf
    for t, gap in enumerate(eos_gaps[:num_tokens]):
        if gap < lowest and lowest > 0:
            lowest = gap
            cuts.append((max(float(gap), _SMALLEST_BIAS), t))
    return cuts[::-1]


def _nearest_bias(uncut: int, events: list[tuple[float, int]], target: float) -> float:
    """The smallest bias whose number of recalled objects is nearest to ``target``."""
    best, best_distance, now = 0.0, abs(uncut - target), uncut
    ordered = sorted(events, key=lambda event: event[0])
    for i, (bias, change) in enumerate(ordered):
        now += change
        last_of_its_bias = i + 1 == len(ordered) or ordered[i + 1][0] > bias
        if last_of_its_bias and abs(now - target) < best_distance:
            best, best_distance = bias, abs(now - target)
    return best


def _check_captions(
    token_ids: Mapping[int, Sequence[int]],
    eos_gaps: Mapping[int, Sequence[float]],
    ground_truth: Mapping[int, Collection[str]],
    target_recall: float,
) -> None:
    if not 0 <= target_recall <= 1:
        raise DataError(f"the target recall must be between 0 and 1, not {target_recall}")
    if not token_ids:
        raise DataError("the early-stop control got no captions: generate the baseline first")
    for image_id, tokens in token_ids.items():
        if image_id not in eos_gaps or image_id not in ground_truth:
            what = "stop margins (eos_gaps)" if image_id not in eos_gaps else "ground truth"
            raise DataError(f"the caption of image {image_id} has no {what}: run the baseline again with them stored")
        gaps = eos_gaps[image_id]
        if len(gaps) not in (len(tokens), len(tokens) + 1) or any(np.isnan(gap) for gap in gaps):
            raise DataError(
                f"image {image_id} has {len(tokens)} tokens and {len(gaps)} stop margins; expected one number per "
                "step, none of them NaN"
            )
