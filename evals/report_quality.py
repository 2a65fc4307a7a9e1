"""The small tables: text quality of captions, paired answers to POPE, and the counts behind the result table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .tables import difference_cell, interval_cell, number, p_cell

Rows = list[list[str]]

_OWN_COLUMNS = 5  # of the text quality table: what needs no baseline

QUALITY_LEGEND = (
    "rep-4: repeated runs of four words, mean per caption; loops: captions with more than half of them repeated; cut "
    "off: by the token limit.",
    "equal words: both captions of an image cut to the shorter one's words; equal mentions: to the first objects, as "
    "many as the one with fewer names.",
)
ANSWERS_LEGEND = (
    "only: questions that only the method, or only none, answers right (each distinct question once); p: exact McNemar "
    "test, which takes questions as independent.",
)


def quality_rows(results: Mapping[str, Any]) -> Rows:
    """Length, repetition, truncation and length-matched CHAIR_i of every method; empty without captions.

    The first two rows are headings (groups, columns). Without anything to compare, the matched columns are left out.
    """
    parts = [(m["label"], m["chair"]) for m in results["methods"] if "text_quality" in m.get("chair", {})]
    if not parts:
        return []
    rows = [
        ["", *[""] * 4, "at equal words", "", "", "", "at equal", "mentions"],
        ["method", "words", "rep-4 ↓", "loops ↓", "cut off ↓", "CHAIR_i ↓", "none", *["- none", "95 %"] * 2],
    ]
    for label, part in parts:
        quality = part["text_quality"]
        rates = [number(quality["summary"].get(name)) for name in ("repetition", "looping", "truncation")]
        row = [label, number(part["summary"]["length_words"], percent=False), *rates]
        matched = quality.get("length_matched")
        if matched is None:  # The baseline itself.
            rows.append([*row, *[""] * 6])
        elif not part["changed"]:
            rows.append([*row, "= none", *[""] * 5])
        else:
            words, mentions = matched["words"]["chair_i"], matched["mentions"]["chair_i"]
            cells = [number(words["method_value"]), number(words["baseline_value"])]
            for found in (words["difference"], mentions["difference"]):
                cells += [difference_cell(found), interval_cell(found)]
            rows.append([*row, *cells])
    compared = any("length_matched" in part["text_quality"] for _, part in parts)
    return rows if compared else [row[:_OWN_COLUMNS] for row in rows]


def answers_rows(results: Mapping[str, Any]) -> Rows:
    """MCC and McNemar's test of every method; empty without POPE, or with nothing to compare."""
    methods = [m for m in results["methods"] if "pope" in m]
    if not any("paired" in m["pope"] for m in methods):
        return []
    reference = results.get("reference", "none")
    rows = [
        ["POPE", "MCC ↑", f"- {reference}", "95 %", "questions", "only method", f"only {reference}", "p", "p (Holm)"]
    ]
    for method in methods:
        part = method["pope"]
        row = [method["label"], number(part["all"]["summary"]["mcc"])]
        paired = part.get("paired")
        if paired is None:
            rows.append([*row, *[""] * 7])
        elif not part["changed"]:
            rows.append([*row, f"= {reference}", *[""] * 6])
        else:
            test = paired["mcnemar"]
            counts = [str(test[name]) for name in ("questions", "only_method", "only_baseline")]
            cells = [difference_cell(paired["mcc"]), interval_cell(paired["mcc"])]
            rows.append([*row, *cells, *counts, p_cell(test["p_value"]), p_cell(test["p_holm"])])
    return rows


def split_rows(results: Mapping[str, Any]) -> Rows:
    """POPE's figures of every method and split, the headings first."""
    splits = results["methods"][0]["pope"]["splits"]
    names = ("accuracy", "precision", "recall", "f1", "yes_ratio", "auc", "mcc")
    rows = [["method", "split", "n", "accuracy", "precision", "recall", "F1", "yes", "AUC", "MCC", "unparsed"]]
    for method in results["methods"]:
        for split in (*splits, "all"):
            part = method["pope"][split]
            figures = [number(part["summary"].get(name)) for name in names]
            rows.append([method["label"], split, str(part["counts"]["n"]), *figures, str(part["counts"]["unparsed"])])
    return rows


def caption_rows(results: Mapping[str, Any]) -> Rows:
    """CHAIR's integer counts of every method, the headings first."""
    rows = [
        ["method", "captions", "changed", "truncated", "mentions", "hallucinated", "distinct", "recalled", "objects"]
    ]
    names = ("mentions", "hallucinated_mentions", "generated_distinct", "recalled_gt_objects", "gt_objects")
    for method in results["methods"]:
        part = method["chair"]
        counts = part["counts"]
        figures = [str(counts[name]) for name in names]
        rows.append([method["label"], str(counts["captions"]), str(part["changed"]), str(part["truncated"]), *figures])
    return rows
