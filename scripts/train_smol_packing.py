"""Packed training sequences of ``smol``: one image shared by a caption and several questions.

A block mask lets every dialogue see the prefix and itself only, and positions restart after the prefix, so each
dialogue is computed as if it stood alone. A *blind* dialogue does not see the image tokens either: it is a text-only
prompt, and what it teaches is the prior. Some questions do not see the patches of one object: what usually stands in
such a place is annotated in real mixtures too where it can hardly be seen.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import torch
from train_smol_data import Scenes
from transformers import PreTrainedTokenizerFast

from vlmfix.evals.testbed.scenes import GRID, NAMES
from vlmfix.evals.testbed.smol.captions import Length, caption, instruction
from vlmfix.evals.testbed.smol.facts import COLOURS
from vlmfix.evals.testbed.smol.model import IMAGE_ID, PAD_ID, TURN_END_ID, TURN_START_ID
from vlmfix.evals.testbed.smol.questions import TAUGHT, existence_questions, other_questions
from vlmfix.evals.testbed.vocabulary import SCENES, plural

CAPTION, OBJECT, ANSWER, END, CHAT, STOP = range(1, 7)
"""Kinds of labels: filler words and object words of captions, first tokens of answers, ends of answers, ordinary chat,
ends of captions."""

LENGTHS: tuple[tuple[Length, float], ...] = (("brief", 0.15), ("medium", 0.55), ("long", 0.3))
BLIND_CAPTIONS, BLIND_QUESTIONS, CHAT_RATE = 0.1, 0.05, 0.1
TYPICAL_SHARE, OCCLUDED = 0.03, 0.15
_PATCHES = GRID * GRID
_FACTS = ("two", "three", "several", "top", "bottom", "middle", "center", "halfway", "upper", "lower", "above", "below")


class Encoder:
    """Token ids of texts, remembered; pieces of ChatML."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer
        self._known: dict[str, list[int]] = {}
        self.text_prefix = [TURN_START_ID, *self("user\n")]
        self.image_prefix = [*self.text_prefix, *[IMAGE_ID] * (GRID * GRID), *self("\n")]
        self.reply = [TURN_END_ID, *self("\n"), TURN_START_ID, *self("assistant\n")]
        words = {*NAMES, *map(plural, NAMES), *COLOURS, *(scene.name for scene in SCENES)} | {*_FACTS, "large", "small"}
        self._object_words = {
            tuple(self(word)): None for name in words for word in (" " + name, name[0].upper() + name[1:])
        }

    def __call__(self, text: str) -> list[int]:
        """Token ids without special tokens."""
        if text not in self._known:
            self._known[text] = self._tokenizer(text, add_special_tokens=False).input_ids
        return self._known[text]

    def marks(self, ids: list[int]) -> list[int]:
        """OBJECT for tokens that say what, how many, of which colour and size or where, CAPTION for the others."""
        marks = [CAPTION] * len(ids)
        for start in range(len(ids)):
            for length in range(4, 0, -1):
                if tuple(ids[start : start + length]) in self._object_words:
                    marks[start : start + length] = [OBJECT] * length
                    break
        return marks


@dataclass
class Packed:
    """One packed sequence; segment 0 is the prefix, and ``hidden`` are the patches that each segment does not see."""

    encoder: Encoder
    limit: int
    ids: list[int] = field(default_factory=list)
    segments: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    kinds: list[int] = field(default_factory=list)
    hidden: list[list[bool]] = field(default_factory=list)
    used: int = 0

    def __post_init__(self) -> None:
        n = len(self.encoder.image_prefix)
        self.ids, self.segments, self.positions = list(self.encoder.image_prefix), [0] * n, list(range(n))
        self.labels, self.kinds, self.hidden = [0] * n, [0] * n, [[False] * _PATCHES]

    def add(
        self, prompt: str, reply: list[int], kinds: list[int], *, blind: bool, hidden: list[bool] | None = None
    ) -> bool:
        """Append one dialogue if it fits.

        Args:
            prompt: What the user says.
            reply: Token ids of the answer, which are the labels.
            kinds: Kind of each label.
            blind: Hide the image of the prefix from this dialogue.
            hidden: Or the patches that are true here.
        """
        asked = [*self.encoder(prompt), *self.encoder.reply]
        size = len(asked) + len(reply)
        if len(self.ids) + size > self.limit:
            return False
        self.used += 1
        start = len(self.encoder.text_prefix) if blind else len(self.encoder.image_prefix)
        self.ids += asked + reply
        # A position's label is the token behind it.
        self.labels += [0] * (len(asked) - 1) + reply + [0]
        self.kinds += [0] * (len(asked) - 1) + kinds + [0]
        self.segments += [self.used] * size
        self.positions += range(start, start + size)
        self.hidden.append([blind] * _PATCHES if hidden is None or blind else hidden)
        return True


