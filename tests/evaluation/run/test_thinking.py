"""Thinking before the answers of a run: left out of what is scored and exported, counted, or kept if asked to."""

from __future__ import annotations

from vlmfix.evals.data.samples import Answer
from vlmfix.evals.data.thinking import without_traces


def answer(text: str) -> Answer:
    return Answer(text, (1, 2), False, (), None, 0.0)


def test_answers_of_a_run_lose_their_traces_and_the_report_says_so() -> None:
    key, other = ("pope", 1, "Is there a dog?"), ("pope", 2, "Is there a dog?")
    given = {
        "none": {key: answer("Yes"), other: answer("No")},
        "vhr": {key: answer("<think>no, or</think>Yes"), other: answer("<think>no")},
    }
    found, notes = without_traces(given)
    assert [each.text for each in found["vhr"].values()] == ["Yes", ""] and found["none"] == given["none"]
    assert notes == ["vhr: 2 of 2 answers begin with thinking, which is left out (--thinking); in 1 it never ends"]
    kept, notes = without_traces(given, "keep")
    assert kept == given and "kept as part of the answer" in notes[0]
