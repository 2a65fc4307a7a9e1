"""The tables of a run beside its summary, made from ``results.json`` alone; every format prints the same ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..benchmarks.columns import figure_of
from ..scores.pareto import pareto_table
from ..tables import Table, difference_cell, interval_cell, number, p_cell

Part = Mapping[str, Any]


def tables(results: Mapping[str, Any], *, tests: bool = False) -> dict[str, Table]:
    """Every table that this run has figures for, by a short name, in the order of a report.

    Args:
        results: The content of ``results.json``.
        tests: Whether the controls' table has p-values, for which a terminal is too narrow.
    """
    found = {
        "quality": quality_table(results),
        "answers": answers_table(results),
        "controls": controls_table(results, tests=tests),
        "front": pareto_table(results),
    }
    for name in benchmarks(results):
        found |= {f"{kind}.{name}": make(results, name) for kind, make in _DETAILS.items()}
    return {name: table for name, table in found.items() if table is not None}


def benchmarks(results: Mapping[str, Any]) -> list[str]:
    """The benchmarks of a run: the parts of a row that say how many answers changed."""
    first = results["methods"][0]
    return [name for name, part in first.items() if isinstance(part, Mapping) and "changed" in part]


def _parts(results: Mapping[str, Any], benchmark: str) -> Iterator[tuple[str, Part]]:
    """Label and part of every row that answered a benchmark."""
    return ((row["label"], row[benchmark]) for row in results["methods"] if benchmark in row)


def quality_table(results: Mapping[str, Any]) -> Table | None:
    """Length, repetition, truncation and length-matched CHAIR_i of every method.

    Without anything to compare, the matched columns are left out; None without texts.
    """
    parts = [each for name in benchmarks(results) for each in _parts(results, name) if "text_quality" in each[1]]
    if not parts:
        return None
    rows = [["method", "words", "rep-4 ↓", "loops ↓", "cut off ↓"]]
    is_compared = any("length_matched" in part["text_quality"] for _, part in parts)
    if is_compared:
        rows[0] += ["CHAIR_i ↓", "none", *["- none", "95 %"] * 2]
    for label, part in parts:
        quality = part["text_quality"]
        rates = [number(quality["summary"].get(name)) for name in ("repetition", "looping", "truncation")]
        row = [label, number(part["summary"]["length_words"], percent=False), *rates]
        matched = quality.get("length_matched")
        if matched is not None and not part["changed"]:
            row.append("= none")
        elif matched is not None:
            words, mentions = matched["words"]["chair_i"], matched["mentions"]["chair_i"]
            row += [number(words["method_value"]), number(words["baseline_value"])]
            for found in (words["difference"], mentions["difference"]):
                row += [difference_cell(found), interval_cell(found)]
        rows.append([*row, *[""] * (len(rows[0]) - len(row))])
    return Table(
        rows,
        "Text quality, and CHAIR at equal length",
        groups=(("", 5), ("at equal words", 4), ("at equal mentions", 2)) if is_compared else (),
        notes=(
            "rep-4: repeated runs of four words, mean per caption; loops: captions with more than half of them "
            "repeated; cut off: by the token limit.",
            "equal words: both captions of an image cut to the shorter one's words; equal mentions: to the first "
            "objects, as many as the one with fewer names.",
        ),
    )


def answers_table(results: Mapping[str, Any]) -> Table | None:
    """McNemar's test and MCC of every method on yes/no questions; None with nothing to compare."""
    reference = results.get("reference", "none")
    rows = [["", "method", "unparsed", "MCC ↑", f"- {reference}", "95 %"]]
    rows[0] += ["questions", "only method", f"only {reference}", "p", "p (Holm)"]
    for name in benchmarks(results):
        parts = list(_parts(results, name))
        if not any("paired" in part for _, part in parts):
            continue
        for label, part in parts:
            whole = part.get("all", part)
            mcc = whole.get("summary", {}).get("mcc")
            row = [name, label, str(whole.get("counts", {}).get("unparsed", "")), "" if mcc is None else number(mcc)]
            if "paired" in part and not part["changed"]:
                row.append(f"= {reference}")
            elif "paired" in part:
                test, difference = part["paired"]["mcnemar"], part["paired"]["mcc"]
                row += [difference_cell(difference), interval_cell(difference)]
                row += [str(test[key]) for key in ("questions", "only_method", "only_baseline")]
                row += [p_cell(test["p_value"]), p_cell(test["p_holm"])]
            rows.append([*row, *[""] * (len(rows[0]) - len(row))])
    note = (
        f"yes/no questions; only: those that only the method, or only {reference}, answers right (each distinct "
        "question once); p: exact McNemar test, which takes questions as independent; unparsed: answers without a "
        "clear yes or no."
    )
    return Table(rows, "Paired answers", words=(1,), notes=(note,)) if len(rows) > 1 else None


