"""One word per method: does it do more than a shift of a threshold would have done?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ..benchmarks.base import EARLY_STOP, YES_BIAS
from ..benchmarks.columns import changed_methods
from ..tables import is_certain
from .differences import broken_text

FREE_CONTROLS = {EARLY_STOP: "ending captions earlier", YES_BIAS: "shifting the yes/no threshold"}
"""The controls that need no method, and what each does."""


WORDS = {
    "better": "beats a control that needs no method (early stop, yes bias) and loses to neither",
    "worse": "loses to such a control and beats neither",
    "mixed": "beats one and loses to another",
    "trade-off": "differs from none in a figure (corrected over methods only), and is not told apart from controls",
    "unclear": "nothing is told apart, neither from none nor from the controls",
    "loops": "more captions loop or are cut off at the token limit than with none; its other figures mean little",
    "unchanged": "no answer changed",
}
"""What each word says. All of them go by Holm-corrected 95 % intervals."""

FALSE_WORDS = (
    "all that decides a word is one family (Holm), so that at most 5 % of runs say better, worse, mixed or loops of "
    "methods that equal their controls"
)


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
        if line["method"] == method["label"] and line["control"] in FREE_CONTROLS
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
    told_apart = any(is_certain(found) for found in method.get("differences", {}).values())
    return "trade-off" if told_apart else "unclear"


def verdict_legend(words: Iterable[str]) -> str:
    """What the given words say, one after the other; empty without any."""
    used = set(words)
    told = [f"{word}: {says}" for word, says in WORDS.items() if word in used]
    return "; ".join([*told, FALSE_WORDS]) if told else ""


def _loops(method: Mapping[str, Any]) -> bool:
    """Whether text breaks: significantly more captions that loop, or that the limit ends."""
    tests = broken_text(method).values()
    return any(
        is_certain({**test, "p_holm": test.get("p_word", test.get("p_holm"))}) and test["low"] > 0 for test in tests
    )
