"""Signs in an answer that nobody said: special tokens that were not left out, characters that are not seen, Markdown.

Official rules split at blanks and look for "No", so that "No</s>" and "**No**, none" are yes to them.
"""

from __future__ import annotations

import re
import unicodedata

_NAMES = "eos|bos|pad|unk|start_of_turn|end_of_turn|end_of_utterance"

_TOKEN = re.compile(rf"</?s>|<\|[\w ]{{1,30}}\|>|<(?:{_NAMES})>", re.IGNORECASE)

_MARKS = re.compile(r"[*_`\"“”„«»]")


def special_token(text: str) -> str:
    """The first special token of a tokenizer in a text; empty without any."""
    found = _TOKEN.search(text)
    return found[0] if found else ""


def unseen(text: str) -> str:
    """The first character of a text that is not seen, or that looks like a blank and is none; empty without any."""
    return next((each for each in text if unicodedata.category(each) == "Cf" or (each.isspace() and each > "\x7f")), "")


def plain_form(text: str) -> str:
    """A text in one form of Unicode: accents and full-width letters as people type them."""
    return unicodedata.normalize("NFKC", text)


def without_signs(text: str) -> str:
    """A text without special tokens, characters that are not seen, and Markdown's or quotation marks."""
    kept = "".join(each for each in _TOKEN.sub(" ", text) if unicodedata.category(each) != "Cf")
    return " ".join(_MARKS.sub("", plain_form(kept)).split())
