"""Packed training sequences: one prefix (with or without an image) shared by several independent dialogues.

A block mask lets every dialogue see the prefix and itself only, and positions restart after the prefix, so each
dialogue is computed exactly as if it stood alone. A *blind* dialogue does not see the image tokens either: it equals a
text-only prompt.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, field

import torch

from vlmfix.evals.testbed.captions import (
    BRIEF_PROMPTS,
    DETAILED_PROMPTS,
    QUESTION,
    SHORT_ANSWER,
    detailed_caption,
    questions,
    short_caption,
)
from vlmfix.evals.testbed.scenes import GRID
from vlmfix.evals.testbed.tiny import BOS, EOS, IMAGE, PAD, vocabulary
from vlmfix.evals.testbed.vocabulary import article

CAPTION, ANSWER, ANSWER_END, BLIND = 1, 2, 3, 4
"""Kinds of labels, weighted differently in the loss."""

_IDS = {word: index for index, word in enumerate(vocabulary())}
_WORDS = re.compile(r"[a-z]+|[^\w\s]")
YES, NO = _IDS["yes"], _IDS["no"]


def encode(text: str) -> list[int]:
    """Token ids without special tokens; equal to the tokenizer's, and strict: an unknown word is a ``KeyError``."""
    return [_IDS[word] for word in _WORDS.findall(text.lower())]


TEXT_PREFIX = [BOS, *encode("USER:")]
IMAGE_PREFIX = [*TEXT_PREFIX, *[IMAGE] * (GRID * GRID)]


@dataclass
class Packed:
    """One packed sequence under construction; segment 0 is the prefix."""

    prefix: list[int]
    limit: int
    ids: list[int] = field(default_factory=list)
    segments: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    kinds: list[int] = field(default_factory=list)
    blind: list[bool] = field(default_factory=list)
    used: int = 0

    def __post_init__(self) -> None:
        n = len(self.prefix)
        self.ids, self.segments, self.positions = list(self.prefix), [0] * n, list(range(n))
        self.labels, self.kinds, self.blind = [0] * n, [0] * n, [False] * n

    def add(self, turns: list[tuple[list[int], list[int], list[int]]], blind: bool = False) -> bool:
        """Appends one dialogue if it fits.

        Args:
            turns: ``(prompt, reply, kinds)`` per turn; a reply's tokens are the labels.
            blind: Hide the image of the prefix from this dialogue.
        """
        ids, labels, kinds = [], [], []
        for prompt, reply, marks in turns:
            ids += prompt + reply
            labels += [0] * (len(prompt) - 1) + reply + [0]
            kinds += [0] * (len(prompt) - 1) + marks + [0]
        if len(self.ids) + len(ids) > self.limit:
            return False
        self.used += 1
        start = len(TEXT_PREFIX) if blind else len(self.prefix)
        self.ids += ids
        self.labels += labels
        self.kinds += [BLIND if blind and kind else kind for kind in kinds]
        self.segments += [self.used] * len(ids)
        self.positions += range(start, start + len(ids))
        self.blind += [blind] * len(ids)
        return True


def _caption_turn(kind: int, counts: dict[str, int], rng: random.Random) -> tuple[list[int], list[int], list[int]]:
    draw = rng.random()
    if draw < 0.06:
        prompt, text = rng.choice(BRIEF_PROMPTS), short_caption(kind, counts)
    else:
        prompt = DETAILED_PROMPTS[0] if draw < 0.6 else rng.choice(DETAILED_PROMPTS)
        text = detailed_caption(kind, counts, rng)
    reply = [*encode(text), EOS]
    return encode(prompt + " ASSISTANT:"), reply, [CAPTION] * len(reply)


def _question_turn(name: str, answer: bool, rng: random.Random) -> tuple[list[int], list[int], list[int]]:
    text = QUESTION.format(article=article(name), name=name)
    if rng.random() < 0.15:
        text += " " + rng.choice(SHORT_ANSWER)
    return encode(text + " ASSISTANT:"), [YES if answer else NO, EOS], [ANSWER, ANSWER_END]


def pack_image(kind: int, counts: dict[str, int], rng: random.Random, limit: int, blind_rate: float) -> Packed:
    """A caption and up to six questions about one image; some are blind, so that text alone stays familiar."""
    packed = Packed(IMAGE_PREFIX, limit)
    packed.add([_caption_turn(kind, counts, rng)])
    if rng.random() < blind_rate:
        packed.add([_caption_turn(kind, counts, rng)], blind=True)
    for name, answer in questions(kind, list(counts), rng, 6):
        packed.add([_question_turn(name, answer, rng)], blind=rng.random() < blind_rate / 3)
    return packed


def pack_text(scenes: list[tuple[int, dict[str, int]]], rng: random.Random, limit: int) -> Packed:
    """Text-only dialogues: captions, and questions with no context, after one sentence, or after the full caption."""
    packed = Packed(TEXT_PREFIX, limit)
    for kind, counts in scenes:
        asked = questions(kind, list(counts), rng, 6)
        first = [_caption_turn(kind, counts, rng)]
        for name, answer in asked[: rng.choice((0, 0, 1, 2))]:
            prompt, reply, marks = _question_turn(name, answer, rng)
            first.append((encode("USER:") + prompt, reply, marks))
        packed.add(first)
        for name, answer in asked[2:4]:
            prompt, reply, marks = _question_turn(name, answer, rng)
            context = encode(short_caption(kind, counts)) if rng.random() < 0.7 else []
            packed.add([(context + prompt, reply, marks)])
    return packed


def collate(rows: list[Packed], limit: int) -> dict[str, torch.Tensor]:
    """Pads to ``limit`` and builds the additive block mask.

    Returns:
        ``ids``, ``positions``, ``labels``, ``kinds``: int64 ``[B, T]``; ``mask``: bfloat16 ``[B, 1, T, T]``.
    """

    def tensor(name: str, fill: int) -> torch.Tensor:
        return torch.tensor([getattr(row, name) + [fill] * (limit - len(row.ids)) for row in rows])

    segments, blind = tensor("segments", -1), tensor("blind", False)
    ids = tensor("ids", PAD)
    prefix_key = (segments[:, None, :] == 0) & ~(blind[:, :, None] & (ids == IMAGE)[:, None, :])
    visible = prefix_key | (segments[:, None, :] == segments[:, :, None])
    visible &= torch.ones(limit, limit, dtype=torch.bool).tril()
    mask = torch.where(visible[:, None], 0.0, -1e4).to(torch.bfloat16)
    return {
        "ids": ids,
        "positions": tensor("positions", 0),
        "labels": tensor("labels", 0),
        "kinds": tensor("kinds", 0),
        "mask": mask,
    }
