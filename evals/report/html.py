"""``report.html``: one self-contained page with tables, plots and the captions that changed, to be looked at."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from ..benchmarks.chair.words import double_words
from ..benchmarks.columns import Metric, seconds, used_metrics
from ..data.coco import load_image
from ..scores.pareto import LEGEND as PARETO_LEGEND
from ..scores.pareto import pareto_rows
from ..scores.verdicts import WORDS, verdict
from ..tables import difference_cell, number, p_cell, signed, table, text
from ..tables import text as _text
from .plots import intervals, invented, scatter
from .text import (
    ANSWERS_LEGEND,
    CONTROLS_EXPLAINED,
    PAIRED_LEGEND,
    QUALITY_LEGEND,
    answers_rows,
    breakdowns,
    conditions,
    control_rows,
    markdown_legend,
    paired_rows,
    quality_rows,
    split_rows,
    value_cell,
)

if TYPE_CHECKING:
    from ..benchmarks.chair.task import ChairTask
    from ..run.methods import MethodSpec


if TYPE_CHECKING:
    from ..benchmarks.chair.task import ChairTask
    from ..data.samples import Answer, Sample
    from ..run.methods import MethodSpec

    Answers = Mapping[tuple[str, int, str], Answer]


GALLERY = 6
"""Captions shown per method."""


def gallery(methods: Sequence[MethodSpec], task: ChairTask, answers: Mapping[str, Answers]) -> Iterator[str]:
    """The captions whose invented objects changed most, each beside the baseline's."""
    baseline = answers[methods[0].label]
    for spec in methods[1:]:
        if spec.role == "control":
            continue
        changes = []
        for sample in task.samples:
            before, after = (_caption(sample, each) for each in (baseline, answers[spec.label]))
            if before != after:
                moved = set(_invented(task, sample, after)) ^ set(_invented(task, sample, before))
                changes.append((-len(moved), sample.image_id, sample, before, after))
        opened = " open" if spec is next(each for each in methods[1:] if each.role != "control") else ""
        yield f"<details{opened}><summary><h2>Captions that {_text(spec.label)} changed most</h2></summary>"
        yield f"<p>{len(changes)} of {len(task.samples)} captions changed. "
        yield "<mark>Invented</mark> and <mark class=real>present</mark> objects are marked.</p>"
        for _, _, sample, before, after in sorted(changes, key=lambda change: change[:2])[:GALLERY]:
            yield (
                f'<div class="pair"><div><img alt="image {sample.image_id}" src="{_thumbnail(sample)}">'
                f"<small>{sample.image_id}</small></div><div><small>{_text(methods[0].label)}</small>"
                f"<p>{_marked(task, sample, before)}</p><small>{_text(spec.label)}</small>"
                f"<p>{_marked(task, sample, after)}</p></div></div>"
            )
        yield "</details>"


def _marked(task: ChairTask, sample: Sample, caption: str) -> str:
    """A caption with its objects marked, as far as their place in it is known, and those it invents."""
    truth = task.truth[sample.image_id]
    parts, start = [], 0
    for word, node in task.matcher.as_written(caption):
        found = re.search(rf"\b{re.escape(word)}\b", caption[start:], re.IGNORECASE)
        if found is None:
            continue
        kind = ' class="real"' if node in truth else ""
        parts.append(_text(caption[start : start + found.start()]))
        end = start + found.end() + _second_word(found[0], caption[start + found.end() :])
        parts.append(f'<mark{kind} title="{_text(node)}">{_text(caption[start + found.start() : end])}</mark>')
        start = end
    parts.append(_text(caption[start:]))
    invented = _invented(task, sample, caption)
    tail = f"<br><small>invented: {_text(', '.join(invented))}</small>" if invented else ""
    return "".join(parts) + tail


def _second_word(first: str, rest: str) -> int:
    """How many characters of the rest belong to a name of two words that ``first`` begins; 0 for none."""
    following = re.match(r"\s+(\w+)", rest)
    if following is None:
        return 0
    names = {f"{first} {form}".lower() for form in (following[1], following[1].removesuffix("s"))}
    return following.end() if names & double_words().keys() else 0


def _thumbnail(sample: Sample) -> str:
    assert sample.path is not None
    image = load_image(sample.path)
    image.thumbnail((440, 440))
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _invented(task: ChairTask, sample: Sample, caption: str) -> list[str]:
    """The objects a caption names that are not there, sorted."""
    return sorted(set(task.matcher.match(caption).nodes) - set(task.truth[sample.image_id]))


