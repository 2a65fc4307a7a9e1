"""``vlmfix trace``: through which layers, tokens and attention edges one answer comes; writes a page."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmfix.errors import DataError

from ..flags import ASKING, IMAGES, MODEL, OUTPUT, add_verb, option
from .command import PictureOptions, Shown, load_case, shown_picture

if TYPE_CHECKING:
    from vlmfix.probes import CausalTrace, Knockout

    from .case import Case

Box = tuple[float, float, float, float]

WINDOW = 9 / 32
"""Layers cut at a time, of all: nine of 32, as in the study."""

GROUP_NAMES = {
    "image_object": "the object's patches",
    "text_object": "the word for it",
    "text_before": "other text",
    "last": "the last token",
}


@dataclass(frozen=True, kw_only=True)
class TraceOptions(PictureOptions):
    """The options of ``vlmfix trace``."""

    object: str | None = option(
        "ask whether it is in the picture (default: the largest object of the scene)", group=ASKING, metavar="NAME"
    )
    box: tuple[float, ...] | None = option(
        "where the object is in --image: left top right bottom, in parts of what the model sees, 0 to 1",
        group=IMAGES,
        metavar="X",
    )
    window: int | None = option(
        "layers whose attention is cut at a time (default: 9 of 32)", group=MODEL, metavar="N", at_least=1
    )
    out: Path = option("the page", group=OUTPUT, default=Path("trace.html"), metavar="FILE")


@dataclass(frozen=True)
class Traced:
    """What the page shows.

    Attributes:
        title: Picture and model.
        question: What was asked.
        answer: The word whose probability is followed.
        pictures: The picture as the model sees it, and with the noise, as data URIs.
        boxes: Where the object is, in parts of the picture.
        trace: What clean states bring back of the answer.
        knocked: What it loses when attention edges are cut.
        window: Layers whose attention is cut at a time, but for the first and last windows.
        whole_image: Whether the traced patches are all of the image, because nobody said where the object is.
        facts: Lines for the foot.
    """

    title: str
    question: str
    answer: str
    pictures: tuple[str, str]
    boxes: tuple[Box, ...]
    trace: CausalTrace
    knocked: Knockout
    window: int
    whole_image: bool
    facts: tuple[str, ...]

    def group_name(self, group: str) -> str:
        """What a group of tokens is called in the page."""
        return "the image" if group == "image_object" and self.whole_image else GROUP_NAMES[group]


def trace_command(options: TraceOptions) -> Traced:
    """Load what was asked for, and trace the first word of the answer.

    Raises:
        VlmfixError: No such model, image or scene, an object that is not in the scene, a model that probes refuse, or
            an answer that does not depend on the image.
    """
    from ..benchmarks.object_choice import PROMPT
    from ..run.models import fitting_threads
    from ..testbed.vocabulary import article

    shown = shown_picture(options)
    name, boxes = _object(options, shown)
    question = options.prompt or PROMPT.format(question=f"Is there {article(name)} {name} in the image?")
    case, title, facts = load_case(options, shown, question)
    with fitting_threads(case.model):
        return trace_answer(case, name, boxes, options.window, title=title, facts=facts)


def _object(options: TraceOptions, shown: Shown) -> tuple[str, tuple[Box, ...]]:
    """Return the object and its boxes in parts of the picture; both may be empty for a question of the user's own."""
    if options.box is not None:
        if options.image is None or len(options.box) != 4:
            raise DataError("--box takes left top right bottom of the object in --image; a scene has boxes of its own")
        left, top, right, bottom = options.box
        return options.object or "", ((left, top, right, bottom),)
    if options.object is None and options.prompt is not None:
        return "", ()
    if shown.scene is None:
        if options.object is None:
            raise DataError("trace needs a question about --image: --object NAME, or --prompt TEXT")
        return options.object, ()
    instances = shown.scene.instances
    name = options.object or max(instances, key=lambda each: each.area).name
    found = [each.bbox for each in instances if each.name == name]
    if not found:
        there = ", ".join(sorted(shown.scene.counts()))
        raise DataError(f"there is no {name} in {shown.name}, only {there}; for an object that is not, give --prompt")
    height, width = shown.scene.pixels.shape[:2]
    return name, tuple((x / width, y / height, (x + w) / width, (y + h) / height) for x, y, w, h in found)


