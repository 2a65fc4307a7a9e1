"""Which field of a row is what the model said.

No field is taken by its name alone. Names that some tools give to the model's text others give to the truth or to the
question, so that what is chosen is held against what stands beside it: it must be neither the right answer in every row
(while another text differs), nor the question; and a field that is not read must be the truth, or what a parser made of
the text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vlmfix.errors import DataError

from .matching import ASK_KEYS, SPLIT_KEYS, Asked, Row, is_asked
from .records import IMAGE_KEYS, text_of
from .signs import holds_prompt, special_token, unseen, without_signs, written_out
from .thinking import without_thinking

MODEL_KEYS = (
    *("caption", "response", "prediction", "model_answer", "model_prediction", "model_output", "model_response"),
    *("pred_answer", "generated_text", "generated", "generation", "completion", "output", "outputs", "ans", "pred"),
)
"""Names that only a model's text has."""

UNSURE_KEYS = ("text", "answer")
"""Names of the model's text in some tools, and of the question or the truth in others."""

TRUTH_KEYS = (
    *("label", "gt", "gold", "ground_truth", "gt_answer", "gold_answer", "gold_answers", "solution", "reference"),
    *("target", "truth"),
)

_YES_OR_NO = re.compile(r"\b(?:yes|no)\b")

_NO_TEXT = frozenset(
    {
        *ASK_KEYS,
        *SPLIT_KEYS,
        *IMAGE_KEYS,
        *TRUTH_KEYS,
        *("extracted", "parsed_answer", "parsed_ans", "parsed", "pred_letter", "hit", "score", "correct", "acc", "log"),
        *("thinking", "reasoning_content", "judge", "judgement", "judgment", "evaluation", "gpt4v_output_gpt_check"),
        *("model", "model_id", "answer_id", "dataset", "index", "finish_reason", "filter", "task", "question_id"),
    }
)
"""Names of fields that never hold an answer."""

WORDS: Mapping[str, bool] = {"yes": True, "1": True, "true": True, "no": False, "0": False, "false": False}
"""Spellings of yes and no in labels."""

Reading = Callable[[str], Collection[bool | None]]
"""From an answer to what the parsers of its benchmark make of it, the one in use first; None for nothing."""


def word(value: Any) -> str:
    """A label in the form that is compared."""
    text = str(value).strip().rstrip(".").lower()
    return text[:-2] if text in ("0.0", "1.0") else text


