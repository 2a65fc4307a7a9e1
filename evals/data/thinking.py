"""Traces that reasoning models write before they answer: ``<think>...</think>Yes``.

What a model thinks is not what it answers: "is there a dog? no, wait ..." would be read as no, and objects that it
weighs would count as named.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Literal, NamedTuple

from .samples import Answers

Thinking = Literal["strip", "keep"]
"""What is done with the thinking before an answer."""

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


def without_traces(answers: Mapping[str, Answers], how: str = "strip") -> tuple[dict[str, Answers], list[str]]:
    """Take the traces off the answers of a run.

    Args:
        answers: Method to its answers.
        how: ``"strip"``, or ``"keep"`` to leave them and only count.

    Returns:
        The answers, and what the reader of the figures must know: how many answers of each method begin with thinking.
    """
    found: dict[str, Answers] = {}
    notes = []
    for label, given in answers.items():
        thoughts = {key: without_thinking(answer.text) for key, answer in given.items()}
        traced = [thought for thought in thoughts.values() if thought.traced]
        if traced:
            notes.append(f"{label}: {told(len(traced), len(given), sum(t.unfinished for t in traced), how)}")
        if traced and how == "strip":
            given = {key: replace(answer, text=thoughts[key].answer) for key, answer in given.items()}
        found[label] = given
    return found, notes


def told(traced: int, total: int, unfinished: int, how: str) -> str:
    """Say how many answers begin with thinking, and what is done with it."""
    done = "kept as part of the answer" if how == "keep" else "left out"
    never = f"; in {unfinished} it never ends" if unfinished else ""
    return f"{traced} of {total} answers begin with thinking, which is {done} (--thinking){never}"