def trace_answer(
    case: Case,
    name: str,
    boxes: Sequence[Box],
    window: int | None,
    *,
    title: str,
    facts: Sequence[str] = (),
) -> Traced:
    """Trace the first word of an answer through the stock model.

    Args:
        case: Model, picture and question.
        name: The object that is asked for; empty for another question.
        boxes: Where it is, in parts of the picture; none if nobody knows.
        window: Layers whose attention is cut at a time; None for nine of 32.
        title: Of the page.
        facts: Lines for its foot.
    """
    from vlmfix import probes
    from vlmfix.observe.ask import look_at
    from vlmfix.observe.words import decode, prompt_tokens, word_tokens, yes_no_tokens
    from vlmfix.probes.spans import cells_of

    from .case import grid_of, picture_as_seen

    inputs, tokenizer = case.inputs(), case.processor.tokenizer
    subject = look_at(case.model, "trace", inputs)
    first = subject.answer(inputs).tokens[0][0]
    spelt = next((ids for ids in yes_no_tokens(tokenizer) or () if first in ids), (first,))
    num_tokens = int(prompt_tokens(subject.anatomy, inputs).image.sum())
    grid = grid_of(case.model, inputs, num_tokens)
    if boxes and grid is None:
        raise DataError("this model sees the picture in several tiles or views: leave --box out")
    cells = sorted({cell for box in boxes for cell in cells_of(box, *grid)}) if boxes and grid else None
    said = word_tokens(tokenizer, inputs["input_ids"][0].tolist(), name) if name else []
    trace = probes.causal_trace(
        case.model,
        inputs,
        spelt,
        groups=("image_object", "text_object" if said else "text_before", "last"),
        places=[probes.ObjectPlace(cells, said)],
    )
    window = window or max(1, round(WINDOW * subject.anatomy.num_layers))
    knocked = probes.knockout(
        case.model,
        inputs,
        window=window,
        answers=[first],
        boxes=[boxes] if boxes else None,
        grid=grid,
        question=probes.text_span(tokenizer, inputs, [case.question]),
    )
    seen = [picture_as_seen(case, each, num_tokens)[0] for each in (inputs, trace.corruption(inputs))]
    return Traced(
        title=title,
        question=case.question,
        answer=decode(tokenizer, [first]).strip() or repr(tokenizer.decode([first])),
        pictures=(seen[0], seen[1]),
        boxes=tuple(boxes),
        trace=trace,
        knocked=knocked,
        window=window,
        whole_image=cells is None,
        facts=tuple(facts),
    )


def trace_rows(found: Traced) -> list[tuple[str, str, int, float]]:
    """Of every group of tokens and component: the layer whose clean output brings most back, and how much."""
    best = {}
    for group in found.trace.groups:
        for component in found.trace.components:
            rates = found.trace.of(component, group)
            best[group, component] = int(rates.argmax()), float(rates.max())
    return [
        (found.group_name(group), component, found.trace.layers[at], rate)
        for (group, component), (at, rate) in best.items()
    ]


def knockout_rows(found: Traced) -> list[tuple[str, tuple[int, int], float]]:
    """Of every kind of edge: the window of layers in which cutting it costs most, and the change in percent."""
    rows = []
    for pair, changes in zip(found.knocked.pairs, found.knocked.change[..., 0], strict=True):
        at = int(changes.argmin())
        rows.append((pair.replace("->", " → "), found.knocked.windows[at], float(changes[at])))
    return rows


