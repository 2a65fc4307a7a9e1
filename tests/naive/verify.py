"""Self-verification, naively: every question is a whole prompt of its own, every answer is read again as a whole."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from vlmfix.observe.words import decode, token_ends
from vlmfix.verification.leave_out import leave_out
from vlmfix.verification.phrases import read_sentences


def log_odds_of_yes(model: Any, processor: Any, image: Any, question: str) -> float:
    """``ln P(yes) - ln P(no)`` of the first token, over every spelling in the vocabulary."""
    message = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    prompt = processor.apply_chat_template(message, add_generation_prompt=True)
    with torch.no_grad():
        logits = model(**processor(images=image, text=prompt, return_tensors="pt")).logits[0, -1].double()
    by_word = {}
    for word in ("yes", "no"):
        ids = {processor.tokenizer(each, add_special_tokens=False)["input_ids"][-1] for each in (word, word.upper())}
        by_word[word] = math.log(sum(math.exp(float(logits[token])) for token in ids))
    return by_word["yes"] - by_word["no"]


def said(model: Any, prompt: dict[str, torch.Tensor], answer: Sequence[int], place: int) -> float:
    """The probability of one token of an answer, in one forward over prompt and answer."""
    ids = torch.cat([prompt["input_ids"], torch.tensor([list(answer)])], dim=1)
    with torch.no_grad():
        logits = model(input_ids=ids, pixel_values=prompt["pixel_values"]).logits[0]
    return float(logits[len(ids[0]) - len(answer) + place - 1].double().softmax(-1)[answer[place]])


def verified(model: Any, processor: Any, image: Any, prompt: Any, answer: Sequence[int], rule: Any) -> str:
    """The text of an answer without the words whose log odds are below the limit."""
    text = decode(processor.tokenizer, answer)
    ends = token_ends(processor.tokenizer, answer, text)
    odds: dict[str, float] = {}
    for sentence in read_sentences(text):
        for phrase in sentence.phrases:
            if not phrase.is_object or phrase.name in odds:
                continue
            a = "an" if phrase.name[0] in "aeiou" else "a"
            a = "a pair of" if phrase.name in ("skis", "scissors") else a
            asked = log_odds_of_yes(model, processor, image, f"Is there {a} {phrase.name} in the image?")
            place = next(at for at, end in enumerate(ends) if end > sentence.span(phrase)[0])
            p = said(model, prompt, answer, place)
            odds[phrase.name] = (
                rule.bias + rule.asked_weight * asked + rule.said_weight * (math.log(p) - math.log(1 - p))
            )
    return leave_out(text, lambda phrase: odds[phrase.name] < math.log(rule.lost_per_false))
