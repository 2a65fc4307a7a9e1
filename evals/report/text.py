"""A run's report as text: short and in full for a terminal, and as Markdown. All are made from ``results.json``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from textwrap import wrap
from typing import Any

from .rows import benchmarks, tables
from .sentences import headline_columns, sentences
from .summary import glossary, legend, main_table, markdown_main, summarise

TERMINAL_WIDTH = 120
"""Columns of the full report."""


BRIEF_WIDTH = 100
"""Columns of the short one."""


def brief_report(results: Mapping[str, Any]) -> str:
    """What ``vlmfix eval`` ends with: the headline figures, and a sentence per row; at most 100 columns wide."""
    table = main_table(summarise(results, headline_columns(results)), BRIEF_WIDTH)
    key = list(legend(results))[:2]
    return "\n".join([table, "", *wrapped(key, BRIEF_WIDTH), "", *wrapped(sentences(results), BRIEF_WIDTH)])


def text_report(results: Mapping[str, Any]) -> str:
    """What ``vlmfix eval --verbose`` ends with: conditions and every table; at most 120 columns wide."""
    parts = [*wrapped(conditions(results)), *wrapped(f"NOTE {note}" for note in results["notes"])]
    parts += ["", main_table(summarise(results), TERMINAL_WIDTH), "", *wrapped(legend(results))]
    for table in tables(results).values():
        if not table.is_detail:
            parts += ["", table.plain(TERMINAL_WIDTH), "", *wrapped(table.notes)]
    if said := sentences(results):
        parts += ["", *wrapped(said)]
    return "\n".join(parts)


def wrapped(lines: Iterable[str], width: int = TERMINAL_WIDTH) -> list[str]:
    """Break lines that are wider than a terminal; what follows the first part of a line is indented."""
    return [part for line in lines for part in wrap(line, width, subsequent_indent="  ")]


def markdown_report(results: Mapping[str, Any]) -> str:
    """``report.md``: everything a reader needs to judge and repeat the run."""
    parts = ["# vlmfix evaluation", "", *(f"- {line}" for line in sentences(results)), ""]
    summary = summarise(results)
    parts += [markdown_main(summary), "", *paragraphs(legend(results, in_cells=True)), *paragraphs(glossary(summary))]
    for table in tables(results).values():
        parts += [f"## {table.title}", "", table.markdown(), "", *paragraphs(table.notes)]
    if results["notes"]:
        parts += ["## Notes", "", *(f"- {note}" for note in results["notes"]), ""]
    parts += ["## Conditions", "", *(f"- {line}" for line in conditions(results)), ""]
    parts += ["## Repeat", "", "```", results["command"], "```", ""]
    parts += ["Image ids, prompts, weights and versions are in `config.json`; raw answers in `answers.jsonl`.", ""]
    return "\n".join(parts)


def paragraphs(lines: Iterable[str]) -> Iterator[str]:
    """Lines of Markdown, each a paragraph."""
    return (part for line in lines for part in (line, ""))


def conditions(results: Mapping[str, Any]) -> list[str]:
    """Model, data and versions, and of each benchmark what was asked and how it was read, with its prompt."""
    settings, first = results["settings"], results["methods"][0]
    model, versions = settings["model"], settings["versions"]
    return [
        f"model {results['model']} ({model['weights'][:19]}), {model['dtype']}, greedy, batch {results['batch_size']}",
        f"data {results['data']}, seed {settings['seed']}; vlmfix {versions['vlmfix']} "
        f"({versions['vlmfix_source'][:8]}), torch {versions['torch']}, transformers {versions['transformers']}",
        *(
            f"{first[name]['about']}; prompt {settings[name]['prompt']!r}"
            for name in benchmarks(results)
            if "about" in first[name]
        ),
    ]