def summary(found: Traced) -> Iterator[str]:
    """What the page says first."""
    clean, noised = float(found.trace.p_clean[0]), float(found.trace.p_corrupted[0])
    yield (
        f"“{found.answer}” has a probability of {100 * clean:.0f} %, and {100 * noised:.0f} % when the picture is "
        f"noised (sigma {found.trace.corruption.sigma:g})."
    )
    group, component, layer, rate = max(trace_rows(found), key=lambda row: row[-1])
    yield f"Put back alone, the {component} output of layer {layer} at {group} brings back {100 * rate:.0f} % of that."
    pair, (first, last), change = min(knockout_rows(found), key=lambda row: row[-1])
    layers = f"layer {first}" if first == last else f"layers {first} to {last}"
    edges = pair.replace("→", "to")
    yield f"The attention edges from {edges} in {layers} matter most: cutting them changes it by {change:.0f} %."


def trace_page(found: Traced) -> str:
    """Write the page: HTML without any reference to another file."""
    from ..report.page import render

    shown = {"summary": list(summary(found)), "trace_rows": trace_rows(found), "knockout_rows": knockout_rows(found)}
    drawings = {
        "recovery": _both_widths("what clean outputs bring back", [_recovery(found, g) for g in found.trace.groups]),
        "losses": _both_widths("what cut edges cost", [_losses(found)]),
    }
    return render("trace.html", title=f"vlmfix trace: {found.title}", found=found, drawings=drawings, **shown)


def _recovery(found: Traced, group: str) -> Callable[[Any], None]:
    def draw(panel: Any) -> None:
        found.trace.plot(panel, group=group)
        panel.set_title(found.group_name(group))

    return draw


def _losses(found: Traced) -> Callable[[Any], None]:
    def draw(panel: Any) -> None:
        found.knocked.plot(panel)
        panel.set_title("")

    return draw


def _both_widths(name: str, draw: Sequence[Callable[[Any], None]]) -> dict[str, str]:
    """A row of plots for a page, and a column for a telephone."""
    import matplotlib

    from ..report.drawing import COLOURS, FAINT, INK, NARROW, WIDE, empty_figure, hide_spines, svg

    style: dict[Any, Any] = dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color"), INK
    )
    style |= {"axes.edgecolor": FAINT, "legend.frameon": False, "font.size": 8, "axes.titlesize": 9}
    found = {}
    for size, width, rows, columns in (("wide", WIDE, 1, len(draw)), ("narrow", NARROW, len(draw), 1)):
        with matplotlib.rc_context(style):
            made, panels = empty_figure(width, 2.6 * rows, rows, columns)
            for panel, each in zip(panels, draw, strict=True):
                panel.set_prop_cycle(color=COLOURS)
                each(panel)
                hide_spines(panel, ("top", "right"))
            low, high = (side([panel.get_ylim()[end] for panel in panels]) for end, side in ((0, min), (1, max)))
            for panel in panels:
                panel.set_ylim(low, high)
            found[size] = svg(made, f"{name}, {size}")
    return found


_ABOUT = """\
Write a page that shows how one answer comes about: which layers carry what the image adds to it, at which tokens, and
which attention edges it cannot do without.

  vlmfix trace                                     is the largest object of a scene there, asked the embedded model
  vlmfix trace --model smol --scene 26 --object dog
  vlmfix trace --model llava-hf/llava-1.5-7b-hf --image dog.jpg --object dog --box 0.1 0.2 0.6 0.9

Causal tracing noises the picture until the answer is half lost, puts the clean output of one block of one layer back at
a time, and reads how much of the answer returns. Knockout cuts attention edges over a window of layers and reads how
much of it goes. Both look at the first word of the answer, in the stock model. The page is one HTML file.
"""


def add_trace(verbs: Any) -> argparse.ArgumentParser:
    """Add the verb to a command line's subparsers; import nothing heavy."""
    return add_verb(
        verbs,
        "trace",
        TraceOptions,
        about=_ABOUT,
        help_of={"prompt": "another question (default: Is there a NAME in the image?, answered in a single word)"},
    )


def run(arguments: argparse.Namespace, *, show: Callable[[str], None]) -> None:
    """Trace as asked and write the page."""
    from ..data.write import check_parent, write_text

    options = TraceOptions.from_arguments(arguments)
    check_parent(options.out)
    found = trace_command(options)
    write_text(options.out, trace_page(found))
    for line in summary(found):
        show(line)
    show(f"written: {options.out}")
