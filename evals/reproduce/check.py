"""Expected beside measured."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .table import LABELS, Row, Table


@dataclass(frozen=True)
class Measured:
    """A figure of our own, in percent (lengths in words).

    Attributes:
        value: The figure, or its mean over runs.
        low: Lower end of its 95 % interval; None without one.
        high: Upper end.
        spread: Standard deviation over several runs.
    """

    value: float
    low: float | None = None
    high: float | None = None
    spread: float | None = None

    def __str__(self) -> str:
        if self.spread is not None:
            return f"{self.value:.1f} ± {self.spread:.1f}"
        return f"{self.value:.1f}" + ("" if self.low is None else f" [{self.low:.1f}, {self.high:.1f}]")

    def verdict(self, published: float) -> str:
        """Whether a published figure fits."""
        if self.low is None or self.high is None:
            return "" if self.spread is not None else ("same" if abs(self.value - published) < 0.051 else "differs")
        return "inside" if self.low <= published <= self.high else "outside"


def check(table: Table, runs: Sequence[Path]) -> str:
    """Expected beside measured, and the same for the differences to the first row.

    Args:
        table: The published table.
        runs: Run folders of ``vlmfix eval``, or one folder of results of ``vlmfix score``.
    """
    from ..tables import plain_table

    several = len(runs) > 1
    rows = [["", "figure", "published", "measured", "" if several else "published is"]]
    first = table.rows[0]
    for row in table.rows:
        for key, value in row.figures.items():
            found = measured(table, runs, key, row.method)
            rows.append([row.method, key, _with_spread(row, key), str(found), found.verdict(value)])
    for row in table.rows[1:] if table.model is not None else ():
        for key, value in row.figures.items():
            if key in first.figures:
                expected = value - first.figures[key]
                found = measured(table, runs, key, row.method, first.method)
                rows.append(
                    [f"{row.method} - {first.method}", key, f"{expected:+.2f}", str(found), found.verdict(expected)]
                )
    how = f"mean ± standard deviation over {len(runs)} runs" if several else "[95 % interval over images]"
    head = f"{table.source} ({LABELS[table.label]})\nmeasured: {how if table.model else 'the counts have no interval'}"
    return f"{head}\n\n{plain_table(rows)}"


def _with_spread(row: Row, key: str) -> str:
    return f"{row.figures[key]:.2f}" + (f" ± {row.spread[key]:.2f}" if key in row.spread else "")


def measured(table: Table, runs: Sequence[Path], key: str, method: str, baseline: str | None = None) -> Measured:
    """A figure of our runs, or its difference to the baseline's."""
    found = [_measured(table, folder, key, method, baseline) for folder in runs]
    if len(found) == 1:
        return found[0]
    values = [each.value for each in found]
    return Measured(statistics.fmean(values), spread=statistics.stdev(values))


def _measured(table: Table, folder: Path, key: str, method: str, baseline: str | None) -> Measured:
    from vlmfix.errors import DataError
    from vlmfix.files import read_json

    if table.model is None:
        path = folder / f"{method}.json"
        value = read_json(path, what="result of vlmfix score", remedy="run the commands first, with --run")
        return Measured(value["summary"][key.partition(".")[2]] * _scale(key))

    from ..benchmarks.columns import figure_of
    from ..scores.counts import load_run

    benchmark, _, name = key.partition(".")
    tables: Mapping[str, Any] = load_run(folder).benchmarks[benchmark].methods
    for label in (method, baseline):
        if label is not None and label not in tables:
            raise DataError(f"{folder} has no method {label!r}; it has {', '.join(tables)}")
    statistic = mean_f1() if name == "mean_f1" else figure_of(key).statistic
    if baseline is None:
        interval = statistic.interval(tables[method])
    else:
        interval = statistic.difference(tables[method], tables[baseline])
    scale = _scale(key)
    return Measured(interval.estimate * scale, interval.low * scale, interval.high * scale)


def _scale(key: str) -> float:
    from ..benchmarks.columns import figure_of

    return 100.0 if key.endswith("mean_f1") or figure_of(key).percent else 1.0


def mean_f1() -> Any:
    """The mean of the splits' F1, as LLaVA's script prints it."""
    import numpy as np

    from ..stats.figures import SumStatistic

    def columns(table: Any) -> Any:
        yes = table.prediction == 1
        splits = np.asarray(table.splits)
        parts: list[Any] = []
        for split in dict.fromkeys(table.splits):
            here = splits == split
            parts += [2.0 * (yes & table.label & here), (yes.astype(float) + table.label) * here]
        return np.column_stack(parts)

    def value(sums: Any) -> Any:
        with np.errstate(invalid="ignore"):
            return np.nan_to_num(sums[..., 0::2] / sums[..., 1::2]).mean(axis=-1)

    return SumStatistic(columns, value)
