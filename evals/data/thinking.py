"""Traces that reasoning models write before they answer: ``<think>...</think>Yes``.

What a model thinks is not what it answers: "is there a dog? no, wait ..." would be read as no, and objects that it
weighs would count as named.
"""

from __future__ import annotations

import re
from typing import NamedTuple

_TAGS = ("think", "thinking", "thought", "reasoning", "analysis", "seed:think", "THINK", "Thought", "Thinking")

#: How a trace begins and ends, for each way of marking one.
_MARKS = (
    *((f"<{tag}>", f"</{tag}>") for tag in _TAGS),
    ("[THINK]", "[/THINK]"),
    ("◁think▷", "◁/think▷"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("<|channel|>analysis", "<|channel|>final<|message|>"),
)

_WRAPPED = re.compile(
    r"\s*(?:<answer>(.*?)</answer>|<\|begin_of_box\|>(.*?)<\|end_of_box\|>|<\|begin_of_solution\|>(.*?)<\|end_of_solution\|>)\s*",
    re.DOTALL,
)


class Thought(NamedTuple):
    """An answer without its trace.

    Attributes:
        answer: What is left; empty if the trace never ends.
        traced: Whether there was a trace.
        unfinished: Whether it never ends, because the limit of tokens cut the answer off.
    """

    answer: str
    traced: bool
    unfinished: bool


def without_thinking(text: str) -> Thought:
    """Take the trace off an answer.

    A trace is what stands before its last end mark, whether or not the begin mark is there (chat templates put it into
    the prompt), and everything behind a begin mark at the start of the text that has no end. An answer that is wrapped
    as a whole, as in ``<answer>Yes</answer>``, is unwrapped behind a trace. A text without a trace stays as it is.
    """
    rest, traced = text, False
    for begin, end in _MARKS:
        if end in rest:
            rest, traced = rest.rpartition(end)[2], True
        elif rest.lstrip().startswith(begin):
            return Thought("", True, True)
    if not traced:
        return Thought(text, False, False)
    if wrapped := _WRAPPED.fullmatch(rest):
        rest = next(group for group in wrapped.groups() if group is not None)
    return Thought(rest.strip(), True, False)