@dataclass(frozen=True)
class TextChoice:
    """The fields of a file that may hold the model's text.

    Attributes:
        rows: The file's.
        asked: The question of each row, as far as it is known.
        reads: How yes/no answers are read; None for other answers.
        usual: The names that messages name first.
    """

    rows: Sequence[Row]
    asked: Sequence[Asked]
    reads: Reading | None = None
    usual: tuple[str, ...] = ()

    def keys(self, given: str | None = None) -> tuple[list[str], list[str]]:
        """The key of the model's text in each row, and what the reader of the figures must know.

        Args:
            given: The key, if the user says.

        Raises:
            DataError: A row has none; or what it has may be the truth or the question, and nothing decides.
        """
        keys = [given] * len(self.rows) if given is not None else self._chosen()
        for row, key in zip(self.rows, keys, strict=True):
            if key not in row.fields:
                text_of(row.fields, row.where, [key])
        self._refuse_questions(keys)
        self._refuse_unread(keys, given is not None)
        notes = self._refuse_truth(keys, given is not None)
        return keys, [*notes, *self._refuse_unparsed(keys, given is not None), *self._refuse_signs(keys)]

    def _chosen(self) -> list[str]:
        names = (*self.usual, *(k for k in (*MODEL_KEYS, *UNSURE_KEYS) if k not in self.usual))
        own = [[key for key in names if key in row.fields] for row in self.rows]
        for row, keys in zip(self.rows, own, strict=True):
            if not keys:
                text_of(row.fields, row.where, names)  # Raises.
        if all(len(keys) == 1 for keys in own):  # Files of different tools, one behind the other.
            return [keys[0] for keys in own]
        there = [key for key in names if any(key in keys for keys in own)]
        model = self._not_derived([key for key in there if key in MODEL_KEYS])
        if not model and set(there) == set(UNSURE_KEYS):
            model = self._of_text_and_answer()
        chosen = model or there
        first = chosen[0]
        for other in chosen[1:]:
            self._refuse_difference(first, other)
        return [first] * len(self.rows)

    def _not_derived(self, model: list[str]) -> list[str]:
        """Without fields that hold what a parser makes of another one: "yes" beside "Yes, there is a dog."."""
        if self.reads is None or len(model) < 2:
            return model
        return [
            key
            for key in model
            if not any(
                self._is_reading(key, other) and not self._is_reading(other, key) for other in model if other != key
            )
        ]

    def _is_reading(self, key: str, of: str) -> bool:
        return self.reads is not None and all(
            (v is None or word(v) in WORDS)
            and (None if v is None else WORDS[word(v)]) in self.reads(without_thinking(str(row.fields[of])).answer)
            for row in self.rows
            if of in row.fields
            for v in [row.fields.get(key)]
        )

    def _of_text_and_answer(self) -> list[str]:
        """``answer`` if ``text`` is the question, ``text`` if LLaVA wrote the rows; both if nothing decides."""
        if 2 * sum(self._is_question(i, row.fields.get("text")) for i, row in enumerate(self.rows)) >= len(self.rows):
            return ["answer"]
        if any({"prompt", "answer_id", "model_id"} & row.fields.keys() for row in self.rows):
            return ["text"]
        return []

    def _is_question(self, index: int, value: Any) -> bool:
        """Whether a value is the question of a row, or reads like one where that is not known."""
        if not isinstance(value, str):
            return False
        if asked := self.asked[index].text:
            return is_asked(value, asked)
        beside = [v for key in ASK_KEYS if isinstance(v := self.rows[index].fields.get(key), str)]
        return value.strip().endswith("?") or any(is_asked(value, each) for each in beside)

    def _refuse_difference(self, key: str, other: str) -> None:
        for row in self.rows:
            if key in row.fields and other in row.fields and row.fields[key] != row.fields[other]:
                one, two = (name for name in row.fields if name in (key, other))
                found = f"{str(row.fields[one])[:40]!r} and {str(row.fields[two])[:40]!r}"
                raise DataError(
                    f"{row.where}: {one!r} and {two!r} differ ({found}), and either can be the model's text, the "
                    "truth or the question; say which is the model's with --text-key KEY"
                )

    def _refuse_questions(self, keys: Sequence[str]) -> None:
        asked = [
            i for i, (row, k) in enumerate(zip(self.rows, keys, strict=True)) if self._is_question(i, row.fields[k])
        ]
        if 2 * len(asked) > len(self.rows):
            row, key = self.rows[asked[0]], keys[asked[0]]
            others = ", ".join(repr(k) for k in row.fields if k != key)
            raise DataError(
                f"{row.where}: {key!r} is the question ({str(row.fields[key])[:60]!r}), so that there is no answer; if "
                f"another key of {others or 'the row'} holds it, say which with --text-key KEY"
            )

    def _refuse_unread(self, keys: Sequence[str], given: bool) -> None:
        """Refuse a file with an ``answer`` or ``text`` that is not read and not explained."""
        key = keys[0]
        for other in UNSURE_KEYS:
            rows = [i for i, row in enumerate(self.rows) if other in row.fields and keys[i] != other]
            if not rows or given:
                continue
            values = [self.rows[i].fields[other] for i in rows]
            if other == "text":
                constant = len(rows) > 1 and len(set(map(str, values))) == 1  # A prompt for all images.
                if constant or all(self._is_question(i, v) for i, v in zip(rows, values, strict=True)):
                    continue
            if all(word(v) in self.asked[i].truth for i, v in zip(rows, values, strict=True)):
                continue
            if not self._is_reading(other, key):
                self._refuse_difference(key, other)

    def _refuse_truth(self, keys: Sequence[str], given: bool) -> list[str]:
        """Refuse the right answers where another text may be the model's; return what the reader must know."""
        texts = [without_thinking(str(row.fields[k])).answer for row, k in zip(self.rows, keys, strict=True)]
        if not all(word(text) in asked.truth for text, asked in zip(texts, self.asked, strict=True)):
            return []
        others = [
            k for k in dict.fromkeys(k for row in self.rows for k in row.fields) if self._may_be_text(k, keys, texts)
        ]
        if others and not given:
            row = self.rows[0]
            shown = ", ".join(f"{k!r} ({str(row.fields.get(k))[:40]!r})" for k in others)
            raise DataError(
                f"{row.where}: every {keys[0]!r} equals its label, and {shown} differs: either may be the model's "
                "text; say which with --text-key KEY"
            )
        return ["all answers equal the labels"] if others or set(keys) <= {*UNSURE_KEYS} else []

    def _may_be_text(self, key: str, keys: Sequence[str], texts: Sequence[str]) -> bool:
        values = [row.fields.get(key) for row in self.rows]
        if key in _NO_TEXT or key in keys or key.endswith("_id") or not all(isinstance(v, str) for v in values):
            return False
        if self.reads is not None and all(set(self.reads(v)) == {None} for v in values if isinstance(v, str)):
            return False
        if all(self._is_question(i, v) for i, v in enumerate(values)):
            return False
        return any(word(v) != word(text) for v, text in zip(values, texts, strict=True))

    def _refuse_unparsed(self, keys: Sequence[str], given: bool) -> list[str]:
        """Refuse answers none of which says yes or no, unless the user says that they are the model's."""
        texts = [row.fields[k] for row, k in zip(self.rows, keys, strict=True)]
        if self.reads is None or not all(isinstance(text, str) for text in texts):
            return []
        if all(set(self.reads(without_thinking(text).answer)) == {None} for text in texts):
            shown = ", ".join(repr(text[:40]) for text in texts[:3])
            if given:
                return [f"no answer says yes or no (the first are {shown})"]
            raise DataError(
                f"{self.rows[0].where}: no answer under {keys[0]!r} says yes or no (the first are {shown}); if another "
                f"key of {', '.join(self.rows[0].fields)} holds the model's text, say which with --text-key KEY"
            )
        return []

    def _refuse_signs(self, keys: Sequence[str]) -> list[str]:
        """Refuse answers behind their prompt, and those that signs which nobody said turn into another one.

        Of Markdown's and quotation marks, and of whatever else hides the word yes or no ("NO!"), it is told.
        """
        found: list[str] = []
        for row, key in zip(self.rows, keys, strict=True):
            text = row.fields[key]
            if not isinstance(text, str):
                continue
            if holds_prompt(text):
                raise DataError(
                    f"{row.where}: {key!r} begins with the prompt ({text[:40]!r}): decode what was generated only, "
                    "output[:, inputs['input_ids'].shape[1]:], or take the prompt out of the file"
                )
            bare, token = without_signs(text), special_token(text)
            if self.reads is None:  # letters, words or a caption, of which a token around it is no part
                is_around = token and (text.strip().startswith(token) or text.strip().endswith(token))
                if not is_around and not written_out(text):
                    continue
            else:
                meant, read = (next(iter(self.reads(each))) for each in (bare, without_thinking(text).answer))
                if meant is None is read and len(said := set(_YES_OR_NO.findall(text.lower()))) == 1:
                    meant = said == {"yes"}
                if meant is None or read == meant:
                    continue
            if token:
                raise DataError(
                    f"{row.where}: {key!r} holds the special token {token!r} ({text[:40]!r}), with which rules read "
                    "another answer: decode with skip_special_tokens=True, or take it out of the file"
                )
            if sign := written_out(text):
                raise DataError(
                    f"{row.where}: {key!r} holds {sign!r}, a line break or letter that was escaped twice "
                    f"({text[:40]!r}), with which rules read another answer: write the character itself"
                )
            if bare != text and (sign := unseen(text)):
                raise DataError(
                    f"{row.where}: {key!r} holds the character U+{ord(sign):04X} ({text[:40]!r}), with which rules "
                    "read another answer: replace it by a blank, or take it out"
                )
            found.append(text)
        if not found:
            return []
        return [
            f"{len(found)} answers stand within signs that the rule does not look through, so that it finds no yes or "
            f"no in them (the first is {found[0][:40]!r}): see what another parser makes of them"
        ]
