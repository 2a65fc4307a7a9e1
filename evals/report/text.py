"""The result table: for a terminal of 120 columns, and as Markdown. Both are made from ``results.json`` alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from textwrap import wrap
from typing import Any

from ..benchmarks.columns import BENCHMARKS, BY_KEY, Metric, changed_methods, figure, seconds, used_metrics
from ..scores.pareto import LEGEND as PARETO_LEGEND
from ..scores.pareto import pareto_rows
from ..scores.verdicts import verdict, verdict_legend
from ..tables import difference_cell, fitting_table, interval_cell, markdown_table, number, p_cell, plain_table

Rows = list[list[str]]


PAIRED_LEGEND = (
    "yes/no questions; only: those that only the method, or only none, answers right (each distinct question once); p: "
    "exact McNemar test, which takes questions as independent; unparsed: answers without a clear yes or no.",
)


def about_lines(results: Mapping[str, Any]) -> list[str]:
    """One line per benchmark on what was asked and how it was read, with its prompt."""
    first, settings = results["methods"][0], results["settings"]
    asked = [name for name in BENCHMARKS if "about" in first.get(name, {})]
    return [f"{first[name]['about']}; prompt {settings[name]['prompt']!r}" for name in asked]


def breakdowns(results: Mapping[str, Any]) -> Iterator[tuple[str, Rows]]:
    """Benchmark and table of every benchmark that has parts (tasks, dimensions, conditions), the headings first."""
    for name in BENCHMARKS:
        parts = {m["label"]: m[name]["breakdown"] for m in results["methods"] if m.get(name, {}).get("breakdown")}
        if not parts:
            continue
        titles = list(dict.fromkeys(title for part in parts.values() for row in part.values() for title in row))
        rows = [["method", "part", *titles]]
        for label, part in parts.items():
            for row, figures in part.items():
                rows.append([label, row, *(number(figures.get(title), percent=False) for title in titles)])
        yield name, rows


def paired_rows(results: Mapping[str, Any]) -> Rows:
    """McNemar's test and MCC of every method and benchmark with yes/no questions; empty with nothing to compare."""
    reference = results.get("reference", "none")
    rows = [["", "method", "unparsed", f"MCC - {reference}", "95 %", "questions", "only method", f"only {reference}"]]
    rows[0] += ["p", "p (Holm)"]
    for name in BENCHMARKS:
        for method in results["methods"]:
            part = method.get(name, {})
            if "about" not in part or "paired" not in part:
                continue
            row = [name, method["label"], str(part["counts"]["unparsed"])]
            if not part["changed"]:
                rows.append([*row, f"= {reference}", *[""] * 6])
                continue
            test, mcc = part["paired"]["mcnemar"], part["paired"]["mcc"]
            counts = [str(test[key]) for key in ("questions", "only_method", "only_baseline")]
            tested = [p_cell(test["p_value"]), p_cell(test["p_holm"])]
            rows.append([*row, difference_cell(mcc), interval_cell(mcc), *counts, *tested])
    return rows if len(rows) > 1 else []


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


VERDICTS = {
    "better": "beats its control",
    "same": "not told apart",
    "worse": "worse than control",
    "unchanged": "no answer changed",
}
"""What a line of the controls' table says."""


CONTROLS_EXPLAINED = (
    "*early stop*: `none`'s own captions, ended as soon as the end token comes within a fixed margin, chosen so that "
    "recall is the method's. *yes bias*: a constant added to `none`'s yes-minus-no logit, chosen so that the share of "
    "yes is the method's. *every head* and *other heads*: the same factor on all heads, and on those the method leaves "
    "alone. A method that does not beat its control only moves along the trade-off."
)


