"""Signs in an answer that nobody said: special tokens that were not left out, characters that are not seen, Markdown.

Official rules split at blanks and look for "No", so that "No</s>" and "**No**, none" are yes to them.
"""

from __future__ import annotations

import re
import unicodedata

_NAMES = "eos|bos|pad|unk|start_of_turn|end_of_turn|end_of_utterance"

_TOKEN = re.compile(rf"</?s>|<\|[\w ]{{1,30}}\|>|<(?:{_NAMES})>", re.IGNORECASE)

_ESCAPE = re.compile(r"\\[nrt](?![a-z])|\\u[\da-fA-F]{4}")  # no LaTeX, such as \nu

_MARKS = re.compile(r"[*_`\"“”„«»]")

_PROMPT = re.compile(
    r"(?:A chat between .{,500}?|system\n.{,4000}?)?(?:(?:### *)?(?:USER|User|HUMAN|Human):|\[INST\]|\buser\n).{,8000}?"
    r"(?:\b(?:ASSISTANT|Assistant|GPT):|\[/INST\]|\n(?:assistant|model)\n)",
    re.DOTALL,
)
"""A user's turn and the beginning of the assistant's, as chat templates of many models write them."""


def holds_prompt(text: str) -> bool:
    """Whether a text begins with a prompt in a chat template: whole sequences were decoded, not what was generated."""
    return _PROMPT.match(_TOKEN.sub("", text).lstrip()) is not None


def special_token(text: str) -> str:
    """The first special token of a tokenizer in a text; empty without any."""
    found = _TOKEN.search(text)
    return found[0] if found else ""


def unseen(text: str) -> str:
    """The first character of a text that is not seen, or that looks like a blank and is none; empty without any."""
    return next((each for each in text if unicodedata.category(each) == "Cf" or (each.isspace() and each > "\x7f")), "")


def written_out(text: str) -> str:
    """The first escape in a text, such as a line break as two characters; empty without any."""
    found = _ESCAPE.search(text)
    return found[0] if found else ""


def plain_form(text: str) -> str:
    """A text in one form of Unicode: accents and full-width letters as people type them."""
    return unicodedata.normalize("NFKC", text)


def without_signs(text: str) -> str:
    """A text without special tokens, characters that are not seen, and Markdown's or quotation marks."""
    kept = "".join(each for each in _ESCAPE.sub(" ", _TOKEN.sub(" ", text)) if unicodedata.category(each) != "Cf")
    return " ".join(_MARKS.sub("", plain_form(kept)).split())
