"""One answer about a picture, looked at with every probe: what the page shows."""

from __future__ import annotations

import itertools
import re
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from vlmfix import probes
from vlmfix.observe.ask import Answers, answer
from vlmfix.observe.words import Mention, decode, locate_mentions, token_ends
from vlmfix.patching import patched
from vlmfix.probes.evidence import DOUBT_THRESHOLD, doubt

from ..benchmarks.coco_objects import ChairMatcher
from ..data.thinking import without_thinking
from ..run.methods import MethodSpec
from .case import Case, picture_as_seen

GROUPS = ("all layers", "first third", "middle third", "last third")
"""Layers a map is averaged over."""

SHOWN_SINKS = 8
"""Tokens listed by the attention they receive."""

MIN_ROWS = 8
"""Tokens seen by fewer rows are not listed, as they are no attention sinks."""


@dataclass(frozen=True)
class Word:
    """One word of an answer.

    Attributes:
        text: As written, with what follows up to the next word.
        tokens: Indices of the answer's tokens that spell it.
        name: The object it names, if CHAIR's vocabulary knows one.
        present: Whether that is in the image, where known.
        probability: Of its tokens together; so are the next three.
        without_image: After the same words, without the image.
        image_hidden: With the image hidden from everything behind it.
        context_hidden: With the object words and the scene's name hidden from everything behind them.
        mass: Attention on the image, mean over layers, heads and tokens.
        asked: Probability of yes to the question for the object; None for other words.
        doubt: See ``vlmfix.probes.doubt``; None for other words.
        flagged: Whether doubt reaches the threshold.
        maps: Per group of layers, attention per image token, mean over heads and the word's tokens.
        heads: Head divergence, ``[layers][heads]``, at the word's first token.
    """

    text: str
    tokens: tuple[int, ...]
    name: str | None
    present: bool | None
    probability: float
    without_image: float
    image_hidden: float
    context_hidden: float | None
    mass: float
    asked: float | None
    doubt: float | None
    flagged: bool
    maps: tuple[tuple[float, ...], ...]
    heads: tuple[tuple[float, ...], ...]


class SinkRow(NamedTuple):
    """A token of the prompt that receives much attention.

    Attributes:
        text: As written; an image token by its number.
        place: Its place in the prompt.
        is_image: Whether it is the image's.
        received: Mean attention it gets.
        attention_layers: In how many layers it is an attention sink in at least half of the heads.
        hidden_layers: In how many layers its hidden state marks a sink.
    """

    text: str
    place: int
    is_image: bool
    received: float
    attention_layers: int
    hidden_layers: int


@dataclass(frozen=True)
class SinkSummary:
    """The sinks of the prompt.

    Attributes:
        received: Per image token, mean attention it gets, over layers and heads.
        rows: The tokens that receive most.
        counts: Per kind of sink, how many each layer has.
        sink_dims: Hidden dimensions that mark sinks; empty when the model has none.
    """

    received: tuple[float, ...]
    rows: tuple[SinkRow, ...]
    counts: Mapping[str, tuple[int, ...]]
    sink_dims: tuple[int, ...]


@dataclass(frozen=True)
class Version:
    """An answer, before or after a patch.

    Attributes:
        label: ``"stock model"`` or the method with its parameters.
        note: What to know about it.
        caption: The answer.
        words: Its words.
        layers: Layers looked at.
        selected: Heads VHR would choose, ``[layers][heads]``.
        sinks: The prompt's sinks.
    """

    label: str
    note: str
    caption: str
    words: tuple[Word, ...]
    layers: tuple[int, ...]
    selected: tuple[tuple[bool, ...], ...]
    sinks: SinkSummary


@dataclass(frozen=True)
class Inspection:
    """Everything the page shows.

    Attributes:
        title: Picture and model.
        prompt: What was asked.
        picture: A data URI of the picture as the model sees it, or of the original.
        grid: Rows and columns of the image's tokens; None where they fill no single grid.
        objects: What is in the image, where known.
        versions: The stock model's answer, and the patched one's.
        facts: Lines on model, image and command.
    """

    title: str
    prompt: str
    picture: str
    grid: tuple[int, int] | None
    objects: tuple[str, ...] | None
    versions: tuple[Version, ...]
    facts: tuple[str, ...]