def main_table(results: Mapping[str, Any], width: int) -> str:
    """Figures, paired differences and verdicts; one table per benchmark where all together are wider than ``width``.

    Args:
        results: The content of ``results.json``; rows are compared with ``results["reference"]``, by default ``none``.
        width: Columns of the terminal.
    """
    metrics = used_metrics(results)
    whole = fitting_table(main_rows(results, metrics), width)
    if _width(whole) <= width:
        return whole
    groups = [list(group) for _, group in groupby(metrics, key=lambda metric: metric.benchmark)]
    last = len(groups) - 1
    tables = [main_rows(results, group, closing=i == last) for i, group in enumerate(groups)]
    return "\n\n".join(fitting_table(rows, width) for rows in tables)


def _width(table: str) -> int:
    return max(map(len, table.split("\n")))


def main_rows(results: Mapping[str, Any], metrics: Sequence[Metric], *, closing: bool = True) -> Rows:
    """Two headings, then up to three rows per method: figures, differences, intervals.

    Args:
        results: The content of ``results.json``.
        metrics: Columns.
        closing: Whether seconds and the verdict follow the figures.
    """
    reference = results.get("reference", "none")
    timed = closing and _timed(results)
    words = {method["label"]: verdict(results, method) for method in results["methods"]} if closing else {}
    judged = any(words.values())
    more = [*(["seconds"] if timed else []), *(["verdict"] if judged else [])]
    rows = [["", *(_group(metrics, i) for i in range(len(metrics))), *[""] * len(more)]]
    rows.append(["method", *(metric.heading for metric in metrics), *more])
    changed = set(changed_methods(results))
    for method in results["methods"]:
        closing_cells = [number(seconds(method), percent=False)] if timed else []
        closing_cells += [words[method["label"]]] if judged else []
        rows.append([method["label"], *(value_cell(method, m) for m in metrics), *closing_cells])
        if "differences" not in method:
            continue
        if method["label"] not in changed:
            rows.append([f"  = {reference}", *[""] * (len(metrics) + len(more))])
            continue
        found = [(method["differences"].get(metric.key), metric) for metric in metrics]
        blank = [""] * len(more)
        rows.append([f"  - {reference}", *(difference_cell(d, percent=m.percent) for d, m in found), *blank])
        rows.append(["  95 %", *(interval_cell(d, percent=m.percent) for d, m in found), *blank])
    return rows


def markdown_main(results: Mapping[str, Any]) -> str:
    """The main table as Markdown, one row per method with its intervals in the cells."""
    metrics = used_metrics(results)
    timed = _timed(results)
    words = {method["label"]: verdict(results, method) for method in results["methods"]}
    judged = any(words.values())
    more = [*(["seconds"] if timed else []), *(["verdict"] if judged else [])]
    rows = [["method", *map(long_heading, metrics), *more]]
    for method in results["methods"]:
        cells = []
        for metric in metrics:
            cell = value_cell(method, metric)
            found = method.get("differences", {}).get(metric.key)
            if found is not None:
                interval = interval_cell(found, percent=metric.percent).replace(",", ", ")
                cell += f"<br>{difference_cell(found, percent=metric.percent)} [{interval}]"
            cells.append(cell)
        cells += [number(seconds(method), percent=False)] if timed else []
        rows.append([_markdown_name(method), *cells, *([words[method["label"]]] if judged else [])])
    return markdown_table(rows)


def long_heading(metric: Metric) -> str:
    """A heading that names its benchmark: ``CHAIR i ↓``."""
    title = metric.title.removeprefix("CHAIR_")
    return f"{metric.benchmark.upper()} {title}{metric.heading.removeprefix(metric.title)}"


def _markdown_name(method: Mapping[str, Any]) -> str:
    name = f"`{method['describe']}`"
    if "run" in method and method["describe"] != method["label"]:
        name = f"`{method['label']}` {method['describe']}"
    return f"control {name}" if method["role"] == "control" else name


def _timed(results: Mapping[str, Any]) -> bool:
    return any(seconds(method) > 0 for method in results["methods"])


