"""LQCD: Leading Query Contrastive Decoding (Zhao et al., arXiv 2408.11261)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vlmfix.decoding.base import OtherTokens, strength
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
            for pattern in self.patterns:
                re.compile(pattern)
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


# Which clauses make a question leading: English, by pattern. The rules are ours.

_SURE = r"(?:(?:pretty|quite|very|absolutely|fairly|almost) )?(?:sure|certain|positive|convinced)"
_I = rf"I(?:'m| am| was)(?: not)? {_SURE}|I(?: really| strongly| do| don't| do not| firmly)*"
_ASSERTS = (
    rf"(?:(?:but|and|so|because|since) )?(?:{_I} (?:think|believe|guess|suppose|assume|bet|feel|doubt|know|see|say)\b"
    rf"|I(?:'m| am)(?: not)? {_SURE}\b|it (?:really |clearly )?(?:seems|looks|appears)\b"
    r"|there (?:really |clearly )?(?:seems|appears)\b|in my opinion\b|to me\b|everybody (?:says|knows)\b"
    r"|(?:obviously|clearly|surely|apparently|undoubtedly)\b)"
)
_BEGINS = r"(?:^|(?<=[.!?:\n]))\s*"
_ENDS = r"(?:[.!]+|(?=\s*(?:\n|$|ASSISTANT\b|USER\b|<|\[/)))"
_ASKS = r"(?:is|are|was|were|does|do|did|can|could|has|have|what|how|which|who|where|when|why)\b"
_TAGS = (
    r"(?:is|are|was|were|does|do|did|can|could|has|have|will|would)(?:n't| not)? (?:it|he|she|they|there|this|that|you)"
    r"|(?:right|correct|no|yes|okay|huh)"
)
_PATTERNS = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        rf"{_BEGINS}{_ASSERTS}[^.!?,\n]*,\s*(?={_ASKS})",  # "It seems empty, is there a dog?"
        rf"{_BEGINS}{_ASSERTS}[^.!?\n]*?{_ENDS}",  # "I don't think so."
        rf",\s*(?:{_TAGS})\s*(?=\?)",  # ", isn't there?"
    )
)


def leading_characters(text: str, patterns: Sequence[str] = ()) -> frozenset[int]:
    """Return the places in a text of the clauses that make it leading; none if nothing else would be left.

    Args:
        text: A question, possibly inside a chat template.
        patterns: Regular expressions of further clauses.
    """
    rules = (*_PATTERNS, *(re.compile(pattern, re.IGNORECASE) for pattern in patterns))
    left = list(range(len(text)))
    found = True
    while found:  # so that what is left is neutral
        found = False
        for rule in rules:
            match = rule.search("".join(text[place] for place in left))
            if match is not None and match.end() > match.start():
                left = left[: match.start()] + left[match.end() :]
                found = True
    asked = "".join(text[place] for place in left)
    if question_end(asked) is None or len(left) == len(text):
        return frozenset()
    return frozenset(range(len(text))) - frozenset(left)


def neutral(text: str, patterns: Sequence[str] = ()) -> str:
    """Return a question without the clauses that make it leading; a neutral one as it is."""
    dropped = leading_characters(text, patterns)
    return "".join(letter for place, letter in enumerate(text) if place not in dropped)


def question_end(text: str) -> int | None:
    """Return where the last question of a text ends, or its last sentence if it asks none."""
    for marks in ("?", ".!"):
        places = [place for place, letter in enumerate(text) if letter in marks]
        if places:
            return places[-1] + 1
    return None
