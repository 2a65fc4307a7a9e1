"""A run's report as text: short and in full for a terminal, and as Markdown. All are made from ``results.json``.

What a run found is one plain sentence per row: ``vhr: 1.0 points fewer invented objects, 1.0 points lower recall``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from textwrap import wrap
from typing import Any

from ..benchmarks.chair.text_quality import broken_text
from ..benchmarks.columns import changed_methods, used_figures
from ..scores.pareto import front_sentence
from ..scores.verdicts import PLAIN_CONTROLS, verdict
from ..stats.figures import Figure
from ..tables import interval_cell, is_certain, signed
from .rows import benchmarks, tables
from .summary import glossary, legend, main_table, markdown_main, summarise

TERMINAL_WIDTH = 120
"""Columns of the full report."""

BRIEF_WIDTH = 100
"""Columns of the short one."""


def brief_report(results: Mapping[str, Any]) -> str:
    """What ``vlmfix eval`` ends with, at most 100 columns wide: the headline figures, a sentence per row, the front."""
    table = main_table(summarise(results, headline_columns(results)), BRIEF_WIDTH)
    key = list(legend(results))[:2]
    said = [*sentences(results), *filter(None, [front_sentence(results)])]
    return "\n".join([table, "", *wrapped(key, BRIEF_WIDTH), "", *wrapped(said, BRIEF_WIDTH)])


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


def headline_columns(results: Mapping[str, Any]) -> list[Figure]:
    """The figures that the short table of a run shows, and that its sentences speak of.

    Of a benchmark that marks none, the first one.
    """
    found: list[Figure] = []
    for _, figures in groupby(used_figures(results), key=lambda figure: figure.benchmark):
        own = list(figures)
        found += [figure for figure in own if figure.headline] or own[:1]
    return found


def sentences(results: Mapping[str, Any]) -> list[str]:
    """Say of every row that is compared with another one what is certain about it.

    A difference is named where its interval excludes zero after the correction. A plain control is named where it does
    as much as a method that improves on the figure compared, or is told apart from the method.

    Args:
        results: The content of ``results.json``, or what ``vlmfix compare`` writes.
    """
    changed = set(changed_methods(results))
    said = []
    for row in results["methods"]:
        if "differences" not in row:
            continue
        if row["label"] not in changed:
            said.append(f"{row['label']}: no answer changed.")
            continue
        found = ", ".join(_differences(results, row)) or f"no clear difference from {results.get('reference', 'none')}"
        clauses = [found, *_controls(results, row), *_ability(results, row)]
        if broken := _broken(row):
            clauses.append(f"but its text breaks ({', '.join(broken)} points), so that its other figures mean little")
        elif verdict(results, row) == "loops":
            clauses.append("but more of its captions loop or are cut off, so that its other figures mean little")
        said.append(f"{row['label']}: {'; '.join(clauses)}.")
    return said


def _broken(row: Mapping[str, Any]) -> list[str]:
    """What breaks a row's captions: rates that rise by more than the margin, and whose interval excludes zero."""
    tests = row.get("chair", {}).get("text_quality", {}).get("differences", {})
    return broken_text({name: test["estimate"] for name, test in tests.items() if (test["low"] or 0) > 0})


def _differences(results: Mapping[str, Any], row: Mapping[str, Any]) -> Iterator[str]:
    for figure in headline_columns(results):
        found = row["differences"].get(figure.key)
        if is_certain(found) and not figure.ability:
            size = f"{abs(found['estimate']) * (100 if figure.percent else 1):.1f}"
            less, more = figure.phrases
            yield f"{'under 0.1' if size == '0.0' else size} points {more if found['estimate'] > 0 else less}"


def _ability(results: Mapping[str, Any], row: Mapping[str, Any]) -> Iterator[str]:
    """What a method costs where nothing is about hallucination, told apart or not.

    Answers that cannot be read are named where a method makes more or fewer of them: they are wrong by their form.
    """
    reference = next((m for m in results["methods"] if m["label"] == results.get("reference")), results["methods"][0])
    for figure in headline_columns(results):
        found = row["differences"].get(figure.key)
        if not figure.ability or found is None:
            continue
        change = f"{signed(found['estimate'])} [{interval_cell(found).replace(',', ', ')}]"
        word = ("gains" if found["estimate"] > 0 else "costs") if is_certain(found) else "has no clear cost in"
        own, before = (each.get(figure.benchmark, {}).get("counts", {}).get("unparsed") for each in (row, reference))
        unread = f", {own} unreadable answers instead of {before}" if own != before else ""
        yield f"{word} ability: {figure.full_title} {change}{unread}"


_OUTCOMES = {"better": "worse", "worse": "better"}  # of the method, and how the control then does


def _controls(results: Mapping[str, Any], row: Mapping[str, Any]) -> Iterator[str]:
    """What the plain controls achieve beside a method."""
    columns = {figure.key: figure for figure in used_figures(results)}
    for control, phrase in PLAIN_CONTROLS.items():
        compared: dict[str, list[Figure]] = {}
        for line in results.get("controls", ()):
            if (line["method"], line["control"]) == (row["label"], control) and line["metric"] in columns:
                outcome = line.get("verdict_holm", line["verdict"])
                compared.setdefault(outcome, []).append(columns[line["metric"]])
        decided = [outcome for outcome in _OUTCOMES if outcome in compared]
        if decided:
            told = (f"{_OUTCOMES[each]} on {_listed(compared[each])}" for each in decided)
            yield f"{phrase} does {' and '.join(told)}"
        elif any(_is_gain(row, figure) for figure in compared.get("same", ())):
            yield f"{phrase} does as much"


def _listed(columns: Sequence[Figure]) -> str:
    return ", ".join(figure.full_title for figure in columns)


def _is_gain(row: Mapping[str, Any], figure: Figure) -> bool:
    difference = row["differences"].get(figure.key)
    return difference is not None and is_certain(difference) and difference["estimate"] * figure.better > 0