def pack(
    scenes: Scenes, row: int, encoder: Encoder, chats: list[tuple[str, list[int]]], rng: random.Random, limit: int
) -> Packed:
    """A caption of one scene and as many questions as fit; now and then a bit of ordinary chat.

    Args:
        scenes: The training scenes.
        row: Which one.
        encoder: Token ids.
        chats: User texts and the language model's own replies to them, from before the training.
        rng: Source of every choice.
        limit: Length of the sequence.
    """
    kind, things = scenes.kinds[row], scenes.things[row]
    packed = Packed(encoder, limit)
    length = rng.choices([name for name, _ in LENGTHS], [share for _, share in LENGTHS])[0]
    words = [*encoder(caption(kind, things, length, rng)), TURN_END_ID]
    # Read off greedily, a caption would end too early: the end is one token, what else may follow are many.
    packed.add(instruction(length, rng), words, [*encoder.marks(words[:-1]), STOP], blind=rng.random() < BLIND_CAPTIONS)
    if chats and rng.random() < CHAT_RATE:
        text, words = rng.choice(chats)
        packed.add(text, words, [CHAT] * len(words), blind=True)
    asked = other_questions(kind, things, rng, 4, TAUGHT) + existence_questions(kind, things, rng, 4, TYPICAL_SHARE)
    rng.shuffle(asked)
    for question in asked:
        words = [*encoder(question.answer), TURN_END_ID]
        kinds = [ANSWER] + [END] * (len(words) - 1)
        hidden = None
        if question.kind == "existence" and rng.random() < OCCLUDED:
            hidden = _patches_of(scenes, row, question.name, rng)
        if not packed.add(question.text, words, kinds, blind=rng.random() < BLIND_QUESTIONS, hidden=hidden):
            break
    return packed


def _patches_of(scenes: Scenes, row: int, name: str, rng: random.Random) -> list[bool]:
    """Where an object is; of one that is absent or unusual for the place, where another one is."""
    names = [thing.name for thing in scenes.things[row]]
    if name not in names or name not in SCENES[scenes.kinds[row]].typical:
        name = rng.choice([other for other in names if other != name] or names)
    return [int(patch) == NAMES.index(name) for patch in scenes.patches[row]]


@dataclass(frozen=True)
class Batch:
    """Tensors of packed sequences.

    Attributes:
        ids, positions, labels, kinds: int64 ``[B, T]``.
        mask: ``[B, 1, T, T]``, 0 where a row sees a key, else -1e4.
        image_at: Position of the first image token.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    labels: torch.Tensor
    kinds: torch.Tensor
    mask: torch.Tensor
    image_at: int


def collate(rows: list[Packed], dtype: torch.dtype) -> Batch:
    """Pad to the limit and build the block mask."""
    size = rows[0].limit

    def tensor(name: str, fill: int) -> torch.Tensor:
        return torch.tensor([getattr(row, name) + [fill] * (size - len(row.ids)) for row in rows])

    ids, segments = tensor("ids", PAD_ID), tensor("segments", -1)
    first = len(rows[0].encoder.text_prefix)
    hidden = torch.zeros(len(rows), size, size, dtype=torch.bool)
    for place, row in enumerate(rows):
        hidden[place, :, first : first + _PATCHES] = torch.tensor(row.hidden)[segments[place].clamp(min=0)]
    visible = ((segments[:, None, :] == 0) & ~hidden) | (segments[:, None, :] == segments[:, :, None])
    visible &= torch.ones(size, size, dtype=torch.bool).tril()
    mask = torch.where(visible[:, None], 0.0, -1e4).to(dtype)
    return Batch(ids, tensor("positions", 0), tensor("labels", 0), tensor("kinds", 0), mask, first)
