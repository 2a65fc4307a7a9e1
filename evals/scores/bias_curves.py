"""What a bias gives that needs no method: the baseline's answers under every bias of one kind.

A bias on the end token ends descriptions earlier, a bias on yes moves the yes/no threshold, and one on the answers that
the model gives about its own words decides which of them are left out. Each changes the baseline's answers in a known
order, one image at a time, so that every figure is known at every bias. A control is the point of such a curve where
one figure (recall, the share of yes) is nearest to a method's.

That point is a choice made on the data. The intervals of a difference to a control therefore choose it again in every
resample of the images; with the choice held fixed they would cover too little.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..stats.bootstrap import CONFIDENCE, FloatArray, Interval, drawn, percentile_interval
from ..stats.figures import SumStatistic, sums_per_image
from ..stats.table import Table

_CELLS = 200_000  # numbers held at once: resamples times places on the curve
_DIGITS = 12  # differences below are rounding: two places are then equally near


class BiasCurve(ABC):
    """The baseline's answers under every bias of one kind.

    A place on the curve is the number of changes that a bias makes, from none on.

    Attributes:
        images: How many images there are.
        biases: float64 [places], the bias that gives each place.
        places: int64 [p], the places that a bias can give (changes at the same bias come together), preferred ones
            first: of equally near places the first is taken.
        image: int64 [changes], the image that each change is in, as its position among the sorted image ids.
    """

    images: int
    biases: FloatArray
    places: NDArray[np.int64]
    image: NDArray[np.int64]

    @abstractmethod
    def sums(self, statistic: SumStatistic) -> tuple[FloatArray, FloatArray]:
        """A statistic's column sums before any change, float64 [images, c], and what each change adds, [changes, c]."""

    @abstractmethod
    def table(self, place: int) -> Table:
        """The baseline's table at a place."""

    def values(self, statistic: SumStatistic, weights: FloatArray) -> FloatArray:
        """A figure at every place of :attr:`places`, float64 [k, p].

        Args:
            statistic: The figure.
            weights: float64 [k, images], how often each image counts.
        """
        sums = self._reached(self.sums(statistic), weights, weights[:, self.image])
        return statistic.value(sums[:, self.places])

    @staticmethod
    def _reached(sums: tuple[FloatArray, FloatArray], weights: FloatArray, of_change: FloatArray) -> FloatArray:
        """A statistic's sums at every place, float64 [k, places, c]; ``of_change`` are the weights of each change."""
        start, changes = sums
        reached = np.empty((start.shape[1], len(weights), len(changes) + 1))  # Columns apart: sums along rows are fast.
        for column, before, change in zip(reached, (weights @ start).T, changes.T, strict=True):
            column[:, 0] = before
            np.cumsum(of_change * change, axis=1, out=column[:, 1:])
            column[:, 1:] += before[:, None]
        return np.moveaxis(reached, 0, -1)

    def nearest(self, matched: SumStatistic, target: float) -> int:
        """The place where a figure is nearest to a target, the preferred one of several.

        Args:
            matched: The figure.
            target: Its value in a method's table.
        """
        found = self.values(matched, np.ones((1, self.images)))
        return int(self.places[_nearest(found, np.asarray([target]))[0]])

    def differences(
        self, matched: SumStatistic, table: Table, statistics: Sequence[SumStatistic], *, seed: int, **options: Any
    ) -> list[Interval]:
        """A method's figures minus those of its control, which is matched again in every resample.

        Args:
            matched: The figure that the control is matched on.
            table: The method's, about the baseline's images.
            statistics: The figures to compare.
            seed: Seed of the bootstrap.
            options: ``n_resamples`` and ``confidence`` of :func:`~vlmfix.evals.stats.bootstrap.drawn`.
        """
        figures = [matched, *statistics]
        sums = [self.sums(figure) for figure in figures]
        piece = max(1, _CELLS // (len(self.image) + 1))

        def draw(weights: FloatArray) -> FloatArray:
            """The differences in some resamples, float64 [k, statistics]."""
            of_change, rows = weights[:, self.image], np.arange(len(weights))
            at_places = matched.value(self._reached(sums[0], weights, of_change)[:, self.places])
            place = self.places[_nearest(at_places, matched.weighted(table, weights))]
            found = []
            for statistic, own in zip(statistics, sums[1:], strict=True):
                control = statistic.value(self._reached(own, weights, of_change)[rows, place])
                found.append(statistic.weighted(table, weights) - control)
            return np.stack(found, axis=1)

        def draw_in_pieces(weights: FloatArray) -> FloatArray:
            return np.concatenate([draw(weights[i : i + piece]) for i in range(0, len(weights), piece)])

        draws = drawn(draw_in_pieces, self.images, seed=seed, **options).reshape(-1, len(statistics))
        control = self.table(self.nearest(matched, matched.of(table)))
        confidence = options.get("confidence", CONFIDENCE)
        return [
            percentile_interval(s.of(table) - s.of(control), draws[:, i], self.images, confidence, difference=True)
            for i, s in enumerate(statistics)
        ]


def _nearest(values: FloatArray, target: FloatArray) -> NDArray[np.int64]:
    """Index of the first value nearest to each target: values [k, p], targets [k] -> [k]."""
    distance = np.round(np.abs(values - target[:, None]), _DIGITS)
    # Where the figure is undefined (a resample without any object) every place is as good.
    return np.asarray(np.argmin(np.where(np.isnan(distance), np.inf, distance), axis=1))


class Thinned(BiasCurve):
    """The baseline's descriptions, with ever more taken from them (see :mod:`vlmfix.evals.scores.thinned`)."""

    def __init__(self, versions: Sequence[Table]) -> None:
        """Order the changes.

        Args:
            versions: Tables of the same rows: the descriptions as they are, each image's first change, its second, and
                so on. Their column ``knob`` is the setting from which on the row's image is so, NaN where an image has
                no such change.
        """
        self._versions = versions
        ids, first = np.unique(versions[0].image_ids, return_index=True)
        found = np.stack([version.knob[first] for version in versions])  # [versions, images]
        self._version, self.image = np.nonzero(np.isfinite(found[1:]))
        changes = found[1:][self._version, self.image]
        order = np.lexsort((self._version, changes))
        self._version, self.image, changes = self._version[order] + 1, self.image[order], changes[order]
        self.biases = np.concatenate([[0.0], changes])
        self.places = np.flatnonzero(np.append(self.biases[1:] > self.biases[:-1], True))
        self.images = len(ids)
        self._of_row = np.searchsorted(ids, versions[0].image_ids)
        self._found = found

    def sums(self, statistic: SumStatistic) -> tuple[FloatArray, FloatArray]:
        """See :meth:`BiasCurve.sums`."""
        sums = np.stack([sums_per_image(statistic.columns(table), table.image_ids) for table in self._versions])
        return sums[0], sums[self._version, self.image] - sums[self._version - 1, self.image]

    def table(self, place: int) -> Table:
        """See :meth:`BiasCurve.table`."""
        version = (self._found[1:] <= self.biases[place]).sum(axis=0)[self._of_row]
        rows = np.arange(len(version))
        start = self._versions[0]
        columns = {
            name: np.stack([table.columns[name] for table in self._versions])[version, rows]
            for name in start.columns
            if name != "knob"
        }
        return Table(start.image_ids, columns, start.splits, start.items, start.truth)

    def points(
        self, matched: SumStatistic, statistics: Sequence[SumStatistic], most: int = 60
    ) -> list[tuple[float, ...]]:
        """Bias, matched figure and other figures along the curve, from no bias on.

        Args:
            matched: The figure that controls are matched on.
            statistics: The others.
            most: Most points to return; of more, the first and the last and others between them, the closer in the
                matched figure the nearer to the first, where methods are.
        """
        once = np.ones((1, self.images))
        reached, *others = (self.values(statistic, once)[0] for statistic in (matched, *statistics))
        chosen = list(range(len(reached)))
        if len(reached) > most:
            wanted = reached[0] + (reached[-1] - reached[0]) * np.linspace(0, 1, most) ** 2
            chosen = sorted({0, len(reached) - 1, *(int(np.abs(reached - each).argmin()) for each in wanted)})
        figures = np.stack([self.biases[self.places], reached, *others], axis=1)
        return [tuple(row) for row in figures[chosen].tolist()]


class YesBias(BiasCurve):
    """The baseline's yes/no answers under every bias on yes: yes where score plus bias is positive."""

    def __init__(self, table: Table, rows: NDArray[np.int64], scores: FloatArray) -> None:
        """Order the questions.

        Args:
            table: The baseline's.
            rows: int64 [m], its yes/no questions.
            scores: float64 [m], their yes-minus-no logits, finite.
        """
        self._table, self._rows = table, rows
        order = np.argsort(-scores, kind="stable")
        self._order, falling = order, scores[order]
        ends = np.concatenate([[0], np.flatnonzero(np.append(falling[1:] < falling[:-1], True)) + 1])
        levels = falling[ends[1:] - 1]
        thresholds = np.asarray([_threshold(levels, j) for j in range(len(levels) + 1)])
        self.biases = np.full(len(scores) + 1, np.nan)
        self.biases[ends] = 0.0 - thresholds
        self.places = ends[np.argsort(np.abs(thresholds), kind="stable")]
        ids, image = np.unique(table.image_ids, return_inverse=True)
        self.images = len(ids)
        self.image = image[rows][order]

    def sums(self, statistic: SumStatistic) -> tuple[FloatArray, FloatArray]:
        """See :meth:`BiasCurve.sums`."""
        no, yes = (statistic.columns(self.table(place)) for place in (0, len(self._rows)))
        changed = self._rows[self._order]
        return sums_per_image(no, self._table.image_ids), yes[changed] - no[changed]

    def table(self, place: int) -> Table:
        """See :meth:`BiasCurve.table`; columns made of several answers are left out."""
        table = self._table
        columns = {n: table.columns[n] for n in ("label", "score", "margin", "questions") if n in table.columns}
        answers = np.zeros(len(self._rows), dtype=np.int8)
        answers[self._order[:place]] = 1
        prediction, correct = table.prediction.copy(), table.correct.copy()
        prediction[self._rows] = answers
        correct[self._rows] = answers == table.label[self._rows]
        columns |= {"prediction": prediction, "correct": correct, "unparsed": np.zeros(len(table), dtype=np.bool_)}
        return Table(table.image_ids, columns, table.splits, table.items, table.truth)


def _threshold(levels: FloatArray, j: int) -> float:
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
