"""Which clauses make a question leading: English, by pattern. The rules are ours; no code of LQCD was released."""

from __future__ import annotations

import re
from collections.abc import Sequence

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


def check_patterns(patterns: Sequence[str]) -> None:
    """Raise ``re.error`` or ``TypeError`` for what is no regular expression."""
    for pattern in patterns:
        re.compile(pattern)


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
