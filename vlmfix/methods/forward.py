"""One call of the model (``Forward``), as methods see it, and its query rows.

A ``Forward`` is created by a hook on the model, travels down to every attention call in its keyword arguments and ends
with the call. What must outlive it sits on the cache (``vlmfix.methods.sequence``).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F

from vlmfix.methods.sequence import SequenceState, from_the_end

PromptRows = Literal["none", "last", "text", "image", "all"]
"""Query rows of a prompt: none, each sample's last token (if no image follows it), those behind its last image token,
its image tokens, or all that are no padding. Samples without an image have none."""


class Rows(NamedTuple):
    """Query rows of a forward.

    Attributes:
        start: First row, relative to the forward.
        stop: End of the rows.
        mask: bool ``[batch, stop - start]``: which of them count in each sample; ``None`` for all.
    """

    start: int
    stop: int
    mask: torch.Tensor | None

    def part(self, start: int, stop: int) -> Rows:
        """Return the same choice among the rows ``start..stop - 1``, some of which may lie outside."""
        if self.mask is None and start >= self.start and stop <= self.stop:
            return Rows(start, stop, None)
        mask = self.mask
        if mask is None:
            raise AssertionError("rows without a mask are never cut")
        inside = mask[:, max(start - self.start, 0) : max(stop - self.start, 0)]
        before, after = max(min(self.start, stop) - start, 0), max(stop - max(self.stop, start), 0)
        return Rows(start, stop, F.pad(inside, (before, after)))


class Forward:
    """One call of a patched model, as methods see it.

    Attributes:
        state: What is known about its sequences.
        is_prefill: Whether the forward reads a prompt (a first one, or a further turn) rather than decodes.
        past: Tokens in the cache before this forward: int, or a 0-d tensor with a static cache while decoding.
        q_len: Tokens of this forward.
        prompt_len: Those of them that belong to the prompt; drafted tokens of assisted decoding may follow.
        num_given: Behind an encoder, how many tokens of the decoder come before the first one that is predicted.
        begins: Whether it is the first forward of an answer: it reads a prompt, or an encoder has just read one.
        acts: Whether any method has something to do: there is an image, or one that acts without.
        is_over: Whether it has ended. Gradient checkpointing computes layers again later, and nothing is learned then.
        text_only_heads: By site index, head outputs at the last position of an image-free pass over the same prompt,
            ``[batch, num_heads, head_dim]``, where a method needs them.
        edited: Per method, how many (sample, head, row) triples were edited, in parts still to be added up.
        moved: Per method, how far its edited outputs moved, see ``record_move``.
        is_measured: Whether that is measured in this forward: in prompts, and in the first step behind each.
        made: What several layers or methods share in this forward, see ``once``.
        mlp_inputs: By decoder layer, what entered its MLP, ``[batch, q_len, hidden_size]``, for methods that read it.
        early_logits: By decoder layer, what the head reads from the stream that entered it, for the same methods.
    """

    def __init__(
        self,
        state: SequenceState,
        *,
        is_prefill: bool,
        past: int | torch.Tensor,
        q_len: int,
        prompt_len: int,
        first_rows: dict[str, int] | None = None,
    ) -> None:
        self.state = state
        self.is_prefill = is_prefill
        self.past = past
        self.q_len = q_len
        self.prompt_len = prompt_len
        self.num_given = q_len
        self.begins = is_prefill
        self.acts = state.any_image or any(method.acts_without_image for method in state.methods)
        self.is_over = False
        self.text_only_heads: dict[int, torch.Tensor] = {}
        self.edited: list[list[torch.Tensor]] = [[] for _ in state.methods]
        self.moved: list[list[torch.Tensor]] = [[] for _ in state.methods]
        self.is_measured = is_prefill
        self._first_rows = first_rows or {}
        self.made: dict[Hashable, Any] = {}
        self.mlp_inputs: dict[int, torch.Tensor] = {}
        self.early_logits: dict[int, torch.Tensor] = {}

    @property
    def image_mask(self) -> torch.Tensor:
        """The image tokens: bool ``[batch, prompt]``."""
        return self.state.image_mask

    @property
    def valid_mask(self) -> torch.Tensor:
        """Tokens that are no padding: bool ``[batch, prompt]``."""
        return self.state.valid_mask

    @property
    def has_image(self) -> torch.Tensor:
        """Which samples have an image: bool ``[batch]``."""
        return self.state.image_mask.any(1)

    @property
    def image_stop(self) -> int:
        """End of the last image among the rows of a prompt."""
        return self._first_rows["image_stop"]

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """Return what ``make`` returned when this was first asked for under ``key`` in this forward."""
        if key not in self.made:
            self.made[key] = make()
        return self.made[key]

    def once_for(self, key: Hashable, objects: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        """Return what ``make`` returned when this was first asked for under ``key`` with these very objects."""
        known: list[tuple[tuple[Any, ...], Any]] = self.once(("for", key), list)
        for others, made in known:
            if all(one is other for one, other in zip(objects, others, strict=True)):
                return made
        known.append((objects, make()))
        return known[-1][1]

    def record_move(
        self, methods: Iterable[int], stock: torch.Tensor, edited: torch.Tensor, where: torch.Tensor | None = None
    ) -> None:
        """Record how far methods moved outputs together, see ``squared_move``."""
        sums = squared_move(stock, edited, where)
        for index in methods:
            self.moved[index].append(sums)

    def at_last_position(self, states: torch.Tensor) -> torch.Tensor:
        """Pick each sample's last prompt token: ``[batch, q_len, ...]`` in, ``[batch, ...]`` out."""
        if self.state.in_encoder:
            return states[:, self.num_given - 1]
        valid = self.valid_mask[:, -self.prompt_len :].to(states.device)
        positions = torch.arange(self.prompt_len, device=states.device) + states.shape[1] - self.q_len
        last = (valid * positions).amax(1)
        return states[torch.arange(states.shape[0], device=states.device), last]

    def num_prompt_rows(self) -> torch.Tensor:
        """How many rows of a prompt's forward are no padding: int64 ``[batch]``."""
        if self.state.in_encoder:
            return torch.full_like(self.valid_mask[:, 0], self.q_len, dtype=torch.int64)
        return self.valid_mask[:, -self.prompt_len :].sum(1) + self.q_len - self.prompt_len

    def rows(self, kind: PromptRows, decode: bool = True, *, every: bool = False) -> Rows:
        """Return query rows of samples with an image.

        Args:
            kind: Which rows of the prompt.
            decode: Whether rows of generated (or drafted) tokens belong to them.
            every: Whether those of samples without an image do too.
        """
        key = ("rows", kind, decode, every)
        if key not in self.made:
            rows_of = self._prompt_rows if self.is_prefill else self._decode_rows
            self.made[key] = rows_of(kind, decode, every)
        rows: Rows = self.made[key]
        return rows

    def _decode_rows(self, kind: PromptRows, decode: bool, every: bool) -> Rows:
        if not decode:
            return Rows(0, 0, self.has_image[:, None][:, :0])
        is_all = every or self.state.all_images
        return Rows(0, self.q_len, None if is_all else self.has_image[:, None].expand(-1, self.q_len))

    def _prompt_rows(self, kind: PromptRows, decode: bool, every: bool) -> Rows:
        image, valid, past = self.image_mask, self.valid_mask, self.past
        assert isinstance(past, int)
        chosen = self.has_image[:, None]
        chosen = torch.ones_like(chosen) if every else chosen
        drafted = self.q_len - self.prompt_len
        if kind == "none":
            start, mask = self.prompt_len, valid[:, :0]
        elif kind in ("image", "all"):
            start, mask = 0, (image if kind == "image" else valid & chosen)[:, past:]
        else:
            # Rows behind a sample's last image: no image token follows.
            start = 0 if every else min(self._first_rows[kind], self.prompt_len)
            behind = valid & chosen & (from_the_end(image) == 0)
            if kind == "last":
                behind &= from_the_end(valid) == 1
            mask = behind[:, past + start :]
        if drafted and decode:
            mask = torch.cat([mask, chosen.expand(-1, drafted)], dim=1)
        return Rows(start, start + mask.shape[1], mask)


@torch.no_grad()
def squared_move(stock: torch.Tensor, edited: torch.Tensor, where: torch.Tensor | None = None) -> torch.Tensor:
    """Return by how much outputs moved: the squares of their change and of their length before, summed up.

    Args:
        stock: The outputs before, of any shape.
        edited: The outputs behind the edits, of the same shape.
        where: Which of them were up for edits, bool ``[..., 1]``, broadcastable to both; ``None`` for all.

    Returns:
        fp32 ``[2]``.
    """
    squares = []
    for moved in (edited.float() - stock.float(), stock.float()):
        square = torch.linalg.vector_norm(moved, dim=-1, keepdim=True).square()  # without a square of every number
        squares.append((square if where is None else square * where).sum())
    return torch.stack(squares)
