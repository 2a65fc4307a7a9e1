"""Named sets of a prompt's tokens: image, question, last, and the image tokens of boxes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from vlmfix.errors import MethodError
from vlmfix.model.anatomy import Anatomy
from vlmfix.observe.words import decode, find_word, prompt_tokens, word_tokens

Spans = Mapping[str, torch.Tensor]
"""Sets of tokens by name, each bool ``[batch, length]``."""


Boxes = Sequence[Sequence[tuple[float, float, float, float]]]
"""Per sample, boxes ``(left, top, right, bottom)`` in parts of the image, 0 to 1."""


def find_spans(
    anatomy: Anatomy,
    inputs: Mapping[str, Any],
    *,
    question: torch.Tensor | None = None,
    boxes: Boxes | None = None,
    grid: tuple[int, int] | None = None,
    more: Spans | None = None,
) -> dict[str, torch.Tensor]:
    """Find the named sets of the tokens of a batch of left-padded prompts.

    Args:
        anatomy: The model.
        inputs: The processor's output.
        question: The tokens of the question's text, see ``text_span``. Default: all behind the image but the
            last, such as line breaks and instructions.
        boxes: Boxes of an object; every image token whose cell a box touches is one of ``object``.
        grid: Rows and columns of the image's tokens. Default: a square.
        more: Further sets.

    Returns:
        ``image``, ``behind`` (all behind the last image token), ``question``, ``last``, ``text`` (all but the image);
        with boxes ``object`` and ``other``; and ``more``. No set holds padding.

    Raises:
        MethodError: Boxes or sets that do not fit the batch, or image tokens that fill no such grid.
    """
    valid, image, last, behind = prompt_tokens(anatomy, inputs)
    found = {"image": image, "question": behind & ~last, "last": last, "text": valid & ~image, "behind": behind}
    given = list((more or {}).items())
    if question is not None:
        given.append(("question", question))
    if boxes is not None:
        found["object"] = _inside(image, boxes, grid)
        found["other"] = image & ~found["object"]
    for name, span in given:
        if (name in found and span is not question) or span.shape != valid.shape or span.dtype != torch.bool:
            raise MethodError(
                f"spans[{name!r}] must be a new name for a bool tensor {tuple(valid.shape)}, got {span.dtype} "
                f"{tuple(span.shape)}; taken names: {', '.join(found)}."
            )
        found[name] = span.to(valid.device) & valid
    return found


def text_span(tokenizer: Any, inputs: Mapping[str, Any], texts: Sequence[str]) -> torch.Tensor:
    """Return the tokens that spell a text in each prompt, such as the question without its template's words.

    A token that holds characters beside those of the text is one of them.

    Args:
        tokenizer: The model's tokenizer.
        inputs: The processor's output.
        texts: One text per prompt, as it stands there.

    Returns:
        Bool ``[batch, length]``.

    Raises:
        MethodError: A text does not stand in its prompt, or stands there twice.
    """
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    if len(texts) != len(ids):
        raise MethodError(f"texts must hold one text for each of {len(ids)} prompts, got {len(texts)}.")
    span = torch.zeros_like(ids, dtype=torch.bool)
    for sample, text in enumerate(texts):
        places = torch.arange(ids.shape[1], device=ids.device) if mask is None else mask[sample].nonzero()[:, 0]
        own = ids[sample, places].tolist()
        whole = decode(tokenizer, own)
        first = find_word(whole, text)
        if first is None or find_word(whole, text, first[1]) is not None:
            raise MethodError(
                f"The text {text!r} stands {'nowhere' if first is None else 'more than once'} in prompt {sample}: "
                f"{whole!r}. Give it as it stands there, or make the set of tokens yourself."
            )
        span[sample, places[word_tokens(tokenizer, own, text)]] = True
    return span


def is_subset(inner: torch.Tensor, outer: torch.Tensor) -> bool:
    """Whether every token of one set is one of another."""
    return not bool((inner & ~outer).any())


def cells_of(box: Sequence[float], rows: int, columns: int) -> list[int]:
    """Return the cells of a grid that a box ``(left, top, right, bottom)`` in parts of the image touches.

    Raises:
        MethodError: The box is empty or lies outside the image.
    """
    left, top, right, bottom = box
    if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
        raise MethodError(f"A box is (left, top, right, bottom) in parts of the image, 0 to 1; got {tuple(box)}.")
    return [
        row * columns + column
        for row in range(rows)
        for column in range(columns)
        if left * columns < column + 1 and right * columns > column and top * rows < row + 1 and bottom * rows > row
    ]


def square(num_image_tokens: int) -> tuple[int, int] | None:
    """Return the square grid of so many tokens, or ``None``."""
    side = round(num_image_tokens**0.5)
    return (side, side) if side * side == num_image_tokens and side else None


def _inside(image: torch.Tensor, boxes: Boxes, grid: tuple[int, int] | None) -> torch.Tensor:
    if len(boxes) != len(image):
        raise MethodError(f"boxes must hold one list for each of {len(image)} samples, got {len(boxes)}.")
    inside = torch.zeros_like(image)
    for sample, listed in enumerate(boxes):
        positions = image[sample].nonzero()[:, 0]
        shape = grid or square(len(positions))
        if shape is None or shape[0] * shape[1] != len(positions):
            raise MethodError(
                f"The {len(positions)} image tokens of sample {sample} fill no grid of {shape or 'a square'}. Pass "
                "grid=(rows, columns), or for images in several tiles the tokens themselves: spans={'object': mask}."
            )
        cells = sorted({cell for box in listed for cell in cells_of(box, *shape)})
        inside[sample, positions[cells]] = True
    return inside
