"""Methods that show what happens and edit nothing: their model is bitwise the one they are put on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from vlmfix.anatomy import AttentionKind
from vlmfix.calibration.probes import RowWatch
from vlmfix.methods.base import Method, PromptRows
from vlmfix.run import Layer


@dataclass(frozen=True)
class AttentionWatch(RowWatch):
    """Show attention weights of some rows of a prompt, and of every generated token, beside the base kernel.

    Attributes:
        show: Called with what ``Method.observe`` gets.
        rows: Which rows of the prompt.
    """

    name: ClassVar[str] = "attention_watch"

    rows: PromptRows = "text"

    @property
    def observed_rows(self) -> PromptRows:
        """As chosen."""
        return self.rows

    @property
    def edits_decode(self) -> bool:
        """Nothing is edited, so the base kernel computes generated rows too."""
        return False

    @property
    def needs_whole_prompt(self) -> bool:
        """Rows are told apart by their place in the prompt."""
        return True


@dataclass(frozen=True)
class HeadWatch(Method):
    """Show head outputs, ``[batch, q_len, num_heads, head_dim]``, before any method scales them in their layer."""

    name: ClassVar[str] = "head_watch"
    edits_heads: ClassVar[bool] = True
    needs_text_keys: ClassVar[bool] = False

    show: Callable[[torch.Tensor, Layer], None] = field(compare=False, repr=False)

    @property
    def prompt_rows(self) -> PromptRows:
        """None."""
        return "none"

    @property
    def needs_whole_prompt(self) -> bool:
        """Steps are counted from the end of the prompt."""
        return True

    def edit_heads(self, head_outputs: torch.Tensor, layer: Layer) -> torch.Tensor:
        """Show, and edit nothing."""
        self.show(head_outputs, layer)
        return head_outputs


@dataclass(frozen=True)
class InputWatch(Method):
    """Show the residual stream ``[batch, q_len, hidden_size]`` entering each layer in a prompt."""

    name: ClassVar[str] = "input_watch"
    reads_layer_input: ClassVar[bool] = True
    needs_text_keys: ClassVar[bool] = False

    show: Callable[[torch.Tensor, Layer], None] = field(compare=False, repr=False)

    @property
    def attention_kinds(self) -> tuple[AttentionKind, ...]:
        """Where image tokens are tokens of the decoder's own stream."""
        return ("joint",)

    @property
    def needs_whole_prompt(self) -> bool:
        """Tokens are told apart by their place in the prompt."""
        return True

    def learn(self, hidden_states: torch.Tensor, layer: Layer) -> None:
        """Show, and learn nothing."""
        self.show(hidden_states, layer)
