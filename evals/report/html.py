"""``report.html``: one self-contained page with tables, plots and the captions that changed, to be looked at."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..data.coco import load_image
from ..scores.verdicts import WORDS
from .drawing import NARROW, WIDE, svg
from .page import data_uri, render
from .plots import category_figure, interval_columns, interval_figure
from .rows import tables
from .summary import glossary, legend, summarise
from .text import conditions, sentences
from .tradeoff import tradeoff_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..benchmarks.base import Benchmark
    from ..benchmarks.coco_objects import MarkedText
    from ..data.samples import Answers, Sample
    from ..run.methods import MethodSpec


MOST_COLUMNS = 10
"""Figures that fit beside each other in a page."""


def html_report(
    results: Mapping[str, Any],
    methods: Sequence[MethodSpec],
    tasks: Sequence[Benchmark],
    answers: Mapping[str, Answers],
) -> str:
    """Write the page of a run.

    Args:
        results: The content of ``results.json``.
        methods: Rows, the baseline first.
        tasks: What was asked; images of texts that a method changed are embedded as thumbnails.
        answers: Method label to its answers by (benchmark, image id, question).

    Returns:
        HTML without any reference to another file.
    """
    summary, found = summarise(results), tables(results, tests=True)
    return render(
        "report.html",
        title=f"vlmfix: {results['model']}",
        results=results,
        reference=summary.reference,
        sentences=sentences(results),
        summaries=summary.parts(lambda part: len(part.columns) <= MOST_COLUMNS),
        words=WORDS,
        legend=[*legend(results, in_cells=True), *glossary(summary)],
        galleries=[gallery for task in tasks for gallery in galleries(methods, task, answers)],
        panels=interval_panels(results),
        tradeoff=both_widths(tradeoff_figure, results, "hallucination against recall"),
        front=found.pop("front", None),
        invented=both_widths(category_figure, results, "invented objects by category"),
        tables=list(found.values()),
        conditions=conditions(results),
    )


def interval_panels(results: Mapping[str, Any]) -> list[str]:
    """Every figure's differences as a drawing of its own, so that a page can break their row."""
    drawings = []
    for column in interval_columns(results):
        made = interval_figure(results, [column], titled=False)
        assert made is not None
        drawings.append(svg(made, f"{column.full_heading}: differences to the baseline"))
    return drawings


def both_widths(draw: Callable[..., Figure | None], results: Mapping[str, Any], name: str) -> dict[str, str]:
    """A plot for a page and for a telephone; empty with nothing to draw."""
    made = {size: draw(results, width, titled=False) for size, width in (("wide", WIDE), ("narrow", NARROW))}
    return {size: svg(figure, f"{name}, {size}") for size, figure in made.items() if figure is not None}


SHOWN = 6
"""Images shown per method."""


@dataclass(frozen=True)
class Pair:
    """An image, as the address of itself, with the texts of two rows by label."""

    image_id: int
    image: str
    texts: Mapping[str, MarkedText]


@dataclass(frozen=True)
class Gallery:
    """What a page shows of one method."""

    title: str
    note: str
    pairs: tuple[Pair, ...]


def galleries(methods: Sequence[MethodSpec], task: Benchmark, answers: Mapping[str, Answers]) -> Iterator[Gallery]:
    """The texts whose invented objects changed most, of every method but controls.

    Args:
        methods: The rows, the baseline first; nothing is shown of one that changed nothing.
        task: What was asked; nothing is shown of a benchmark that marks nothing.
        answers: Method label to its answers.
    """
    for spec in methods[1:]:
        if spec.role == "control":
            continue
        changes = []
        for sample in task.samples:
            said = {label: answers[label][sample.key].text for label in (methods[0].label, spec.label)}
            marked = {label: found for label, text in said.items() if (found := task.marked(sample, text))}
            if not marked:
                return
            if len(set(said.values())) > 1:
                before, after = (set(text.invented) for text in marked.values())
                changes.append((-len(before ^ after), sample.image_id, sample, marked))
        if not changes:
            continue
        chosen = sorted(changes, key=lambda change: change[:2])[:SHOWN]
        yield Gallery(
            f"{task.title} captions that {spec.label} changed most",
            f"{len(changes)} of {len(task.samples)} captions changed.",
            tuple(Pair(image_id, _thumbnail(sample), marked) for _, image_id, sample, marked in chosen),
        )


def _thumbnail(sample: Sample) -> str:
    assert sample.path is not None
    image = load_image(sample.path)
    image.thumbnail((440, 440))
    return data_uri(image, quality=80)