def controls_text(results: Mapping[str, Any]) -> str:
    """The controls' table for a terminal: words to the left, figures to the right."""
    rows = control_rows(results)
    left = 3  # The first columns are words.
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            c.ljust(w) if i < left or i == len(row) - 1 else c.rjust(w)
            for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def control_rows(results: Mapping[str, Any]) -> Rows:
    """Every method against every control of it, the headings first."""
    rows = [["method", "control", "matched", "metric", "method", "control", "difference", "95 %", "verdict"]]
    for control in results["controls"]:
        metric = BY_KEY[control["metric"]]
        difference = control.get("difference")
        rows.append(
            [
                control["method"],
                control["control"],
                control.get("matched", ""),
                metric.heading if metric.benchmark in ("chair", "pope") else long_heading(metric),
                number(control.get("method_value"), percent=metric.percent),
                number(control.get("control_value"), percent=metric.percent),
                difference_cell(difference, percent=metric.percent),
                interval_cell(difference, percent=metric.percent),
                VERDICTS[control.get("verdict_holm", control["verdict"])],
            ]
        )
    return rows


def pareto_text(rows: Rows) -> str:
    """The table of :func:`vlmfix.evals.scores.pareto.pareto_rows` for a terminal, the names to the left."""
    names = max(len(row[1]) for row in rows)
    who = max(len(row[-1]) for row in rows)
    return plain_table([[f"{row[0]:<6}{row[1]:<{names}}", *row[2:-1], f"{row[-1]:<{who}}"] for row in rows])


def _group(metrics: Sequence[Metric], index: int) -> str:
    """The benchmark's name above its first column."""
    first = index == 0 or metrics[index].benchmark != metrics[index - 1].benchmark
    return metrics[index].benchmark.upper() if first else ""


def value_cell(method: Mapping[str, Any], metric: Metric) -> str:
    """A row's figure."""
    return number(figure(method, metric), percent=metric.percent)


TERMINAL_WIDTH = 120


def text_report(results: Mapping[str, Any]) -> str:
    """What ``vlmfix eval`` ends with: conditions, one table, the controls; at most 120 columns wide."""
    about = set(about_lines(results))
    head = _wrapped(
        line if len(line) <= TERMINAL_WIDTH or line in about else line[: TERMINAL_WIDTH - 3] + "..."
        for line in conditions(results)
    )
    head += _wrapped(f"NOTE {note}" for note in results["notes"])
    parts = [*head, "", main_table(results, TERMINAL_WIDTH), "", *_wrapped(legend(results))]
    for more, explained in (
        (quality_rows(results), QUALITY_LEGEND),
        (answers_rows(results), ANSWERS_LEGEND),
        (paired_rows(results), PAIRED_LEGEND),
    ):
        if more:
            parts += [
                "",
                fitting_table(more, TERMINAL_WIDTH),
                "",
                *_wrapped(explained),
            ]
    if results.get("controls"):
        parts += ["", controls_text(results)]
    front = pareto_rows(results)
    if front:
        parts += ["", pareto_text(front), "", *_wrapped([PARETO_LEGEND])]
    return "\n".join(parts)


def _wrapped(lines: Iterable[str]) -> list[str]:
    return [part for line in lines for part in wrap(line, TERMINAL_WIDTH, subsequent_indent="  ")]


