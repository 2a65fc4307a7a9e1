"""The result table: for a terminal of 120 columns, and as Markdown. Both are made from ``results.json`` alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from textwrap import wrap
from typing import Any

from .pareto import LEGEND as PARETO_LEGEND
from .pareto import pareto_rows
from .report_benchmarks import PAIRED_LEGEND, about_lines, breakdowns, paired_rows
from .report_quality import ANSWERS_LEGEND, QUALITY_LEGEND, answers_rows, caption_rows, quality_rows, split_rows
from .report_tables import CONTROLS_EXPLAINED, control_rows, controls_text, main_table, markdown_main, pareto_text
from .tables import fitting_table, markdown_table
from .verdicts import verdict, verdict_legend

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