VERDICTS = {
    "better": "beats its control",
    "same": "not told apart",
    "worse": "worse than control",
    "unchanged": "no answer changed",
}
"""What a line of the controls' table says."""

CONTROLS_EXPLAINED = (
    "early stop: none's own captions, ended as soon as the end token comes within a fixed margin, chosen so that "
    "recall is the method's. self-verification: none's own captions, without the objects that it denies when asked "
    "for them, up to a probability of yes chosen so that recall is the method's. yes bias: a constant added to none's "
    "yes-minus-no logit, chosen so that the share of yes is the method's. every head and other heads: the same factor "
    "on all heads, and on those the method leaves alone. A method that does not beat its control only moves along the "
    "trade-off. The first three are matched again in every resample, so that the intervals cover that choice."
)


def controls_table(results: Mapping[str, Any], *, tests: bool = False) -> Table | None:
    """Every method against every control of it; None without controls."""
    rows = [["method", "control", "matched", "metric", "method", "control", "difference", "95 %"]]
    rows[0] += [*(["p", "p (Holm)"] if tests else []), "verdict"]
    for line in results.get("controls", ()):
        figure, difference = figure_of(line["metric"]), line.get("difference")
        p_values = [p_cell((difference or {}).get(name)) for name in ("p_value", "p_holm")] if tests else []
        rows.append(
            [
                line["method"],
                line["control"],
                line.get("matched", ""),
                figure.full_heading,
                number(line.get("method_value"), percent=figure.percent),
                number(line.get("control_value"), percent=figure.percent),
                difference_cell(difference, percent=figure.percent),
                interval_cell(difference, percent=figure.percent),
                *p_values,
                VERDICTS[line.get("verdict_holm", line["verdict"])],
            ]
        )
    notes = (CONTROLS_EXPLAINED, *_asking(results))
    return Table(rows, "Controls", words=(1, 2, 3, -1), notes=notes) if len(rows) > 1 else None


def _asking(results: Mapping[str, Any]) -> Iterator[str]:
    """What self-verification cost."""
    cost = results.get("self_verification")
    if cost:
        took = f"{100 * cost['pace']:.0f} % of the time of the captions" if cost["pace"] else "no time"
        yield (
            f"self-verification: {cost['questions']} questions about {cost['captions']} captions of none, once for all "
            f"methods, took {took}."
        )


_TITLES = {"f1": "F1", "yes_ratio": "yes", "auc": "AUC", "mcc": "MCC"}


def _split_table(results: Mapping[str, Any], benchmark: str) -> Table | None:
    """A benchmark's figures per method and split of its questions."""
    splits = results["methods"][0][benchmark].get("splits")
    if not splits:
        return None
    names = list(results["methods"][0][benchmark]["all"]["summary"])
    rows = [["method", "split", "n", *(_TITLES.get(name, name) for name in names), "unparsed"]]
    for label, part in _parts(results, benchmark):
        for split in (*splits, "all"):
            summary, counts = part[split]["summary"], part[split]["counts"]
            figures = [number(summary.get(name)) for name in names]
            rows.append([label, split, str(counts["n"]), *figures, str(counts["unparsed"])])
    return Table(rows, f"{benchmark.upper()} by split", words=(1,), is_detail=True)


def _counts_table(results: Mapping[str, Any], benchmark: str) -> Table | None:
    """The integers behind a benchmark's figures, a column per method."""
    columns = {
        label: _flat({**part["counts"], **{name: part[name] for name in ("changed", "truncated") if name in part}})
        for label, part in _parts(results, benchmark)
        if part.get("counts")
    }
    names = dict.fromkeys(name for counts in columns.values() for name in counts)
    rows = [["", *columns], *([name, *(str(counts.get(name, "")) for counts in columns.values())] for name in names)]
    return Table(rows, f"{benchmark.upper()} counts", is_detail=True) if columns else None


def _flat(counts: Mapping[str, Any], above: str = "") -> dict[str, int]:
    """Counts of a benchmark's parts beside those of the whole: ``position: both correct``."""
    found: dict[str, int] = {}
    for key, value in counts.items():
        name = above + key.replace("_", " ")
        found |= _flat(value, f"{name}: ") if isinstance(value, Mapping) else {name: value}
    return found


def _breakdown_table(results: Mapping[str, Any], benchmark: str) -> Table | None:
    """The figures of a benchmark's parts: tasks, dimensions, conditions."""
    parts = [(label, part["breakdown"]) for label, part in _parts(results, benchmark) if part.get("breakdown")]
    titles = list(dict.fromkeys(title for _, part in parts for row in part.values() for title in row))
    rows = [["method", "part", *titles]]
    for label, part in parts:
        for row, figures in part.items():
            rows.append([label, row, *(number(figures.get(title), percent=False) for title in titles)])
    return Table(rows, f"{benchmark.upper()} by part", words=(1,), is_detail=True) if parts else None


_DETAILS = {"splits": _split_table, "counts": _counts_table, "parts": _breakdown_table}