def markdown_report(results: Mapping[str, Any]) -> str:
    """``report.md``: everything a reader needs to judge and repeat the run."""
    parts = ["# vlmfix evaluation", "", *(f"- {line}" for line in conditions(results)), ""]
    parts += [markdown_main(results), "", *(line for text in markdown_legend(results) for line in (text, ""))]
    if results.get("controls"):
        parts += ["## Controls", "", CONTROLS_EXPLAINED, "", markdown_table(control_rows(results)), ""]
    front = pareto_rows(results)
    if front:
        parts += ["## Hallucination, recall, seconds", "", PARETO_LEGEND, "", markdown_table(front), ""]
    if "pope" in results["methods"][0]:
        parts += ["## POPE by split", "", markdown_table(split_rows(results)), ""]
    if "chair" in results["methods"][0]:
        parts += ["## Captions", "", markdown_table(caption_rows(results)), ""]
    quality = quality_rows(results)
    if quality:
        heading = quality[1]
        named = [*heading[:5], *(f"equal words: {name}" for name in heading[5:9])]
        named += [f"equal mentions: {name}" for name in heading[9:]]
        parts += ["## Text quality", "", *QUALITY_LEGEND, "", markdown_table([named, *quality[2:]]), ""]
    answers = answers_rows(results)
    if answers:
        parts += ["## Paired answers", "", *ANSWERS_LEGEND, "", markdown_table(answers), ""]
    paired = paired_rows(results)
    if paired:
        parts += ["## Paired answers, other benchmarks", "", *PAIRED_LEGEND, "", markdown_table(paired), ""]
    for name, rows in breakdowns(results):
        parts += [f"## {name.upper()} by part", "", markdown_table(rows), ""]
    if results["notes"]:
        parts += ["## Notes", "", *(f"- {note}" for note in results["notes"]), ""]
    parts += [
        "## Repeat",
        "",
        "```",
        results["command"],
        "```",
        "",
        "Image ids, prompts, weights and versions are in `config.json`; raw answers in `answers.jsonl`.",
        "",
    ]
    return "\n".join(parts)


def conditions(results: Mapping[str, Any]) -> list[str]:
    """N, mode, prompts, decoding and versions, one line each."""
    settings = results["settings"]
    model, versions = settings["model"], settings["versions"]
    lines = [
        f"model {results['model']} ({model['weights'][:19]}), {model['dtype']}, greedy, batch {results['batch_size']}",
        f"data {results['data']}, seed {settings['seed']}; vlmfix {versions['vlmfix']} "
        f"({versions['vlmfix_source'][:8]}), torch {versions['torch']}, transformers {versions['transformers']}",
    ]
    first = results["methods"][0]
    if "chair" in first:
        chair = settings["chair"]
        lines.append(
            f"CHAIR {chair['mode']} mode, {first['chair']['counts']['captions']} captions of at most "
            f"{chair['max_new_tokens']} new tokens; prompt {chair['prompt']!r}"
        )
    if "pope" in first:
        pope, part = settings["pope"], first["pope"]
        sizes = ", ".join(f"{split} {part[split]['counts']['n']}" for split in part["splits"])
        lines.append(
            f"POPE {part['parser']} parser, {part['all']['counts']['n']} questions ({sizes}) on "
            f"{len(pope['image_ids'])} images; prompt {pope['prompt']!r}"
        )
    return [*lines, *about_lines(results)]


def markdown_legend(results: Mapping[str, Any]) -> list[str]:
    """How to read the table in Markdown, where differences and intervals stand in one cell with the figure."""
    resamples, reference = results["intervals"]["resamples"], results.get("reference", "none")
    below = (
        f"Below each figure: the paired difference to `{reference}` in points, and its 95 % interval over {resamples}"
    )
    return [f"{below} resamples of the images.", *legend(results)[1:]]


def legend(results: Mapping[str, Any]) -> list[str]:
    """How to read the table, and what the short method names stand for."""
    names = "; ".join(f"{m['label']} is {m['describe']}" for m in results["methods"] if m["describe"] != m["label"])
    resamples = results["intervals"]["resamples"]
    compared = results.get("corrections", {}).get("rows", 0)
    demoted = f"; (*): not after Holm's correction for {compared} rows" if compared > 1 else ""
    reference = results.get("reference", "none")
    lines = [
        f"- {reference}: paired difference in points; 95 %: its interval over {resamples} resamples of the images",
        f"*: the interval excludes 0{demoted}; = {reference}: no answer changed",
    ]
    words = verdict_legend(verdict(results, method) for method in results["methods"])
    lines += [f"verdict: {words}"] if words else []
    return [*lines, names] if names else lines