def inspect_picture(case: Case, specs: Sequence[MethodSpec], *, title: str, facts: Sequence[str] = ()) -> Inspection:
    """Look at one picture with the stock model, and with each method.

    Args:
        case: Model, picture and question.
        specs: Methods.
        title: Of the page.
        facts: Lines for its foot.
    """
    inputs = case.inputs()
    versions = [_look(case, inputs, "stock model", "")]
    for spec in specs:
        method = spec.build()
        if (method.replaces_logits or method.rewrites_answers) and not method.is_identity:
            with patched(case.model, method):
                tokens = answer(case.model, inputs, case.max_new_tokens).tokens
            where = "the stock model" if method.rewrites_answers else "one branch, the stock model"
            note = f"The words are those of {spec.label}; what they rest on is measured in {where}."
            versions.append(_look(case, inputs, spec.describe(), note, tokens))
        else:
            with patched(case.model, method):
                versions.append(_look(case, inputs, spec.describe(), ""))
    picture, grid = picture_as_seen(case, inputs, len(versions[0].words[0].maps[0]) if versions[0].words else 0)
    objects = None if case.objects is None else tuple(sorted(case.objects))
    return Inspection(
        title=title,
        prompt=case.question,
        picture=picture,
        grid=grid,
        objects=objects,
        versions=tuple(versions),
        facts=tuple(facts),
    )


def _look(case: Case, inputs: Any, label: str, note: str, tokens: Answers | None = None) -> Version:
    """Look at one answer: the model's own, or ``tokens``; thinking before it is no part of the answer."""
    tokenizer = case.processor.tokenizer
    looks = probes.attention_to_image(case.model, inputs, max_new_tokens=case.max_new_tokens, answers=tokens, maps=True)
    ids = looks.tokens[0]
    written = decode(tokenizer, ids)
    thought = without_thinking(written)
    text = thought.answer
    begin = written.rindex(text)
    if thought.traced:
        never = " It never ends: allow a longer answer with --max-new-tokens." if thought.unfinished else ""
        note += f" {len(written[:begin].split())} words of thinking before the answer are left out.{never}"
    spans = word_spans(tokenizer, ids, written, slice(begin, begin + len(text)))
    answered = {token for span in spans for token in span.tokens}
    mentions, _ = locate_mentions(tokenizer, ids, ChairMatcher("original").as_written(written))
    mentions = [mention for mention in mentions if mention.token in answered]
    context = context_of(spans, mentions, case.scene_words)
    rests = probes.evidence(case.model, inputs, answers=looks.tokens, context=[context])
    divergence = probes.head_divergence(case.model, inputs, answers=looks.tokens)
    sinks = probes.sinks(case.model, inputs)
    asked = case.ask_for([mention.name for mention in mentions])
    assert looks.maps is not None
    objects = {mention.token: (mention.name, yes) for mention, yes in zip(mentions, asked, strict=True)}
    words = tuple(_word(span, looks, rests, divergence, case, objects) for span in spans)
    return Version(
        label=label,
        note=note.strip(),
        caption=text,
        words=words,
        layers=looks.layers,
        selected=tuple(map(tuple, divergence.selected[0].tolist())),
        sinks=_summary(case, inputs, sinks),
    )


