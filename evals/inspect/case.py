"""What is inspected: a picture and a question, with the model that is asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from vlmfix.observe.ask import look_at
from vlmfix.observe.prompts import PromptBuilder, encode
from vlmfix.observe.words import yes_no_tokens

from ..benchmarks.object_choice import PROMPT as POPE_PROMPT
from ..testbed.vocabulary import article

if TYPE_CHECKING:
    from PIL.Image import Image

ASKED_AT_ONCE = 16
"""Questions per batch."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A picture and a question, with the model that is asked.

    Attributes:
        model: The model.
        processor: Its processor.
        prompts: Wraps a question into a prompt.
        picture: The picture.
        question: What is asked.
        objects: What is in the picture, where known, as CHAIR's objects.
        scene_words: Further words that count as context.
        max_new_tokens: Limit of the answer.
    """

    model: Any
    processor: Any
    prompts: PromptBuilder
    picture: Image
    question: str
    objects: frozenset[str] | None
    scene_words: frozenset[str]
    max_new_tokens: int

    def inputs(self, *questions: str) -> Any:
        """Return the model's inputs for the question, or for others about the same picture."""
        asked = [self.prompts(each) for each in questions or (self.question,)]
        return encode(self.processor, asked, [self.picture] * len(asked), self.model)

    @torch.no_grad()
    def ask_for(self, names: Sequence[str]) -> list[float | None]:
        """Ask whether objects are in the picture.

        Returns:
            The probability of yes against no; None where the tokenizer has no single tokens for them.
        """
        answers = yes_no_tokens(self.processor.tokenizer)
        if answers is None:
            return [None] * len(names)
        distinct = sorted(set(names))
        found: dict[str, float] = {}
        for start in range(0, len(distinct), ASKED_AT_ONCE):
            part = distinct[start : start + ASKED_AT_ONCE]
            questions = [POPE_PROMPT.format(question=f"Is there {article(name)} {name} in the image?") for name in part]
            inputs = self.inputs(*questions)
            logits = look_at(self.model, "inspect", inputs).answer(inputs, logits=True).logits[0]
            found |= dict(zip(part, answers.log_odds(logits).sigmoid().tolist(), strict=True))
        return [found[name] for name in names]
