"""Reads what a model answered from a file, whoever wrote it; the only reader of answer files."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlmfix.errors import DataError

from .formats import unify
from .matching import Asked, Row, match
from .model_text import MODEL_KEYS, TRUTH_KEYS, WORDS, Reading, TextChoice, word
from .records import read_rows, text_of
from .samples import Answer, Sample
from .thinking import Thinking, told, without_thinking

_REASON_KEYS = ("finish_reason", "stop_reason", "finishReason", "done_reason")
_ENDED = frozenset({"stop", "eos", "eos_token", "end_turn", "stop_sequence", "completed"})
_CUT_OFF = frozenset({"length", "max_tokens", "model_length", "incomplete", "max_length", "max_new_tokens"})
_UNANSWERED = frozenset({"content_filter", "safety", "error", "refusal"})


@dataclass(frozen=True)
class Given:
    """One answer of a file.

    Attributes:
        row: Where it stands.
        text: The model's text.
        cut_off: Whether the limit of tokens ended it; None if the file does not say.
    """

    row: Row
    text: str
    cut_off: bool | None = None

    def answer(self, score: float | None = None) -> Answer:
        """Return it as an answer of a run.

        Args:
            score: Its yes-minus-no logit, if there is one.
        """
        return Answer(self.text, truncated=bool(self.cut_off), score=score)


@dataclass
class AnswerFile:
    """A file of answers, and what is found out about it.

    Attributes:
        path: The file.
        text_key: The key of the model's text, if the user says.
        thinking: What to do with thinking before an answer: leave it out, or keep it.
        subset: Whether questions may lack an answer.
        by_order: Whether the user says that the answers are in the order of the questions.
        usual: The names of the model's text that messages name first.
        doubts: Why the answers should not be scored, to be said if nothing else is wrong.
        notes: What the reader of the figures must know, one line each.
        facts: The same for JSON.
    """

    path: Path
    text_key: str | None = None
    thinking: Thinking = "strip"
    subset: bool = False
    by_order: bool = False
    usual: tuple[str, ...] = ("caption", "text", "answer", "response")
    doubts: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=lambda: {"repeated_lines": 0})

    @classmethod
    def of(cls, path: Path, options: Namespace) -> AnswerFile:
        """Return a file to be read as the options say; a verb need not have all of them."""
        names = ("text_key", "thinking", "subset", "by_order")
        return cls(path, **{name: getattr(options, name) for name in names if hasattr(options, name)})

    def rows(self, what: str = "answer file") -> list[Row]:
        """The rows, in one form whatever tool wrote them, without those that hold no answer.

        Raises:
            DataError: The file cannot be read, or no row holds an answer.
        """
        everything = [Row(where, fields) for where, fields in read_rows(self.path, what=what)]
        rows = [row for row in unify(everything) if not _UNANSWERED & _reasons(row)]
        if unanswered := len(everything) - len(rows):
            if not rows:
                raise DataError(f"{self.path}: none of the {unanswered} rows holds an answer (errors, or filtered)")
            self.facts["unanswered"] = unanswered
            self.notes.append(f"{unanswered} rows hold no answer (errors, or filtered)")
        return rows

    def matched(
        self,
        rows: Sequence[Row],
        asked: Sequence[Asked],
        *,
        fields: Sequence[str] = ("question_id",),
        source: str = "the question file",
        remedy: str = "--subset scores those that are there",
    ) -> dict[int, Row]:
        """The row that answers each question, by index and in the order of the questions.

        Args:
            rows: Of this file.
            asked: The questions.
            fields: The names of the parts of a question's key.
            source: How a message names the question file.
            remedy: What to do if a question has no answer; empty if the caller sees to that.

        Raises:
            DataError: As of :func:`vlmfix.evals.data.matching.match`; a question has several answers, or none; or a
                label beside an answer is not the question's.
        """
        pairs = match(rows, asked, fields=fields, source=source, by_order=self.by_order, doubts=self.doubts)
        for index, row in pairs:
            _check_label(row, asked[index])
        found, repeated = once(pairs, asked)
        self.repeats(repeated)
        lacking = [question for i, question in enumerate(asked) if i not in found]
        if lacking and remedy and not self.subset:
            raise DataError(
                f"{self.path} answers {len(found)} of {len(asked)} questions; the first without an answer is "
                f"{lacking[0].name}: {remedy}"
            )
        if remedy:
            self.covers({"questions": (len(found), len(asked))})
        return dict(sorted(found.items()))

    def covers(self, parts: Mapping[str, tuple[int, int]]) -> None:
        """Note how much of a benchmark is answered.

        Args:
            parts: Name of a part -> how many of its items are answered, and how many there are.
        """
        self.facts["answered"] = {name: {"answered": there, "of": total} for name, (there, total) in parts.items()}
        if lacking := [f"{there} of {total} {name}" for name, (there, total) in parts.items() if there < total]:
            self.notes.append(f"SUBSET: {', '.join(lacking)}; not comparable with figures of the whole")

    def labels(self, rows: Sequence[Row], remedy: str = "every line needs one") -> list[bool]:
        """The labels of rows that bring their own.

        Args:
            rows: Of this file.
            remedy: What to do about a row without one.

        Raises:
            DataError: A row has none, or one that is neither yes nor no.
        """
        found = [_label_of(row, remedy) for row in rows]
        if any(key == "answer" for key, _ in found):
            self.notes.append("'answer' is taken for the label, because another key holds the model's text")
        return [label for _, label in found]

    def distinct(self, rows: Sequence[Row]) -> list[Row]:
        """The rows without those that repeat an earlier one word for word."""
        kept = {repr(sorted(row.fields.items(), key=lambda item: item[0])): row for row in reversed(rows)}
        self.repeats(len(rows) - len(kept))
        return list(reversed(kept.values()))

    def repeats(self, count: int) -> None:
        """Note how many rows repeat an earlier one."""
        self.facts["repeated_lines"] = count
        if count:
            self.notes.append(f"{count} lines repeat an earlier one word for word: counted once")

    def given(
        self,
        rows: Sequence[Row],
        asked: Sequence[Asked] = (),
        reads: Reading | None = None,
    ) -> list[Given]:
        """The model's text of each row.

        Args:
            rows: Of this file.
            asked: The question of each row, with the spellings of its right answer, as far as they are known.
            reads: What parsers make of a yes/no answer.

        Raises:
            DataError: No field is the model's text for sure; or what is, holds no text, the truth, or the question.
        """
        choice = TextChoice(rows, asked or [Asked(())] * len(rows), reads, self.usual)
        keys, notes = choice.keys(self.text_key)
        self.notes += notes
        if keys:
            self.facts["text_key"] = keys[0] if len(set(keys)) == 1 else sorted(set(keys))
        found, traces = [], []
        for row, key in zip(rows, keys, strict=True):
            text = text_of(row.fields, row.where, [key])
            if not isinstance(row.fields[key], str):
                raise DataError(f"{row.where}: expected text in {key!r}, found {text}; write it as a string")
            thought, cut_off = without_thinking(text), _cut_off(row)
            traces += [thought] if thought.traced else []
            if self.thinking == "strip" and thought.traced:
                text, cut_off = thought.answer, True if thought.unfinished else cut_off
            found.append(Given(row, text, cut_off))
        if traces:
            unfinished = sum(trace.unfinished for trace in traces)
            self.facts["thinking"] = {"answers": len(traces), "unfinished": unfinished, "how": self.thinking}
            self.notes.append(told(len(traces), len(rows), unfinished, self.thinking))
        return found


class FileAnswers(dict[tuple[str, int, str], Answer]):
    """Answers by ``Sample.key``, with the file that they are from.

    Attributes:
        file: The file, with what the reader of the figures must know.

    Raises:
        DataError: It is not certain which questions the answers belong to.
    """

    def __init__(self, file: AnswerFile, samples: Iterable[Sample], answers: Iterable[Answer]):
        for doubt in file.doubts:
            raise DataError(doubt)
        super().__init__({sample.key: answer for sample, answer in zip(samples, answers, strict=True)})
        self.file = file


def yes_no(label: bool) -> frozenset[str]:
    """The spellings of a label."""
    return frozenset(spelling for spelling, value in WORDS.items() if value == label)


def _label_of(row: Row, remedy: str) -> tuple[str, bool]:
    """The label of a row that brings its own: under the names that only the truth has, if they agree.

    ``answer`` is taken for the label only beside a field that only a model's text has.

    Returns:
        The key, and the label.

    Raises:
        DataError: There is none, or it is neither yes nor no.
    """
    keys = [key for key in TRUTH_KEYS if key in row.fields]
    if not keys and "answer" in row.fields and any(key in row.fields for key in MODEL_KEYS):
        keys = ["answer"]
    values = {WORDS.get(word(row.fields[key])) for key in keys}
    label = next(iter(values)) if len(values) == 1 else None
    if label is None:
        found = str(row.fields.get(keys[0] if keys else "label"))[:40]
        raise DataError(f"{row.where}: expected the label yes or no, found {found!r}; {remedy}")
    return keys[0], label


def _check_label(row: Row, asked: Asked) -> None:
    """Refuse a row whose label is not the question's.

    Raises:
        DataError: It is not, or it is no label.
    """
    binary = asked.truth and asked.truth <= WORDS.keys()
    for key in TRUTH_KEYS:
        value = row.fields.get(key)
        if value in (None, "") or not asked.truth or isinstance(value, list | dict):
            continue
        if binary and word(value) not in WORDS:
            if key == "label":
                raise DataError(f"{row.where}: expected the label yes or no, found {str(value)[:40]!r}")
            continue
        if word(value) not in asked.truth:
            right = ("yes" if "yes" in asked.truth else "no") if binary else repr(min(asked.truth)[:60])
            raise DataError(
                f"{row.where}: the {key} is {str(value)[:60]!r}, and that of {asked.name} is {right}: the answers "
                "belong to other questions, to another release of them, or are in another order"
            )


def _reasons(row: Row) -> set[str]:
    return {str(row.fields[key]).lower() for key in _REASON_KEYS if row.fields.get(key) is not None}


def _cut_off(row: Row) -> bool | None:
    """Whether the limit of tokens ended an answer.

    Raises:
        DataError: What the row says is unknown, or contradicts itself.
    """
    flag: Any = row.fields.get("truncated")
    if isinstance(flag, str) and flag.lower() in ("true", "false"):  # Out of a table.
        flag = flag.lower() == "true"
    if flag is not None and not isinstance(flag, bool):
        raise DataError(f"{row.where}: expected true or false in 'truncated', found {str(flag)[:40]!r}")
    said = {flag} - {None}
    for reason in sorted(_reasons(row)):
        if reason not in _ENDED | _CUT_OFF:
            known = ", ".join(sorted(_ENDED | _CUT_OFF))
            raise DataError(
                f"{row.where}: unknown finish reason {reason!r}; expected one of {known}, or 'truncated' true or false"
            )
        said.add(reason in _CUT_OFF)
    if len(said) > 1:
        raise DataError(f"{row.where}: 'truncated' and the finish reason contradict each other")
    return next(iter(said), None)


def once(pairs: Sequence[tuple[int, Row]], asked: Sequence[Asked]) -> tuple[dict[int, Row], int]:
    """One row per question.

    Returns:
        Index of the question to its row; and how many rows repeat an earlier one word for word.

    Raises:
        DataError: Two different rows answer one question.
    """
    found: dict[int, Row] = {}
    repeated: set[int] = set()
    for index, row in pairs:
        first = found.setdefault(index, row)
        if first is not row and dict(first.fields) != dict(row.fields):
            raise DataError(
                f"{row.where}: {asked[index].name} is answered already, on {first.where}: keep only one of these lines"
            )
        if first is not row:
            repeated.add(id(row))
    return found, len(repeated)


def cut_off_flags(given: Mapping[Any, Given]) -> dict[Any, bool] | None:
    """Whether each answer was cut off; None if the file does not say.

    Raises:
        DataError: It says so of some answers only.
    """
    known = {key: each.cut_off for key, each in given.items() if each.cut_off is not None}
    if known and len(known) < len(given):
        lacking = next(each for each in given.values() if each.cut_off is None)
        raise DataError(
            f"{lacking.row.where}: expected 'truncated' or 'finish_reason' as on other lines: give it on all, or none"
        )
    return known or None
