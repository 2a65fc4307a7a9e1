"""LQCD: Leading Query Contrastive Decoding (Zhao et al., arXiv 2408.11261)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vlmfix.decoding.base import OtherTokens, strength
from vlmfix.decoding.leading_questions import check_patterns, leading_characters, question_end
from vlmfix.decoding.words import ReadsWords, place_behind_images
from vlmfix.methods.parameters import parameter


@dataclass(frozen=True)
class LQCD(ReadsWords):
    """Contrast the answer to a neutral question with that to a leading one: ``(1 + alpha) l_n - alpha l_l``.

    The image is the same in both branches. The text behind the last image is taken for the question. Where it leads
    ("Is there a dog? I don't think so."), its neutral form takes the clauses out that assert something, and the answer
    is to that: ``l_n`` is the other branch, ``l_l`` the model's own. Where it is neutral, ``l_l`` is the same question
    followed by ``hint``. A prompt without a question or a sentence behind its image is left alone. Only tokens with
    ``l_n >= max l_n + ln(beta)`` may be chosen.

    No code was released, and the formula is known from quotations. The rules that find leading clauses (English, by
    pattern), the hint and both defaults are ours; the second version's adaptive cut and its factor for the sentiment of
    the question are not known and not here.
    """

    name = "lqcd"
    paper = "arXiv 2408.11261"
    summary = "contrasts the answer to a neutral question with that to a leading one"
    needs_cache = True

    alpha: float = strength(1.0, "0 answers the neutral question.")
    neutralise: bool = parameter(True, help="Whether leading questions are made neutral; if not, they are left alone.")
    hint: str | Sequence[int] = parameter(
        "I don't think so.",
        expected="a text, or a list of token ids",
        help="What makes a neutral question leading: text, or token ids.",
    )
    patterns: Sequence[str] = parameter(
        (),
        expected="a list of regular expressions",
        help="Regular expressions of further clauses to take out of leading questions.",
    )
    behind: int | None = parameter(
        None,
        low=0,
        help="How many tokens of the chat template stand behind the question. Default: as many as there are behind the "
        "last question mark, or behind the last full stop where there is none.",
    )

    def validate(self) -> None:
        """Check the hint and the patterns."""
        super().validate()
        self.require(bool(self.hint), "hint", "a text, or a list of token ids")
        try:
            check_patterns(self.patterns)
        except (re.error, TypeError) as error:
            self.require(False, "patterns", f"a list of regular expressions ({error})")

    @property
    def is_identity(self) -> bool:
        """Whether ``alpha`` and ``beta`` are 0 and leading questions stay as they are."""
        return self.alpha == 0 and self.beta == 0 and not self.neutralise

    @property
    def uses_branch(self) -> bool:
        """Always: the other branch may be the one to answer."""
        return True

    @property
    def needs_words(self) -> bool:
        """Not for a hint of token ids at a given place."""
        return self.neutralise or self.behind is None or isinstance(self.hint, str)

    def other_tokens(self, ids: Sequence[int], is_image: Sequence[bool]) -> OtherTokens | None:
        """Make a leading question neutral, or a neutral one leading."""
        start, words = place_behind_images(is_image), self.words
        spans = [] if words is None else _character_spans(words, ids[start:])
        text = "" if words is None else _decode(words, ids[start:])
        leading = leading_characters(text, self.patterns)
        if leading:
            if not self.neutralise:
                return None
            dropped = {start + place for place, span in enumerate(spans) if _lies_in(text, span, leading)}
            kept = tuple(place for place in range(len(ids)) if place not in dropped)
            return OtherTokens(tuple(ids[place] for place in kept), kept, is_swapped=True)
        if self.behind is not None:
            end = max(len(ids) - self.behind, start)
        else:
            stop = question_end(text)
            if stop is None:
                return None
            end = start + next(place for place, span in enumerate(spans) if span[1] >= stop) + 1
        return self.inserted(ids, end, self.hint)


def _decode(words: Any, ids: Sequence[int]) -> str:
    text: str = words.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text


def _character_spans(words: Any, ids: Sequence[int]) -> list[tuple[int, int]]:
    """Which characters of the text each token adds."""
    ends = [0, *(len(_decode(words, ids[: count + 1])) for count in range(len(ids)))]
    return [(ends[place], max(ends[place + 1], ends[place])) for place in range(len(ids))]


def _lies_in(text: str, span: tuple[int, int], characters: frozenset[int]) -> bool:
    """Whether all that is no space in a span is among some characters."""
    inked = [place for place in range(*span) if not text[place].isspace()]
    return bool(inked) and characters.issuperset(inked)
