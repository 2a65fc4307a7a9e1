"""What contrasts share whose other prompt is written in words: the model's tokenizer, and text put into a prompt."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from vlmfix.decoding.base import Contrast, OtherTokens
from vlmfix.errors import MethodError
from vlmfix.methods.parameters import parameter
from vlmfix.model.anatomy import Anatomy

W = TypeVar("W", bound="ReadsWords")


@dataclass(frozen=True, kw_only=True)
class ReadsWords(Contrast):
    """Base class of contrasts that turn text into tokens, or tokens into text."""

    tokenizer: str | None = parameter(
        None,
        expected="a folder or a hub id",
        help="Folder or hub id of the model's tokenizer. Default: the model's own. Not needed where all that is put "
        "into a prompt is given as token ids.",
    )

    @property
    def needs_words(self) -> bool:
        """Whether the tokenizer is needed at all."""
        raise NotImplementedError

    @property
    def words(self) -> Any:
        """The tokenizer of a bound method; ``None`` where it is not needed."""
        return getattr(self, "_words", None)

    def bind(self: W, anatomy: Anatomy) -> W:
        """Check the model, and load its tokenizer.

        Raises:
            MethodError: No second branch can be run, or the tokenizer cannot be found.
        """
        super().bind(anatomy)
        bound = dataclasses.replace(self)
        if self.needs_words and not self.is_identity:
            object.__setattr__(bound, "_words", self._load(anatomy))
        return bound

    def _load(self, anatomy: Anatomy) -> Any:
        from transformers import AutoTokenizer

        where = self.tokenizer or anatomy.model.name_or_path
        try:
            if not where:
                raise OSError("the model does not say where it was loaded from")
            return AutoTokenizer.from_pretrained(where)
        except (OSError, ValueError, KeyError, ImportError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise MethodError(
                f"{self.name} reads or writes words of the prompt and finds no tokenizer for them ({reason}). Name it: "
                f"vlmfix.patch(model, '{self.name}', tokenizer='FOLDER_OR_HUB_ID')."
            ) from error

    def inserted(self, ids: Sequence[int], place: int, text: str | Sequence[int]) -> OtherTokens:
        """Put a text, or its token ids, before the token at a place."""
        if isinstance(text, str):
            text = self.words.encode(f" {text}", add_special_tokens=False)
        sources = (*range(place), *[-1] * len(text), *range(place, len(ids)))
        return OtherTokens((*ids[:place], *text, *ids[place:]), sources)


def place_behind_images(is_image: Sequence[bool]) -> int:
    """Return where the text behind the last image begins; 0 without any."""
    return max((place for place, image in enumerate(is_image) if image), default=-1) + 1
