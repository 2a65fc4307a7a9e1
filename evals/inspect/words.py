"""Parts of an inspection: words and their tokens, groups of layers, questions, the picture as the model sees it."""

from __future__ import annotations

import itertools
import re
from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vlmfix.observe.prompts import PromptBuilder, encode
from vlmfix.observe.words import token_ends, yes_no_tokens

from ..benchmarks.object_choice import PROMPT as POPE_PROMPT
from ..report.page import data_uri
from ..testbed.vocabulary import article

if TYPE_CHECKING:
    from PIL.Image import Image

    from vlmfix.observe.words import Mention


GROUPS = ("all layers", "first third", "middle third", "last third")
"""Layers a map is averaged over."""


ASKED_AT_ONCE = 16
"""Questions per batch."""


@dataclass(frozen=True)
class Eye:
    """What looks at a picture: a model with its processor, the question, and what is known.

    Attributes:
        model: The model.
        processor: Its processor.
        prompts: Wraps a question into a prompt.
        picture: The picture.
        prompt: What is asked.
        objects: What is in the picture, where known, as CHAIR's objects.
        scene_words: Further words that count as context.
        max_new_tokens: Limit of the answer.
    """

    model: Any
    processor: Any
    prompts: PromptBuilder
    picture: Image
    prompt: str
    objects: frozenset[str] | None
    scene_words: frozenset[str]
    max_new_tokens: int


@dataclass(frozen=True)
class Span:
    """A word in a text and the tokens that spell it."""

    text: str
    tokens: tuple[int, ...]


def word_spans(tokenizer: Any, ids: Sequence[int], text: str) -> list[Span]:
    """Split an answer at white space; a word's tokens are those that spell it without punctuation around it."""
    ends = token_ends(tokenizer, ids, text)
    begins = [0, *ends[:-1]]
    found = []
    for match in re.finditer(r"\S+", text):
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


def ask_for(eye: Eye, names: Sequence[str]) -> list[float | None]:
    """Ask for objects: the probability of yes against no; None where the tokenizer has no single token for them."""
    import torch

    answers = yes_no_tokens(eye.processor.tokenizer)
    if answers is None or not names:
        return [None] * len(names)
    from vlmfix.observe.ask import look_at

    distinct = sorted(set(names))
    found: dict[str, float] = {}
    for start in range(0, len(distinct), ASKED_AT_ONCE):
        part = distinct[start : start + ASKED_AT_ONCE]
        questions = [POPE_PROMPT.format(question=f"Is there {article(name)} {name} in the image?") for name in part]
        prompts = [eye.prompts(question) for question in questions]
        inputs = encode(eye.processor, prompts, [eye.picture] * len(part), eye.model)
        with torch.no_grad():
            logits = look_at(eye.model, "inspect", inputs).answer(inputs, logits=True).logits[0]
        found |= dict(zip(part, answers.log_odds(logits).sigmoid().tolist(), strict=True))
    return [found[name] for name in names]


def picture_as_seen(eye: Eye, inputs: Any, num_image_tokens: int) -> tuple[str, tuple[int, int] | None]:
    """Return the picture as a data URI, as the model sees it where that is one picture, and the grid of its tokens."""
    from PIL import Image as Images

    pixels = inputs.get("pixel_values")
    processor = eye.processor.image_processor
    grid = grid_of(eye.model, inputs, num_image_tokens)
    picture = eye.picture
    mean, std = getattr(processor, "image_mean", None), getattr(processor, "image_std", None)
    if grid is not None and pixels is not None and pixels.dim() == 4 and mean is not None and std is not None:
        import torch

        scale = pixels.new_tensor(std).float()[:, None, None], pixels.new_tensor(mean).float()[:, None, None]
        seen = (pixels[0].float() * scale[0] + scale[1]).clamp(0, 1) * 255
        picture = Images.fromarray(seen.round().to(torch.uint8).permute(1, 2, 0).cpu().numpy())
    if max(picture.size) < 512:  # small pictures stay sharp
        factor = 512 // max(picture.size)
        picture = picture.resize((picture.width * factor, picture.height * factor), Images.Resampling.NEAREST)
    else:
        picture = picture.copy()
        picture.thumbnail((768, 768))
    return data_uri(picture, quality=88), grid


def grid_of(model: Any, inputs: Any, num_image_tokens: int) -> tuple[int, int] | None:
    """Return rows and columns of the image's tokens; None for tiles, several images, or no rectangle."""
    from vlmfix.probes.spans import square

    shape = inputs.get("image_grid_thw")
    if shape is not None:  # Qwen-VL and its kin
        merge = getattr(model.config.vision_config, "spatial_merge_size", 1)
        frames, rows, columns = (int(size) for size in shape[0])
        grid = (rows // merge, columns // merge)
        return grid if len(shape) == 1 and frames == 1 and grid[0] * grid[1] == num_image_tokens else None
    pixels = inputs.get("pixel_values")
    is_single = pixels is not None and pixels.dim() >= 4 and pixels.shape[:-3].numel() == 1
    return square(num_image_tokens) if is_single else None