def _caption(sample: Sample, answers: Answers) -> str:
    return answers[sample.benchmark, sample.image_id, sample.question].text


STYLE = """
:root { color-scheme: light dark; --line: #8885; --soft: #8881; --bad: #d33; --good: #2a8; --page: #fff; }
@media (prefers-color-scheme: dark) { :root { --page: #121212; } body { background: var(--page); } }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1080px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; overflow-wrap: anywhere; } h2 { font-size: 1.15rem; margin-top: 2.4rem; }
.wide { overflow-x: auto; } small, .key, .note { opacity: .8; font-size: .86rem; } .key { margin: .3rem 0; }
table { border-collapse: separate; border-spacing: 0; font-variant-numeric: tabular-nums; font-size: .86rem; }
th, td { padding: .3rem .42rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { font-weight: 600; } th.group { text-align: left; border-bottom: 0; padding-bottom: 0; opacity: .7; }
td.word, th.word { text-align: left; }
td.word:first-child, th.word:first-child { position: sticky; left: 0; background: var(--page); }
tr.control td { color: #8a8a8a; } tr.baseline td { font-weight: 600; } td small { font-weight: 400; }
tr:hover td { background: var(--soft); }
.map td { text-align: center; } .map td.word { text-align: left; }
.map th.up { height: 5.2rem; vertical-align: bottom; padding: 0 .2rem; }
.map th.up span { writing-mode: vertical-rl; transform: rotate(180deg); }
.verdict { border-radius: 4px; padding: .1rem .4rem; background: var(--soft); }
.verdict.better { background: #2a84; } .verdict.worse, .verdict.loops { background: #d334; }
svg { max-width: 100%; height: auto; }
svg text { fill: currentColor; font-family: system-ui, sans-serif; font-size: 12px; }
.wide > svg { min-width: 620px; } .panels { display: flex; flex-wrap: wrap; gap: 1.2rem 1rem; }
.pair { display: grid; grid-template-columns: 220px 1fr; gap: 1rem; padding: 1rem 0; }
.pair { border-top: 1px solid var(--line); }
.pair img { width: 220px; border-radius: 6px; } .pair p { margin: .2rem 0 .6rem; }
details { margin-top: 2.2rem; } details > summary { cursor: pointer; } summary h2 { display: inline; }
mark { background: #d333; color: inherit; border-bottom: 2px solid var(--bad); }
mark.real { background: #2a82; border-bottom: 2px solid var(--good); }
pre { overflow-x: auto; background: var(--soft); padding: .6rem; border-radius: 6px; }
@media (max-width: 640px) {
  body { margin: 1rem auto; } .pair { grid-template-columns: 1fr; } .pair img { width: 100%; max-width: 320px; }
}
"""


def html_report(
    results: Mapping[str, Any],
    methods: Sequence[MethodSpec],
    task: ChairTask | None,
    answers: Mapping[str, Answers],
) -> str:
    """Write the page of a run.

    Args:
        results: The content of ``results.json``.
        methods: Rows, the baseline first.
        task: What was captioned, if anything; its images are embedded as thumbnails.
        answers: Method label to its answers by (benchmark, image id, question).

    Returns:
        HTML without any reference to another file.
    """
    parts = [
        f"<h1>{text(results['model'])} on {text(results['data'])}</h1>",
        f'<p class="note">{"<br>".join(text(line) for line in conditions(results))}</p>',
        "".join(f'<p class="note">Note: {text(note)}</p>' for note in results["notes"]),
        "<h2>Summary</h2>",
        summary(results),
        *_summary_notes(results),
        *_comparisons(results),
        *_tables(results),
    ]
    if task is not None:
        parts += ["<h2>Objects invented, by category</h2>", invented(results), *gallery(methods, task, answers)]
    parts += ["<h2>Repeat</h2>", f"<pre>{text(results['command'])}</pre>"]
    title = text(f"vlmfix: {results['model']}")
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head><body>'
        + "\n".join(parts)
        + "</body></html>\n"
    )


