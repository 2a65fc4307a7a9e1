"""The start of ``smol``'s projector: each patch becomes the word of what it shows, before any language is learned.

First in closed form, ridge regression behind a random first layer; then both layers by a minute of gradient descent on
patches alone. The language model, which is not run, only lends its word embeddings.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from train_smol_data import Scenes
from train_smol_packing import Encoder
from transformers import LlavaForConditionalGeneration

from vlmfix.evals.testbed.scenes import BACKGROUND, GRID, NAMES
from vlmfix.evals.testbed.smol.facts import COLOURS
from vlmfix.evals.testbed.vocabulary import SCENES

__all__ = ["start_projector"]

_PLACE_SHARE, _COLOUR_SHARE, _POSITION_SHARE = 0.5, 0.35, 0.25
_RIDGE_SCENES, _RIDGE = 1000, 1e-3
_STEPS, _PATCHES, _RATE, _SHARPNESS, _TEST_SCENES = 700, 2048, 2e-3, 15.0, 500


@dataclass(frozen=True)
class _Patches:
    """All patches of all scenes, flat.

    Attributes:
        features: float16 ``[N, width]``.
        labels: int64 ``[N]``, category index or BACKGROUND.
        colours: int64 ``[N]``, index into COLOURS or its length.
        places: int64 ``[N]``, scene index.
    """

    features: Tensor
    labels: Tensor
    colours: Tensor
    places: Tensor


class _Words:
    """The language model's embeddings of the words that patches stand for."""

    def __init__(self, table: Tensor, encoder: Encoder) -> None:
        def word(text: str) -> Tensor:
            return table[torch.tensor(encoder(" " + text))].mean(0)

        self.names = torch.stack([word(name) for name in NAMES])
        self.places = torch.stack([word(scene.name) for scene in SCENES])
        self.colours = torch.stack([*(word(colour) for colour in COLOURS), torch.zeros(table.shape[1])])
        cell = torch.arange(GRID * GRID)
        across = torch.stack([word("left"), word("right")])[(cell % GRID >= GRID // 2).long()]
        down = torch.stack([word("top"), word("bottom")])[(cell // GRID >= GRID // 2).long()]
        self.positions = across + down

    def target(self, patches: _Patches, rows: Tensor) -> Tensor:
        """What the projector should give, ``[n, width of the language model]``.

        A patch of an object: the embedding of its name, plus a little of its colour's and of its position's. A patch of
        the background: half the embedding of the place.
        """
        labels, shown = patches.labels[rows], (patches.labels[rows] < BACKGROUND)[:, None]
        extra = _COLOUR_SHARE * self.colours[patches.colours[rows]]
        extra = extra + _POSITION_SHARE * self.positions[rows % (GRID * GRID)]
        named = self.names[labels.clamp(max=BACKGROUND - 1)] + extra
        return torch.where(shown, named, _PLACE_SHARE * self.places[patches.places[rows]])


def start_projector(
    model: LlavaForConditionalGeneration, scenes: Scenes, encoder: Encoder, say: Callable[[str], None]
) -> None:
    """Start the projector, first in closed form, then by gradient descent on patches.

    Args:
        model: From :func:`vlmfix.evals.testbed.smol.model.build_model`.
        scenes: The training scenes; the last 500 only tell how good the start is.
        encoder: Token ids.
        say: Told the share of right patches.
    """
    patches = _Patches(
        torch.from_numpy(np.array(scenes.features)).flatten(0, 1),
        torch.from_numpy(np.array(scenes.patches)).long().flatten(),
        torch.from_numpy(np.array(scenes.colours)).long().flatten(),
        torch.tensor(scenes.kinds).repeat_interleave(GRID * GRID),
    )
    words = _Words(model.model.language_model.embed_tokens.weight.detach().float(), encoder)
    projector = model.model.multi_modal_projector
    count = len(patches.labels)
    test = torch.arange(count - _TEST_SCENES * GRID * GRID, count)
    _solve(projector, patches, words, torch.arange(_RIDGE_SCENES * GRID * GRID))
    right = _accuracy(projector, patches, words, test)
    say(f"closed form: the nearest object word is right on {right:.1f} % of object patches")
    _descend(projector, patches, words, len(patches.labels) - len(test))
    say(f"by descent: on {_accuracy(projector, patches, words, test):.1f} %")


@torch.no_grad()
def _accuracy(projector: nn.Module, patches: _Patches, words: _Words, rows: Tensor) -> float:
    """Percentage of object patches whose nearest object word is theirs."""
    rows = rows[patches.labels[rows] < BACKGROUND]
    given = F.normalize(projector(patches.features[rows].float()), dim=1)
    nearest = (given @ F.normalize(words.names, dim=1).T).argmax(1)
    return 100 * float((nearest == patches.labels[rows]).float().mean())


@torch.no_grad()
def _solve(projector: nn.Module, patches: _Patches, words: _Words, rows: Tensor) -> None:
    """A random first layer, and the second one by ridge regression."""
    features, target = patches.features[rows].float(), words.target(patches, rows)
    mean, deviation = features.mean(0), features.std(0) + 1e-4
    random = torch.Generator().manual_seed(0)
    wide, width = projector.linear_1.weight.shape
    mix = 1.5 * torch.randn(wide, width, generator=random) / width**0.5 / deviation
    projector.linear_1.weight.copy_(mix)
    projector.linear_1.bias.copy_(0.3 * torch.randn(wide, generator=random) - mix @ mean)
    inner = F.gelu(projector.linear_1(features))
    inner = torch.cat([inner, torch.ones(len(inner), 1)], 1)
    damping = _RIDGE * len(inner) * inner[:, :-1].pow(2).mean() * torch.eye(wide + 1)
    solution = torch.linalg.solve(inner.T @ inner + damping, inner.T @ target)
    projector.linear_2.weight.copy_(solution[:-1].T)
    projector.linear_2.bias.copy_(solution[-1])


def _descend(projector: nn.Module, patches: _Patches, words: _Words, count: int) -> None:
    """Both layers: near to the target, and nearer to the right word than to any other one."""
    choices = F.normalize(torch.cat([words.names, words.places]), dim=1)
    optimizer = torch.optim.AdamW(projector.parameters(), lr=_RATE, weight_decay=0.0)
    random = torch.Generator().manual_seed(0)
    scale = words.names.pow(2).sum(1).mean()
    for step in range(_STEPS):
        for group in optimizer.param_groups:
            group["lr"] = _RATE * 0.5 * (1 + math.cos(math.pi * step / _STEPS))
        rows = torch.randint(0, count, (_PATCHES,), generator=random)
        labels = patches.labels[rows]
        right = torch.where(labels < BACKGROUND, labels, BACKGROUND + patches.places[rows])
        given = projector(patches.features[rows].float())
        loss = F.cross_entropy(_SHARPNESS * F.normalize(given, dim=1) @ choices.T, right)
        loss = loss + (given - words.target(patches, rows)).pow(2).sum(1).mean() / scale
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
