"""The early-stop control: the unpatched model's captions, ended earlier.

Let g_t be the largest logit of a token other than EOS minus the EOS logit at greedy step t. With a bias b >= 0 on EOS
greedy decoding takes the same tokens until the first step with g_t <= b and ends there: the caption is an exact prefix
of the unbiased one. All biases together give a curve of hallucination against recall that costs no generation; a method
has to leave that curve, not only to move along it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from vlmfix.errors import DataError

from .figures import ChairTable, score_captions
from .matcher import ChairMatcher

# A step where EOS ties with the chosen token (gap 0) ends the caption under any positive bias, but not under none.
_SMALLEST_BIAS = float(np.nextafter(0.0, 1.0))


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


@dataclass(frozen=True)
class CurvePoint:
    """CHAIR of the unpatched model's captions under one bias.

    Attributes:
        bias: Added to the EOS logit, >= 0; it holds up to the next point's.
        recall: 0 to 1.
        chair_i: 0 to 1, NaN without any mention.
    """

    bias: float
    recall: float
    chair_i: float


class StopCurve:
    """Texts of the unpatched model under every bias on EOS, with what counts in them.

    A bias cuts a caption only where its gaps reach a new minimum, which happens a few times per caption, so the counts
    are known exactly for every possible bias. (Recall need not fall steadily: a cut through a word may leave another.)
    """

    def __init__(
        self,
        token_ids: Mapping[int, Sequence[int]],
        eos_gaps: Mapping[int, Sequence[float]],
        decode: Callable[[list[int]], str],
        objects: Mapping[int, int],
        count: Callable[[int, str], tuple[int, int, int]],
    ) -> None:
        """Count what is in every text at every length it can be cut to.

        Args:
            token_ids: Id -> greedy tokens of the unpatched model, with or without the final EOS.
            eos_gaps: Id -> per step, the largest logit of a token other than EOS minus the EOS logit. One number per
                token, or one more (the step that gave an EOS not among the tokens).
            decode: Token ids -> text, special tokens skipped.
            objects: Id -> number of objects in the image.
            count: Id and text -> recalled objects, mentions and hallucinated mentions.

        Raises:
            DataError: no captions, ids without gaps or objects, gaps that are NaN or do not fit the tokens, or no
                object at all.
        """
        _check_captions(token_ids, eos_gaps, objects)
        self._tokens, self._gaps, self._decode, self._count = token_ids, eos_gaps, decode, count
        self.objects = sum(objects[i] for i in token_ids)
        if not self.objects:
            raise DataError(
                "the ground truth of these images has no object, so there is no recall to match: use other images"
            )
        uncut = np.zeros(3, dtype=np.int64)
        events: list[tuple[float, tuple[int, ...]]] = []  # (bias from which on it holds, change of the counts)
        for image_id, tokens in token_ids.items():
            here = self._counts(image_id, len(tokens))
            uncut += here
            for bias, length in _cuts(len(tokens), eos_gaps[image_id]):
                fewer = self._counts(image_id, length)
                events.append((bias, tuple(int(n) for n in fewer - here)))
                here = fewer
        self._steps = list(_running(uncut, events))

    def _counts(self, image_id: int, length: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        """Recalled objects, mentions and hallucinated mentions of a caption cut to ``length`` tokens, int64 [3]."""
        return np.array(self._count(image_id, self._decode(list(self._tokens[image_id][:length]))))

    def curve(self, points: int = 60) -> list[CurvePoint]:
        """Hallucination against recall, from no bias on.

        Args:
            points: Most points to return; of more, those nearest to equal steps of recall, the first and the last.
        """
        all_points = [
            CurvePoint(bias, recalled / self.objects, wrong / said if said else float("nan"))
            for bias, (recalled, said, wrong) in self._steps
        ]
        if len(all_points) <= points:
            return all_points
        recalls = np.array([point.recall for point in all_points])
        wanted = np.linspace(recalls[0], recalls[-1], points)
        chosen = {0, len(all_points) - 1, *(int(np.abs(recalls - r).argmin()) for r in wanted)}
        return [all_points[i] for i in sorted(chosen)]

    def cut(self, target_recall: float) -> tuple[float, dict[int, str], dict[int, int]]:
        """The texts whose recall is nearest to a method's; of equally near ones, those of the smallest bias.

        Args:
            target_recall: Recall to match, 0 to 1.

        Returns:
            The bias, and by id the texts and their lengths in tokens.

        Raises:
            DataError: A target outside [0, 1].
        """
        if not 0 <= target_recall <= 1:
            raise DataError(f"the target recall must be between 0 and 1, not {target_recall}")
        target = target_recall * self.objects
        bias = min(self._steps, key=lambda step: (abs(step[1][0] - target), step[0]))[0]
        lengths = {i: stop_length(len(tokens), self._gaps[i], bias) for i, tokens in self._tokens.items()}
        return bias, {i: self._decode(list(self._tokens[i][:length])) for i, length in lengths.items()}, lengths


class EarlyStop(StopCurve):
    """The captions of the unpatched model under every bias on EOS."""

    def __init__(
        self,
        token_ids: Mapping[int, Sequence[int]],
        eos_gaps: Mapping[int, Sequence[float]],
        decode: Callable[[list[int]], str],
        ground_truth: Mapping[int, Collection[str]],
        matcher: ChairMatcher,
    ) -> None:
        """Count the objects of every caption at every length it can be cut to.

        Args:
            token_ids: As of :class:`StopCurve`, by image id; likewise the next two, and the errors.
            eos_gaps: See there.
            decode: See there.
            ground_truth: Image id -> objects in the image.
            matcher: Finds the mentions.
        """
        self._truth, self._matcher = ground_truth, matcher
        truth = {i: frozenset(objects) for i, objects in ground_truth.items()}

        def count(image_id: int, text: str) -> tuple[int, int, int]:
            nodes = matcher.match(text).nodes
            here = truth[image_id]
            return len(here.intersection(nodes)), len(nodes), sum(node not in here for node in nodes)

        super().__init__(token_ids, eos_gaps, decode, {i: len(objects) for i, objects in truth.items()}, count)

    def at(self, target_recall: float) -> EarlyStopControl:
        """The captions of :meth:`cut` with their CHAIR; arguments and errors are the same."""
        bias, captions, lengths = self.cut(target_recall)
        table = score_captions(captions, self._truth, self._matcher)
        return EarlyStopControl(bias, target_recall, captions, lengths, table)


def _running(
    uncut: np.ndarray[tuple[int], np.dtype[np.int64]], events: list[tuple[float, tuple[int, ...]]]
) -> Iterator[tuple[float, tuple[int, int, int]]]:
    """Every bias at which something changes, rising from 0, with the counts from there on."""
    now = uncut.copy()
    bias = 0.0
    for at, change in sorted(events):
        if at > bias:
            yield bias, (int(now[0]), int(now[1]), int(now[2]))
            bias = at
        now += change
    yield bias, (int(now[0]), int(now[1]), int(now[2]))


def _cuts(num_tokens: int, eos_gaps: Sequence[float]) -> list[tuple[float, int]]:
    """All lengths a bias can cut a caption to, as (smallest such bias, length), bias rising and length falling."""
    cuts: list[tuple[float, int]] = []
    lowest = np.inf
    for t, gap in enumerate(eos_gaps[:num_tokens]):
        if gap < lowest and lowest > 0:
            lowest = gap
            cuts.append((max(float(gap), _SMALLEST_BIAS), t))
    return cuts[::-1]


def _check_captions(
    token_ids: Mapping[int, Sequence[int]],
    eos_gaps: Mapping[int, Sequence[float]],
    ground_truth: Collection[int],
) -> None:
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