def summary(results: Mapping[str, Any]) -> str:
    """The main table: benchmarks above their differences and intervals below them."""
    shown = used_metrics(results)
    words = {row["label"]: verdict(results, row) for row in results["methods"]}
    judged = any(words.values())
    groups = [(name, len(list(group))) for name, group in groupby(shown, key=lambda metric: metric.benchmark)]
    above = "".join(f'<th class="group" colspan="{size}">{text(name.upper())}</th>' for name, size in groups)
    head = "".join(f"<th>{text(metric.heading)}</th>" for metric in shown)
    head = ("<th class=word>verdict</th>" if judged else "") + head + "<th>seconds</th>"
    blank = "<th class='word group'></th>" * (2 if judged else 1)
    body = []
    for row in results["methods"]:
        cells = f"<td class=word>{_badge(words[row['label']])}</td>" if judged else ""
        cells += "".join(f"<td>{_cell(row, metric)}</td>" for metric in shown)
        cells += f"<td>{number(seconds(row), percent=False)}</td>"
        name = f'<td class="word" title="{text(row["describe"])}">{text(row["label"])}</td>'
        body.append(f'<tr class="{text(row["role"])}">{name}{cells}</tr>')
    return (
        f'<div class="wide"><table><thead><tr>{blank}{above}</tr><tr><th class=word>method</th>{head}'
        f"</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
    )


def _badge(word: str) -> str:
    return f'<span class="verdict {text(word)}" title="{text(WORDS[word])}">{text(word)}</span>' if word else ""


def _cell(row: Mapping[str, Any], metric: Metric) -> str:
    value = value_cell(row, metric)
    found = row.get("differences", {}).get(metric.key)
    if found is None:
        return value
    bounds = ", ".join(signed(found[end], percent=metric.percent) for end in ("low", "high"))
    told = f"p = {p_cell(found.get('p_value'))}, corrected {p_cell(found.get('p_holm'))}"
    difference = difference_cell(found, percent=metric.percent)
    return f'{value}<br><small title="{text(told)}">{text(difference)}<br>[{text(bounds)}]</small>'


def _summary_notes(results: Mapping[str, Any]) -> Iterator[str]:
    lines = [line.replace("`", "") for line in markdown_legend(results)]
    yield f'<p class="note">{"<br>".join(text(line) for line in lines)}<br>Controls of a method are grey.</p>'


def _comparisons(results: Mapping[str, Any]) -> Iterator[str]:
    """Plots of differences, the trade-off with its front, and the controls."""
    if len(results["methods"]) > 1:
        yield "<h2>Differences to the baseline</h2>"
        yield '<p class="key">Points, 95 % intervals. Filled: survives Holm\'s correction over the rows.</p>'
        yield intervals(results)
    front = pareto_rows(results)
    if front:
        yield "<h2>Hallucination against recall against seconds</h2>"
        yield scatter(results)
        yield table(front, words=(1, -1))
        yield f'<p class="note">{text(PARETO_LEGEND)}</p>'
    if results.get("controls"):
        yield "<h2>Controls</h2>"
        yield table(_control_rows(results), words=(1, 2, 3, -1))
        yield f'<p class="note">{text(CONTROLS_EXPLAINED.replace("*", "").replace("`", ""))}</p>'


def _control_rows(results: Mapping[str, Any]) -> list[list[str]]:
    """The controls' table with p-values before the verdict."""
    head, *rows = control_rows(results)
    tests = [line.get("difference") or {} for line in results["controls"]]
    return [[*head[:-1], "p", "p (Holm)", head[-1]]] + [
        [*row[:-1], p_cell(test.get("p_value")), p_cell(test.get("p_holm")), row[-1]]
        for row, test in zip(rows, tests, strict=True)
    ]


def _tables(results: Mapping[str, Any]) -> Iterator[str]:
    """Text quality, paired answers, and the parts of each benchmark."""
    quality = quality_rows(results)
    if quality:
        yield "<h2>Text quality, and CHAIR at equal length</h2>"
        yield table(quality, heads=2)
        yield f'<p class="note">{text(" ".join(QUALITY_LEGEND))}</p>'
    for title, rows, legend in (
        ("Paired answers", answers_rows(results), ANSWERS_LEGEND),
        ("Paired answers, other benchmarks", paired_rows(results), PAIRED_LEGEND),
    ):
        if rows:
            yield f"<h2>{title}</h2>"
            yield table(rows)
            yield f'<p class="note">{text(" ".join(legend))}</p>'
    if "pope" in results["methods"][0]:
        yield "<details><summary><h2>POPE by split</h2></summary>"
        yield table(split_rows(results), words=(1,))
        yield "</details>"
    for name, rows in breakdowns(results):
        yield f"<details><summary><h2>{text(name.upper())} by part</h2></summary>"
        yield table(rows, words=(1,))
        yield "</details>"
