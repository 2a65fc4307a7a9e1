"""Tokens and words: what each token of a prompt is, where a caption names an object, which tokens mean yes and no."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from vlmfix.errors import UnsupportedFeatureError
from vlmfix.methods.sequence import from_the_end
from vlmfix.model.anatomy import Anatomy


class PromptTokens(NamedTuple):
    """The tokens of a batch of prompts, each bool ``[batch, length]``.

    Attributes:
        valid: Those that are no padding.
        image: The image's.
        last: Each sample's last.
        behind: Those behind the last image token; none in a sample without an image.
    """

    valid: torch.Tensor
    image: torch.Tensor
    last: torch.Tensor
    behind: torch.Tensor


def prompt_tokens(anatomy: Anatomy, inputs: Mapping[str, Any]) -> PromptTokens:
    """Tell the tokens of a batch apart, by the processor's output."""
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    valid = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    image = anatomy.is_image(ids) & valid
    last = valid & (from_the_end(valid) == 1)
    behind = valid & (from_the_end(image) == 0) & image.any(1, keepdim=True)
    return PromptTokens(valid, image, last, behind)


class Mention(NamedTuple):
    """An object named in a caption.

    Attributes:
        token: Index of the generated token its word begins with.
        name: The object.
    """

    token: int
    name: str


def locate_mentions(tokenizer: Any, ids: Sequence[int], found: Sequence[tuple[str, str]]) -> tuple[list[Mention], int]:
    """Find the tokens that object words begin with.

    A word counts where it stands alone, not inside another word or a hyphenated one. Each counts at most once, from
    left to right. A word whose token holds other visible characters before it is left out: that token predicts more.

    Args:
        tokenizer: The tokenizer.
        ids: Generated token ids.
        found: (word, object) pairs in the order of the text.

    Returns:
        The mentions, and how many of ``found`` have none.
    """
    text = decode(tokenizer, ids)
    ends = token_ends(tokenizer, ids, text)
    mentions: list[Mention] = []
    cursor = 0
    for word, name in found:
        span = find_word(text, word, cursor)
        if span is None:
            continue
        cursor = span[1]
        token = next(index for index, end in enumerate(ends) if end > span[0])
        begin = ends[token - 1] if token else 0
        if not text[begin : span[0]].strip():
            mentions.append(Mention(token, name))
    return mentions, len(found) - len(mentions)


def word_tokens(tokenizer: Any, ids: Sequence[int], word: str) -> list[int]:
    """Return the indices of all tokens that spell a word where it first stands alone; empty if it does not."""
    text = decode(tokenizer, ids)
    span = find_word(text, word)
    if span is None:
        return []
    ends = token_ends(tokenizer, ids, text)
    begins = [0, *ends[:-1]]
    return [i for i, (begin, end) in enumerate(zip(begins, ends, strict=True)) if begin < span[1] and end > span[0]]


def find_word(text: str, word: str, start: int = 0) -> tuple[int, int] | None:
    """Return the span of a word (or of several) in a text, ignoring case; ``None`` if it never stands alone."""
    pattern = r"\s+".join(map(re.escape, word.split()))
    match = re.compile(rf"(?<!\w)(?<!\w-){pattern}(?!\w)(?!-\w)", re.IGNORECASE).search(text, start)
    return match.span() if match and word.strip() else None


def decode(tokenizer: Any, ids: Sequence[int]) -> str:
    """Return the text of token ids, without special tokens."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=True))


def token_ends(tokenizer: Any, ids: Sequence[int], text: str) -> list[int]:
    """Return where each token ends in the decoded text, by decoding one more token at a time.

    A tokenizer's own offsets are those of a text that it encodes, and encoding a caption again may give other tokens.
    """
    ends: list[int] = []
    for count in range(1, len(ids) + 1):
        part = decode(tokenizer, ids[:count])
        if text.startswith(part):
            ends.append(max(len(part), ends[-1] if ends else 0))
            continue
        # A decoder may write the end of a text (a space, half a character) differently from its middle.
        same = next(
            (i for i, (a, b) in enumerate(zip(part, text, strict=False)) if a.lower() != b.lower()),
            min(len(part), len(text)),
        )
        ends.append(max(same, ends[-1] if ends else 0))
    return ends


class YesNo(NamedTuple):
    """The single tokens that spell yes and no in a vocabulary: any case, with or without a leading space."""

    yes: tuple[int, ...]
    no: tuple[int, ...]

    def log_odds(self, logits: torch.Tensor) -> torch.Tensor:
        """Return ``ln P(yes) - ln P(no)`` of the next token from logits ``[batch, vocab]``: fp32 ``[batch]``."""
        logits = logits.float()
        return logits[:, list(self.yes)].logsumexp(-1) - logits[:, list(self.no)].logsumexp(-1)


def yes_no_tokens(tokenizer: Any) -> YesNo | None:
    """Return the tokens of yes and no; ``None`` if the vocabulary spells one of them only with several tokens."""
    found = YesNo(single_tokens(tokenizer, "yes"), single_tokens(tokenizer, "no"))
    return found if all(found) else None


def need_yes_no_tokens(tokenizer: Any) -> YesNo:
    """Return the tokens of yes and no.

    Raises:
        UnsupportedFeatureError: The vocabulary spells one of them only with several tokens.
    """
    found = yes_no_tokens(tokenizer)
    if found is None:
        raise UnsupportedFeatureError(
            "This tokenizer spells 'yes' or 'no' with several tokens, so answers cannot be read off one step. Heads "
            "can be found from captions instead: vlmfix.calibrate(model, 'allpath', data, answers='caption', ...)."
        )
    return found


def single_tokens(tokenizer: Any, word: str) -> tuple[int, ...]:
    """Return the single tokens that spell a word: any case, with or without a leading space."""
    ids: set[int] = set()
    for variant in (word, word.capitalize(), word.upper()):
        for text in (variant, " " + variant):
            tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
            # A tokenizer may split off the space as a token of its own; the word is then the last of two.
            if len(tokens) == 2 and not tokenizer.decode(tokens[:1]).strip():
                tokens = tokens[1:]
            if len(tokens) == 1 and tokens[0] != tokenizer.unk_token_id:
                ids.add(int(tokens[0]))
    return tuple(sorted(ids))
