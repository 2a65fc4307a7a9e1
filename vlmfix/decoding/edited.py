"""Contrast with an edited branch: the answer against that of the same model under an attention method."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from vlmfix.decoding.base import AnswerToken, DecodingMethod, plausibility, strength
from vlmfix.errors import MethodError
from vlmfix.methods.base import Method
from vlmfix.methods.parameters import parameter
from vlmfix.methods.registry import make_method, method_from_dict
from vlmfix.model.anatomy import Anatomy
from vlmfix.recipes import check_placement


@dataclass(frozen=True)
class AgainstEdit(DecodingMethod):
    """Contrast the answer with that of the same model under one attention method; base class."""

    @property
    def alpha(self) -> float:
        """The strength, which every method of this kind declares as a parameter."""
        return 0.0

    def edit_of_branch(self) -> Method:
        """Return the attention method of the other branch."""
        raise NotImplementedError

    @property
    def uses_branch(self) -> bool:
        """Whether the branches differ, and their difference counts."""
        return self.alpha != 0 and not self.edit_of_branch().is_identity

    @property
    def needs_cache(self) -> bool:  # type: ignore[override]
        """As the edit does."""
        return self.edit_of_branch().needs_cache

    @property
    def minds_text_before_image(self) -> bool:
        """As the edit does."""
        return self.edit_of_branch().minds_text_before_image

    def branch_edit(self, anatomy: Anatomy) -> Method | None:
        """Return the edit, bound to the model.

        Raises:
            MethodError: It means nothing there.
        """
        edit = self.edit_of_branch()
        check_placement(edit, anatomy, f"{self.name} ({edit.name})")
        return edit.bind(anatomy)

    def weight(self, logits: torch.Tensor, other: torch.Tensor, token: AnswerToken) -> float | torch.Tensor:
        """``alpha``."""
        return self.alpha


@dataclass(frozen=True)
class Edited(AgainstEdit):
    """Contrast the answer with that of the same model under an attention method: ``(1 + alpha) l - alpha l'``.

    ``l'`` are the logits behind the same prompt and the same answer, where ``edit`` acts on attention. The model's own
    branch stays as it is, or as methods listed beside this one make it. Several published contrasts are of this kind
    and differ in the edit: turning heads that look at the image off, hiding image tokens, raising the image's scores
    (``mode="towards"``). As one combinator, and for any attention method of vlmfix, it is ours.

    Only tokens with ``l >= max l + ln(beta)`` may be chosen. Each branch has its own forward at every step.
    """

    name = "edited"
    paper = "after arXiv 2408.02032 (SID), 2402.18476 (IBD) and others"
    summary = "contrasts the answer with that of the same model under an attention method"

    edit: Method | str | Mapping[str, Any] = parameter(
        "pai",
        expected="a method that edits attention: its name, its dict or the method itself",
        help="The attention method of the other branch: its name, its dict or the method itself.",
    )
    mode: Literal["away", "towards"] = parameter(
        "away",
        help='``"away"`` from the edited branch, or ``"towards"`` it: ``l + alpha (l\' - l)``, its logits at alpha 1.',
    )
    alpha: float = strength(1.0)
    beta: float = plausibility(0.1)

    def validate(self) -> None:
        """Read the edit, and refuse what does more than edit attention."""
        super().validate()
        edit = self.edit
        if isinstance(edit, str):
            edit = make_method(edit, {})
        elif isinstance(edit, Mapping):
            edit = method_from_dict(dict(edit))
        object.__setattr__(self, "edit", edit)
        beyond = (edit.reads_layer_input, edit.reads_prompt, edit.needs_text_only_heads, edit.vision_layers)
        if edit.replaces_logits or edit.edits_blocks or edit.early_layers or any(beyond):
            raise MethodError(
                f"edited runs a method on attention in the other branch, and {edit.name} does or reads more than that. "
                "Choose one that edits scores, weights or heads of attention, such as pai, vaf, spin or allpath."
            )

    def edit_of_branch(self) -> Method:
        """Return ``edit``."""
        assert isinstance(self.edit, Method)
        return self.edit

    def weight(self, logits: torch.Tensor, other: torch.Tensor, token: AnswerToken) -> float:
        """``alpha``, away from the edited branch or towards it."""
        return self.alpha if self.mode == "away" else -self.alpha
