"""What stands beside the main figures of a run: text quality, CHAIR at equal length, paired answers, corrections."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .columns import BENCHMARKS
from .intervals import CONFIDENCE, RESAMPLES, Interval
from .metrics.chair import ChairMatcher, ChairTable
from .metrics.pope import PopeTable
from .metrics.text_quality import TextTable, match_by_mentions, match_by_words, score_texts
from .significance import holm_by_name, mcnemar
from .stats import CHAIR_STATISTICS, POPE_STATISTICS, TEXT_STATISTICS, Statistic, paired_bootstrap
from .tables import finite, survives

ALPHA = 1 - CONFIDENCE


def interval_dict(interval: Interval) -> dict[str, Any]:
    """An interval for JSON, undefined numbers as null."""
    return finite(asdict(interval))


def text_quality(captions: Mapping[int, str], truncated: Mapping[int, bool]) -> dict[str, Any]:
    """Repetition and truncation of one method's captions.

    Args:
        captions: Image id -> caption.
        truncated: Image id -> whether the token limit ended it.
    """
    table = score_texts(captions, truncated)
    return {"counts": table.counts(), "summary": finite(table.summary())}


def text_differences(table: TextTable, baseline: TextTable, seed: int) -> dict[str, Any]:
    """Paired differences of a method's rates of repetition, loops and truncated captions to the baseline's."""
    return {name: _difference(statistic, table, baseline, seed) for name, statistic in TEXT_STATISTICS.items()}


def length_matched(
    captions: tuple[Mapping[int, str], Mapping[int, str]],
    tables: tuple[ChairTable, ChairTable],
    truth: Mapping[int, Collection[str]],
    matcher: ChairMatcher,
    seed: int,
) -> dict[str, Any]:
    """CHAIR at equal words and at equal mentions, with the paired difference.

    Args:
        captions: Of the method and of the baseline, image id -> caption.
        tables: Their CHAIR tables.
        truth: Image id -> objects in the image.
        matcher: The matcher of both tables.
        seed: Seed of the bootstrap.
    """
    found = {
        "words": match_by_words(*captions, *tables, truth, matcher),
        "mentions": match_by_mentions(*tables, truth),
    }
    return {
        name: {
            "counts": {"method": own.counts(), "baseline": other.counts()},
            **{key: _compared(CHAIR_STATISTICS[key], own, other, seed) for key in ("chair_i", "chair_s")},
        }
        for name, (own, other) in found.items()
    }


def _compared(statistic: Statistic, own: Any, other: Any, seed: int) -> dict[str, Any]:
    return {
        **finite({"method_value": statistic.of(own), "baseline_value": statistic.of(other)}),
        "difference": _difference(statistic, own, other, seed),
    }


def _difference(statistic: Statistic, own: Any, other: Any, seed: int) -> dict[str, Any]:
    return interval_dict(
        paired_bootstrap(statistic, own, other, n_resamples=RESAMPLES, seed=seed, confidence=CONFIDENCE)
    )


def paired_answers(
    table: PopeTable, baseline: PopeTable, distinct: Sequence[int] | NDArray[np.int64], seed: int
) -> dict[str, Any]:
    """McNemar's test and the difference in MCC of a method's answers to the baseline's.

    Args:
        table: The method's answers.
        baseline: The baseline's answers to the same questions.
        distinct: Rows with every question once: the splits share their positives, and one answer counted three times
            would make the test see more evidence than there is.
        seed: Seed of the bootstrap.
    """
    test = mcnemar(table.take(distinct), baseline.take(distinct))
    return {
        "mcnemar": {
            "questions": len(distinct),
            "only_method": test.only_a,
            "only_baseline": test.only_b,
            "p_value": test.p_value,
        },
        "mcc": _difference(POPE_STATISTICS["mcc"], table, baseline, seed),
    }


def correct_rows(rows: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Give every difference to the baseline its p-value after Holm's correction (``p_holm``).

    A family is one figure over all rows that changed at least one answer of its benchmark; a row that changed nothing
    is no test. With B resamples no p-value is below 2 / (B + 1), so that a family of more than 0.05 (B + 1) / 2 rows
    (50 at 2,000) cannot reject anything.

    Returns:
        What was done, for ``results.json``.
    """
    families: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        for name, test in _tests(row):
            benchmark = name.partition(".")[0]
            if row[benchmark]["changed"]:
                families.setdefault(name, {})[str(row["label"])] = test
            else:
                test["p_holm"] = test["p_value"]
    for family in families.values():
        _correct(family)
    return {
        "method": "Holm",
        "alpha": round(ALPHA, 10),
        "family": "one figure, over the rows that changed an answer",
        "rows": max((len(family) for family in families.values()), default=0),
    }


def correct_controls(controls: Sequence[dict[str, Any]]) -> None:
    """Give every line of the controls ``p_holm`` and ``verdict_holm``.

    A family is one figure against one kind of control, over the methods that changed an answer.
    """
    families: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for line in controls:
        if line["verdict"] == "unchanged":
            line["difference"]["p_holm"] = line["difference"]["p_value"]
        else:
            families.setdefault((line["control"], line["metric"]), {})[line["method"]] = line["difference"]
    for family in families.values():
        _correct(family)
    for line in controls:
        decided = line["verdict"] in ("better", "worse")
        kept = not decided or survives(line["difference"], alpha=ALPHA)
        line["verdict_holm"] = line["verdict"] if kept else "same"


def _tests(row: Mapping[str, Any]) -> Iterable[tuple[str, dict[str, Any]]]:
    """Everything in a row that has a p-value, named benchmark.figure."""
    yield from row.get("differences", {}).items()
    matched = row.get("chair", {}).get("text_quality", {}).get("length_matched", {})
    for way, part in matched.items():
        for figure in ("chair_i", "chair_s"):
            yield f"chair.{way}.{figure}", part[figure]["difference"]
    for figure, test in row.get("chair", {}).get("text_quality", {}).get("differences", {}).items():
        yield f"chair.text.{figure}", test
    for benchmark in BENCHMARKS:
        for name, test in row.get(benchmark, {}).get("paired", {}).items():
            yield f"{benchmark}.{name}", test


def _correct(family: Mapping[str, dict[str, Any]]) -> None:
    corrected = holm_by_name({label: test["p_value"] for label, test in family.items()})
    for label, test in family.items():
        test["p_holm"] = corrected[label]
