"""Corrections for several comparisons, and a word per method: does it do more than a shifted threshold would?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..benchmarks.base import EARLY_STOP, SELF_VERIFICATION, YES_BIAS
from ..benchmarks.columns import benchmarks_of, changed_methods, figure_of
from ..stats.bootstrap import CONFIDENCE
from ..stats.tests import holm_by_name
from ..tables import is_certain, survives

ALPHA = 1 - CONFIDENCE

PLAIN_CONTROLS = {
    EARLY_STOP: "ending captions earlier",
    YES_BIAS: "shifting the yes/no threshold",
    SELF_VERIFICATION: "asking the model about its captions",
}
"""The controls that every method has to beat, and what each does."""

WORDS = {
    "better": "beats a plain control (early stop, yes bias, self-verification) and loses to none",
    "worse": "loses to such a control and beats none",
    "mixed": "beats one and loses to another",
    "trade-off": "differs from none in a headline figure, and is not told apart from controls",
    "unclear": "nothing is told apart, neither from none nor from the controls",
    "loops": "more captions loop or are cut off at the token limit than with none; its other figures mean little",
    "unchanged": "no answer changed",
}
"""What each word says. All of them go by Holm-corrected 95 % intervals."""

FALSE_WORDS = (
    "all that decides a word is one family (Holm), so that at most 5 % of runs say better, worse, mixed or loops of "
    "methods that equal their controls; trade-off is corrected over methods and over the headline figures, so that at "
    "most 5 % of methods that equal none get it"
)


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


def correct_controls(controls: Sequence[dict[str, Any]], rows: Iterable[Mapping[str, Any]]) -> None:
    """Give every line of the controls ``p_holm`` and ``verdict_holm``, and the tests of broken text ``p_word``.

    Everything that decides a method's word (see :data:`WORDS`) is one family over all methods that changed an answer:
    the lines of the plain controls, and whether captions loop or are cut off. So at most 5 % of runs give
    any word to methods that are equal to their controls. A test of rates that are the same in both
    methods cannot reject, and does not count. Of the other controls a family is one figure over the methods.

    Args:
        controls: The lines.
        rows: The methods' rows of ``results.json``.
    """
    words = {f"{row['label']} {name}": test for row in rows for name, test in broken_text(row).items() if _moved(test)}
    families: dict[tuple[str, ...], dict[str, dict[str, Any]]] = {}
    for line in controls:
        test = line["difference"]
        if line["verdict"] == "unchanged":
            test["p_holm"] = test["p_value"]
        elif line["control"] in PLAIN_CONTROLS:
            words[f"{line['method']} {line['control']} {line['metric']}"] = test
        else:
            families.setdefault((line["control"], line["metric"]), {})[line["method"]] = test
    for family in families.values():
        _correct(family)
    for name, p_value in holm_by_name({name: test["p_value"] for name, test in words.items()}).items():
        words[name]["p_word"] = p_value
    for line in controls:
        test = line["difference"]
        if "p_word" in test:
            test["p_holm"] = test.pop("p_word")
        decided = line["verdict"] in ("better", "worse")
        kept = not decided or survives(test, alpha=ALPHA)
        line["verdict_holm"] = line["verdict"] if kept else "same"


def broken_text(row: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The differences in captions that loop or are cut off, of a row that changed captions."""
    found: dict[str, dict[str, Any]] = {}
    for name in benchmarks_of(row):
        if row[name].get("changed"):
            differences = row[name].get("text_quality", {}).get("differences", {})
            found |= {f"{name} {each}": differences[each] for each in ("looping", "truncation") if each in differences}
    return found


def _moved(test: Mapping[str, Any]) -> bool:
    return not test["low"] == test["high"] == 0


def _tests(row: Mapping[str, Any]) -> Iterable[tuple[str, dict[str, Any]]]:
    """Everything in a row that has a p-value, named benchmark.figure."""
    yield from row.get("differences", {}).items()
    for benchmark in benchmarks_of(row):
        quality = row[benchmark].get("text_quality", {})
        for way, part in quality.get("length_matched", {}).items():
            for figure in ("chair_i", "chair_s"):
                yield f"{benchmark}.{way}.{figure}", part[figure]["difference"]
        for figure, test in quality.get("differences", {}).items():
            yield f"{benchmark}.text.{figure}", test
        for name, test in row[benchmark].get("paired", {}).items():
            yield f"{benchmark}.{name}", test


def _correct(family: Mapping[str, dict[str, Any]]) -> None:
    corrected = holm_by_name({label: test["p_value"] for label, test in family.items()})
    for label, test in family.items():
        test["p_holm"] = corrected[label]


def verdict(results: Mapping[str, Any], method: Mapping[str, Any]) -> str:
    """The word for one row of ``results.json``: empty for the baseline, for head controls and without controls.

    Args:
        results: The content of ``results.json``, or what ``vlmfix compare`` writes.
        method: One of its ``methods``; one that carries its word (``verdict``) keeps it.
    """
    if "verdict" in method:
        return str(method["verdict"])
    lines = [
        line
        for line in results.get("controls", ())
        if line["method"] == method["label"] and line["control"] in PLAIN_CONTROLS
    ]
    if method["role"] != "method" or not lines:
        return ""
    if method["label"] not in set(changed_methods(results)):
        return "unchanged"
    if _loops(method):
        return "loops"
    decided = {str(line.get("verdict_holm", line["verdict"])) for line in lines} & {"better", "worse"}
    if len(decided) == 2:
        return "mixed"
    if decided:
        return decided.pop()
    return "trade-off" if _differs(method) else "unclear"


def verdict_legend(words: Iterable[str]) -> str:
    """What the given words say, one after the other; empty without any."""
    used = set(words)
    told = [f"{word}: {says}" for word, says in WORDS.items() if word in used]
    return "; ".join([*told, FALSE_WORDS]) if told else ""


def _differs(method: Mapping[str, Any]) -> bool:
    """Whether a method differs from the baseline in a headline figure, which is one chance of several to do so."""
    tests = {key: test for key, test in method.get("differences", {}).items() if figure_of(key).headline}
    over_figures = holm_by_name({key: test.get("p_value") for key, test in tests.items()})
    return any(is_certain(test) and survives({"p_holm": over_figures[key]}) for key, test in tests.items())


def _loops(method: Mapping[str, Any]) -> bool:
    """Whether text breaks: significantly more captions that loop, or that the limit ends."""
    tests = broken_text(method).values()
    return any(
        is_certain({**test, "p_holm": test.get("p_word", test.get("p_holm"))}) and test["low"] > 0 for test in tests
    )