def _word(
    span: Span, looks: Any, rests: Any, divergence: Any, case: Case, objects: Mapping[int, tuple[str, float | None]]
) -> Word:
    tokens = list(span.tokens)
    name, asked = next((objects[token] for token in tokens if token in objects), (None, None))
    p, p0, hidden, context = (
        float(values[0, tokens].prod())
        for values in (rests.probability, rests.without_image, rests.image_hidden, rests.context_hidden)
    )
    doubtful = None if name is None else doubt(p, p0, asked)
    maps = looks.maps[0, tokens].mean(0)  # [layers, image tokens]
    return Word(
        text=span.text,
        tokens=span.tokens,
        name=name,
        present=None if name is None or case.objects is None else name in case.objects,
        probability=p,
        without_image=p0,
        image_hidden=hidden,
        context_hidden=None if context != context else context,
        mass=float(rests.mass[0, tokens].mean()),
        asked=asked,
        doubt=doubtful,
        flagged=doubtful is not None and doubtful >= DOUBT_THRESHOLD,
        maps=tuple(tuple(maps[list(group)].mean(0).tolist()) for group in layer_groups(len(maps))),
        heads=tuple(map(tuple, divergence.divergence[0, tokens[0]].tolist())),
    )


def _summary(case: Case, inputs: Any, sinks: Any) -> SinkSummary:
    received = sinks.received[0].mean((0, 1))  # [tokens]
    often = (sinks.attention_sinks[0].float().mean(1) >= 0.5).sum(0)
    hidden = sinks.hidden_sinks[0].sum(0)
    seen = sinks.is_token[0].nonzero()[:, 0].tolist()[: -MIN_ROWS + 1]  # the mean of a few rows says little
    order = sorted(seen, key=lambda at: -float(received[at]))[:SHOWN_SINKS]
    image = sinks.is_image[0]
    place = (image.cumsum(0) - 1).tolist()
    ids = inputs["input_ids"][0].tolist()
    written = [f"patch {place[at]}" if image[at] else case.processor.tokenizer.decode([ids[at]]) for at in order]
    rows = tuple(
        SinkRow(text, at, bool(image[at]), float(received[at]), int(often[at]), int(hidden[at]))
        for text, at in zip(written, order, strict=True)
    )
    counts = {kind: tuple(values[0].tolist()) for kind, values in sinks.counts().items()}
    return SinkSummary(tuple(received[image].tolist()), rows, counts, sinks.sink_dims)


@dataclass(frozen=True)
class Span:
    """A word in a text and the tokens that spell it."""

    text: str
    tokens: tuple[int, ...]


def word_spans(tokenizer: Any, ids: Sequence[int], text: str, part: slice = slice(None)) -> list[Span]:
    """Split a part of a text at white space; a word's tokens are those that spell it without punctuation around it."""
    ends = token_ends(tokenizer, ids, text)
    begins = [0, *ends[:-1]]
    found = []
    for match in re.compile(r"\S+").finditer(text, *part.indices(len(text))[:2]):
        core = re.search(r"\w(?:.*\w)?", match[0])
        first, last = match.span() if core is None else (match.start() + core.start(), match.start() + core.end())
        spelt = tuple(i for i, (a, b) in enumerate(zip(begins, ends, strict=True)) if a < last and b > first and b > a)
        if spelt:
            found.append(Span(match[0], spelt))
    return found


def bare(text: str) -> str:
    """Return the letters and digits of a word, lower-cased."""
    return re.sub(r"\W", "", text).lower()


def word_of(spans: Sequence[Span], token: int) -> Span:
    """Return the word that a token helps to spell; one without text if none does."""
    return next((span for span in spans if token in span.tokens), Span("", (token,)))


def context_of(spans: Sequence[Span], mentions: Sequence[Mention], scene_words: Container[str]) -> list[int]:
    """Return the tokens of an answer that name objects or the place: what a language prior goes by."""
    tokens = {token for mention in mentions for token in word_of(spans, mention.token).tokens}
    return sorted(tokens | {token for span in spans if bare(span.text) in scene_words for token in span.tokens})


def layer_groups(num_layers: int) -> tuple[range, ...]:
    """Return the places of the layers of each of ``GROUPS``; fewer than three layers are all in each."""
    if num_layers < 3:
        return (range(num_layers),) * len(GROUPS)
    cuts = [round(third * num_layers / 3) for third in range(4)]
    return (range(num_layers), *(range(a, b) for a, b in itertools.pairwise(cuts)))
