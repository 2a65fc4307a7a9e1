"""What is known along a batch of sequences (``SequenceState``): image tokens, learned sinks, chosen heads.

It sits on the cache object, so that it dies with the sequence and follows copies, crops, beams and further turns.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, ClassVar, Protocol

import torch
import torch.nn.functional as F

from vlmfix.errors import UnsupportedFeatureError

STATE_ATTRIBUTE = "_vlmfix"
"""The attribute of a cache object that holds its ``SequenceState``."""


SHARED = -1
"""In the keys of what was learned: not one site's, but the method's in all of them."""


class Learner(Protocol):
    """What a sequence must know of the methods that learned something in it, see ``vlmfix.methods.base.Method``."""

    name: ClassVar[str]
    hides_keys: ClassVar[bool]

    @property
    def keeps_choice(self) -> bool:
        """Whether what it learned at the end of a prompt holds for the answer behind that prompt alone."""

    @property
    def acts_without_image(self) -> bool:
        """Whether it edits prompts without an image too."""

    def crop(self, learned: Any, length: int) -> Any:
        """Forget what was learned of tokens behind the first ``length``."""

    def reorder(self, learned: Any, beams: torch.Tensor) -> Any:
        """Follow a reordering of the batch: row ``i`` continues row ``beams[i]``."""


@dataclass
class SequenceState:
    """What is known about a batch of sequences after their last prompt.

    Attributes:
        methods: The bound methods that filled the state.
        image_mask: bool ``[batch, prompt]``, image tokens. Positions behind it were generated: never image tokens.
        valid_mask: bool ``[batch, prompt]``, tokens that are no padding.
        input_ids: int64 ``[batch, prompt]``, or ``None`` when the model was called with embeddings.
        any_image: Whether any sample has an image token.
        all_images: Whether every sample has one.
        learned: What methods learned, by (method index, site index or ``SHARED``).
        decoded: Ids generated since the prompt, as (position, ids ``[batch, n]``); kept only for methods that read
            the text of earlier turns again.
        prompts: Where each prompt, a part of one or a further turn's, begins and ends; answers lie between.
        is_answered: Whether any token was decoded since the prompt.
        is_cut: Whether the cache was cropped into a prompt, so that what comes next is the rest of one.
        lost_image: Whether a prompt's image was cropped away, but not what was read with it.
        outdated: Names of the methods that chose something at the end of a prompt that was cropped away.
        stale: Why this is no longer about its cache, as a sentence; empty if it is.
        of_generate: Whether ``generate`` read the prompt: it reorders a batch among the beams of each prompt only.
        in_encoder: Whether the masks are those of an encoder's tokens, and all tokens of the decoder generated ones.
        key_masks: Properties of the prompt's tokens derived from the masks, by name.
        constants: Tensors made once per sequence, by (method index, site index).
        branch: The other branch of a decoding method; only ``vlmfix.decoding`` looks into it.
    """

    methods: tuple[Learner, ...]
    image_mask: torch.Tensor
    valid_mask: torch.Tensor
    input_ids: torch.Tensor | None
    any_image: bool
    all_images: bool = False
    learned: dict[tuple[int, int], Any] = field(default_factory=dict)
    decoded: list[tuple[int | torch.Tensor, torch.Tensor]] = field(default_factory=list)
    prompts: tuple[tuple[int, int], ...] = ()
    is_answered: bool = False
    is_cut: bool = False
    lost_image: bool = False
    outdated: tuple[str, ...] = ()
    stale: str = ""
    of_generate: bool = False
    in_encoder: bool = False
    key_masks: dict[str, torch.Tensor] = field(default_factory=dict)
    constants: dict[tuple[int, int], Any] = field(default_factory=dict)
    branch: Any = None

    def cropped(self, length: int) -> SequenceState:
        """Return the state of the first ``length`` tokens, fewer than the prompt has.

        In an earlier turn, these end within a prompt, or behind one and a part of its answer.
        """
        kept = tuple((start, min(stop, length)) for start, stop in self.prompts if start < length)
        end = kept[-1][1] if kept else length
        image_mask = self.image_mask[:, :end]
        has_image = image_mask.any(1).tolist()
        learners = sorted({index for index, _ in self.learned})
        return replace(
            self,
            image_mask=image_mask,
            valid_mask=self.valid_mask[:, :end],
            any_image=any(has_image),
            all_images=all(has_image),
            prompts=kept,
            is_answered=end < length,
            is_cut=kept != self.prompts[: len(kept)],
            lost_image=self.lost_image or (self.any_image and not any(has_image)),
            outdated=tuple(self.methods[index].name for index in learners if self.methods[index].keeps_choice),
            input_ids=None if self.input_ids is None else self.input_ids[:, :end],
            learned={key: self.methods[key[0]].crop(value, end) for key, value in self.learned.items()},
            decoded=[] if self.input_ids is None else [(end, self.input_ids[:, end:length])],
            key_masks={},
        )

    def picked(self, rows: torch.Tensor) -> SequenceState:
        """Return the state of some samples of the batch, int64 ``[picked]``.

        Raises:
            UnsupportedFeatureError: Another branch goes along with the batch, or what a method learned has no rows.
        """
        if self.branch is not None:
            raise UnsupportedFeatureError("The second branch of a decoding method belongs to its whole batch.")
        known = (self.image_mask, self.valid_mask, self.input_ids, self.learned, self.decoded)
        image_mask, valid_mask, input_ids, learned, decoded = rows_of(known, rows, len(self.image_mask))
        has_image = image_mask.any(1)
        return replace(
            self,
            image_mask=image_mask,
            valid_mask=valid_mask,
            input_ids=input_ids,
            any_image=bool(has_image.any()),
            all_images=bool(has_image.all()),
            learned=learned,
            decoded=decoded,
            key_masks={},
            constants={},
        )

    def reorder(self, beams: torch.Tensor) -> None:
        """Follow a reordering of the batch; beams of one prompt share its masks, and what was learned of it.

        In a loop of the user's own, rows may also have changed their prompts. These are told by their tokens, and what
        was learned of each follows.
        """
        batch = self.image_mask.shape[0]
        if batch > 1 and not self.of_generate:
            masks = [each for each in (self.image_mask, self.valid_mask, self.input_ids) if each is not None]
            if len(beams) != batch or any(not torch.equal(each, rows_of(each, beams, batch)) for each in masks):
                self.stale = _MOVED.format("reorder_cache")
                return
            self.learned, self.decoded = rows_of(self.learned, beams, batch), rows_of(self.decoded, beams, batch)
            self.constants = {}
            return
        for key, value in self.learned.items():
            self.learned[key] = self.methods[key[0]].reorder(value, beams)

    def key_mask(self, name: str) -> torch.Tensor:
        """Return a property of the prompt's tokens, bool ``[batch, prompt]``.

        Args:
            name: ``"image"``; ``"valid"`` (no padding); ``"prompt"`` (all); ``"prefix"`` (before the first image
                token, no padding); ``"behind"`` (no image, behind the first image token, no padding); ``"first"`` (the
                first token that is no padding).
        """
        made = self.key_masks.get(name)
        if made is None:
            image, valid = self.image_mask, self.valid_mask
            seen = image.cumsum(1) > 0
            made = {
                "image": lambda: image,
                "valid": lambda: valid,
                "prompt": lambda: torch.ones_like(image),
                "prefix": lambda: valid & ~seen & image.any(1, keepdim=True),
                "behind": lambda: valid & seen & ~image,
                "first": lambda: valid & (valid.cumsum(1) == 1),
            }[name]()
            if not torch.compiler.is_compiling():  # it would be compiled again for the second step, which finds them
                self.key_masks[name] = made
        return made

    def ids_so_far(self, length: int) -> torch.Tensor:
        """Return the ids of the first ``length`` tokens of prompt and answer, -1 where they are not known."""
        ids = self.valid_mask.new_full((self.valid_mask.shape[0], length), -1, dtype=torch.int64)
        parts = [] if self.input_ids is None else [(0, self.input_ids), *self.decoded]
        for where, known in parts:
            position = int(where)
            stop = min(position + known.shape[1], length)
            ids[:, position:stop] = known[:, : max(stop - position, 0)]
        return ids


def from_the_end(mask: torch.Tensor) -> torch.Tensor:
    """Count the true ones of ``[batch, n]`` from the last column on, each column included."""
    return mask.flip(1).cumsum(1).flip(1)


def rows_of(value: Any, rows: torch.Tensor, batch: int) -> Any:
    """Return what is known about some rows of a batch: tensors ``[batch, ...]``, and what holds them.

    Raises:
        UnsupportedFeatureError: It is something else, whose rows nobody knows.
    """
    if isinstance(value, torch.Tensor) and value.dim() and len(value) == batch:
        return value.index_select(0, rows.to(value.device))
    if isinstance(value, (tuple, list)):
        found = [rows_of(each, rows, batch) for each in value]
        return type(value)(*found) if hasattr(value, "_fields") else type(value)(found)
    if isinstance(value, dict):
        return {key: rows_of(each, rows, batch) for key, each in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{each.name: rows_of(getattr(value, each.name), rows, batch) for each in fields(value)})
    is_number = isinstance(value, torch.Tensor) and not value.dim()
    if value is not None and not is_number and not isinstance(value, (bool, int, float, str)):
        raise UnsupportedFeatureError(f"Nobody knows which rows of a {type(value).__name__} belong to which sample.")
    return value


def extend_mask(known: torch.Tensor | None, new: torch.Tensor, past: int, fill: bool = False) -> torch.Tensor:
    """Append a bool mask ``[batch, q_len]`` of new tokens to that of ``past`` tokens, of which only some are known."""
    if known is None:
        return F.pad(new, (past, 0), value=fill) if past else new
    known = known[:, :past].to(new.device)
    return torch.cat([F.pad(known, (0, past - known.shape[1]), value=fill), new], dim=1)


def state_of(cache: object) -> SequenceState | None:
    """Return the state kept on a cache object, if any."""
    return getattr(cache, STATE_ATTRIBUTE, None)


def keep_state(cache: Any, state: SequenceState, *, reorders: bool = False) -> None:
    """Keep a state on a cache object.

    Args:
        cache: The cache.
        state: What is known about its sequences.
        reorders: Whether the state must follow when beam search reorders the cache.
    """
    setattr(cache, STATE_ATTRIBUTE, state)
    if hasattr(cache, "batch_select_indices"):
        cache.batch_select_indices = _PickAndTell(cache)
    if (reorders or not state.of_generate) and hasattr(cache, "reorder_cache"):
        cache.reorder_cache = _ReorderWithState(cache)


_MOVED = "Rows of this cache were picked or put in another order ({}), and what is known of their prompts was not."


class _PickAndTell:
    """A cache's ``batch_select_indices`` that notes in its state that rows were picked; kept on the cache."""

    def __init__(self, cache: Any) -> None:
        self.cache = cache

    def __call__(self, indices: torch.Tensor) -> None:
        """Keep these rows, in this order."""
        type(self.cache).batch_select_indices(self.cache, indices)
        state = state_of(self.cache)
        if state is not None and state.image_mask.shape[0] > 1:  # a single prompt may be continued in several ways
            state.stale = _MOVED.format("batch_select_indices")


class _ReorderWithState:
    """A cache's ``reorder_cache`` that takes along what methods learned; kept on the cache, so it is copied with it."""

    def __init__(self, cache: Any) -> None:
        self.cache = cache

    def __call__(self, beam_idx: torch.Tensor) -> None:
        """Reorder the cache and its state: row ``i`` continues row ``beam_idx[i]``."""
        state = state_of(self.cache)
        if state is not None and state.branch is not None:
            state.branch.reorder(self.cache, beam_idx)
        else:
            type(self.cache).reorder_cache(self.cache, beam_idx)
        if state is not None:
            state.reorder(beam_idx)
