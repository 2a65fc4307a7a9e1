"""The result table: for a terminal of 120 columns, and as Markdown. Both are made from ``results.json`` alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from textwrap import wrap
from typing import Any

from .columns import BY_KEY, Metric, changed_methods, figure, seconds, used_metrics
from .report_quality import ANSWERS_LEGEND, QUALITY_LEGEND, answers_rows, caption_rows, quality_rows, split_rows
from .tables import (
    difference_cell,
    fitting_table,
    interval_cell,
    markdown_table,
    number,
)

TERMINAL_WIDTH = 120

VERDICTS = {
    "better": "beats its control",
    "same": "not told apart",
    "worse": "worse than control",
    "unchanged": "no answer changed",
}


def text_report(results: Mapping[str, Any]) -> str:
    """What ``vlmfix eval`` ends with: conditions, one table, the controls; at most 120 columns wide."""
    metrics = used_metrics(results)
    rows = [["", *(_group(metrics, i) for i in range(len(metrics))), ""]]
    rows.append(["method", *(metric.heading for metric in metrics), "seconds"])
    changed = set(changed_methods(results))
    for method in results["methods"]:
        rows.append([method["label"], *(_value(method, m) for m in metrics), number(seconds(method), percent=False)])
        if method["label"] not in changed:
            if "differences" in method:
                rows.append(["  = none", *[""] * (len(metrics) + 1)])
        elif "differences" in method:
            found = [method["differences"].get(metric.key) for metric in metrics]
            rows.append(["  - none", *(_difference(d, m) for d, m in zip(found, metrics, strict=True)), ""])
            rows.append(["  95 %", *(_interval(d, m) for d, m in zip(found, metrics, strict=True)), ""])
    table = fitting_table(rows, TERMINAL_WIDTH)
    head = [line if len(line) <= TERMINAL_WIDTH else line[: TERMINAL_WIDTH - 3] + "..." for line in conditions(results)]
    head += [f"NOTE {note}" for note in results["notes"]]
    parts = [*head, "", table, "", *legend(results)]
    for more, explained in ((quality_rows(results), QUALITY_LEGEND), (answers_rows(results), ANSWERS_LEGEND)):
        if more:
            parts += [
                "",
                fitting_table(more, TERMINAL_WIDTH),
                "",
                *(line for text in explained for line in wrap(text, TERMINAL_WIDTH)),
            ]
    if results.get("controls"):
        parts += ["", _controls_text(results)]
    return "\n".join(parts)


def markdown_report(results: Mapping[str, Any]) -> str:
    """``report.md``: everything a reader needs to judge and repeat the run."""
    metrics = used_metrics(results)
    rows = [
        [
            "method",
            *(
                f"{m.benchmark.upper()} {m.title.removeprefix('CHAIR_')}{m.heading.removeprefix(m.title)}"
                for m in metrics
            ),
            "seconds",
        ]
    ]
    for method in results["methods"]:
        cells = []
        for metric in metrics:
            cell = _value(method, metric)
            difference = method.get("differences", {}).get(metric.key)
            if difference is not None:
                cell += f"<br>{_difference(difference, metric)} [{_interval(difference, metric).replace(',', ', ')}]"
            cells.append(cell)
        rows.append(
            [
                f"`{method['describe']}`" if method["role"] != "control" else f"control `{method['describe']}`",
                *cells,
                number(seconds(method), percent=False),
            ]
        )
    parts = ["# vlmfix evaluation", "", *(f"- {line}" for line in conditions(results)), ""]
    parts += [markdown_table(rows), "", *(line for text in legend(results) for line in (text.lstrip("- "), ""))]
    if results.get("controls"):
        parts += ["## Controls", "", CONTROLS_EXPLAINED, "", markdown_table(_control_rows(results)), ""]
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


CONTROLS_EXPLAINED = (
    "*early stop*: `none`'s own captions, ended as soon as the end token comes within a fixed margin, chosen so that "
    "recall is the method's. *yes bias*: a constant added to `none`'s yes-minus-no logit, chosen so that the share of "
    "yes is the method's. *every head* and *other heads*: the same factor on all heads, and on those the method leaves "
    "alone. A method that does not beat its control only moves along the trade-off."
)


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
    return lines


def legend(results: Mapping[str, Any]) -> list[str]:
    """How to read the table, and what the short method names stand for."""
    names = "; ".join(f"{m['label']} is {m['describe']}" for m in results["methods"] if m["describe"] != m["label"])
    resamples = results["intervals"]["resamples"]
    compared = results.get("corrections", {}).get("rows", 0)
    demoted = f"; (*): not after Holm's correction for {compared} rows" if compared > 1 else ""
    lines = [
        f"- none: paired difference in points; 95 %: its interval over {resamples} resamples of the images",
        f"*: the interval excludes 0{demoted}; = none: no answer changed",
    ]
    return [*lines, names] if names else lines


def _controls_text(results: Mapping[str, Any]) -> str:
    rows = _control_rows(results)
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


def _control_rows(results: Mapping[str, Any]) -> list[list[str]]:
    rows = [["method", "control", "matched", "metric", "method", "control", "difference", "95 %", "verdict"]]
    for control in results["controls"]:
        metric = BY_KEY[control["metric"]]
        difference = control.get("difference")
        rows.append(
            [
                control["method"],
                control["control"],
                control.get("matched", ""),
                metric.heading,
                number(control.get("method_value"), percent=metric.percent),
                number(control.get("control_value"), percent=metric.percent),
                _difference(difference, metric),
                _interval(difference, metric),
                VERDICTS[control.get("verdict_holm", control["verdict"])],
            ]
        )
    return rows


def _group(metrics: Sequence[Metric], index: int) -> str:
    """The benchmark's name above its first column."""
    first = index == 0 or metrics[index].benchmark != metrics[index - 1].benchmark
    return metrics[index].benchmark.upper() if first else ""


def _value(method: Mapping[str, Any], metric: Metric) -> str:
    return number(figure(method, metric), percent=metric.percent)


def _difference(difference: Mapping[str, Any] | None, metric: Metric) -> str:
    return difference_cell(difference, percent=metric.percent)


def _interval(difference: Mapping[str, Any] | None, metric: Metric) -> str:
    return interval_cell(difference, percent=metric.percent)
