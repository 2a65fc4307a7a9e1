"""Which question each row of an answer file answers: by what stands beside the answer, checked against the questions.

Order is never taken for identity. In this order, the first that fits all rows: image and question; the id, with the
split where several question files share ids; the order, if every question beside an answer is that of its place, or if
the user says so.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vlmfix.errors import DataError

from .records import IMAGE_KEYS, parse_image_id
from .signs import plain_form

ASK_KEYS = ("question", "query", "prompt", "input")

SPLIT_KEYS = ("split", "category")

_OFFSET = 10_000_000
"""LLaVA numbers POPE's questions from 1, 10000001 and 20000001, one range per split."""

_OFFSET_SPLITS = ("adversarial", "random", "popular")

_PLACEHOLDER = re.compile(r"<image>|<imagehere>|<\|image\|>|<image_placeholder>")


@dataclass(frozen=True)
class Asked:
    """A question of the benchmark, as far as an answer file may repeat it.

    Attributes:
        key: What identifies it within its split, such as its id.
        text: The question; empty if it is not known.
        image: Name or id of its image; empty if it is not known.
        truth: The spellings of its right answer, in lower case; empty if there is no single one.
        split: Its part of the benchmark; empty if ids are unique without.
        kind: What a message calls it.
    """

    key: tuple[str, ...]
    text: str = ""
    image: str = ""
    truth: frozenset[str] = frozenset()
    split: str = ""
    kind: str = "question"

    @property
    def name(self) -> str:
        """How a message names it."""
        return f"{self.split} {self.kind} {'/'.join(self.key)}".strip()


@dataclass(frozen=True)
class Row:
    """A row of an answer file.

    Attributes:
        where: Its place, for messages.
        fields: What it holds.
    """

    where: str
    fields: Mapping[str, Any]

    @property
    def texts(self) -> dict[str, str]:
        """The questions that stand beside the answer, by key; ``text`` counts if it reads as a question."""
        found = {key: v for key in ASK_KEYS if isinstance(v := self.fields.get(key), str) and v.strip()}
        text = self.fields.get("text")
        return {**found, "text": text} if isinstance(text, str) and text.strip().endswith("?") else found

    @property
    def image(self) -> int | str | None:
        """The image that stands beside the answer."""
        for key in IMAGE_KEYS:
            value = self.fields.get(key)
            value = value.get("path") if isinstance(value, Mapping) else value
            if value not in (None, "") and not isinstance(value, list):
                return image_name(value)
        return None

    def code(self, key: str, largest: int) -> int:
        """A whole number from 0 to ``largest`` under a key.

        Raises:
            DataError: It is something else.
        """
        value = id_text(self.fields.get(key))
        if value not in map(str, range(largest + 1)):
            raise DataError(f"{self.where}: expected {key!r} from 0 to {largest}, found {self.fields.get(key)!r}")
        return int(value)

    def id(self, fields: Sequence[str]) -> tuple[str, ...] | None:
        """The values of its id fields; None if it lacks one."""
        values = tuple(id_text(self.fields.get(name)) for name in fields)
        return values if all(values) else None


def id_text(value: Any) -> str:
    """An id as text, ``17.0`` as ``17``; empty if there is none, or a float that is too large to be whole."""
    if value is None or isinstance(value, bool | list | dict) or value != value:
        return ""
    if isinstance(value, float) and abs(value) >= 2**53:
        return ""
    text = str(value).strip()
    return text[:-2] if re.fullmatch(r"\d+\.0", text) else text


def image_name(value: Any) -> int | str:
    """An image in the form that is compared: its COCO id, else the name of its file."""
    try:
        return parse_image_id(value, "")
    except DataError:
        name = plain_form(str(value)).strip().lower()
        return re.split(r"[/\\]", name)[-1].rpartition(".")[0] or name


def plain(text: str) -> str:
    """A question in the form that is compared: without case, blanks, placeholders and old spellings of POPE."""
    text = (
        _PLACEHOLDER.sub(" ", plain_form(text).lower())
        .replace("in the imange", "in the image")
        .replace("there an ", "there a ")
    )
    return " ".join(text.split())


def is_asked(given: str, asked: str) -> bool:
    """Whether a text asks a question: alone, with an instruction behind it, or within a chat template."""
    given, asked = plain(given), plain(asked)
    if given == asked:
        return True
    place = given.find(asked)
    if not asked or place < 0:
        return False
    before, behind = given[:place][-1:], given[place + len(asked) :][:1]
    # A longer question is another one: "Is A bigger than B" is not "Is A bigger than B and C".
    return not before.isalnum() and (asked[-1] in ".?!:" or not (behind.isalnum() or behind == " "))


def match(
    rows: Sequence[Row],
    asked: Sequence[Asked],
    *,
    fields: Sequence[str] = ("question_id",),
    source: str = "the question file",
    by_order: bool = False,
    doubts: list[str] | None = None,
) -> list[tuple[int, Row]]:
    """Find the question of every row.

    Args:
        rows: The rows, in file order.
        asked: The questions.
        fields: The names of the parts of a question's key.
        source: How a message names the question file.
        by_order: Whether the user says that the answers are in the order of the questions.
        doubts: Takes reasons against taking the rows in order, which are told if nothing else is wrong.

    Returns:
        Pairs of a question's index and a row, in file order; a row of several splits stands in several pairs.

    Raises:
        DataError: A row is about no question, or about several; or what stands beside an answer is not its question.
    """
    questions = _Questions(asked, fields, source)
    ids = [row.id(fields) for row in rows]
    if by_order:
        pairs = questions.by_order(rows, typed=True)
    elif all(row.texts and row.image is not None for row in rows) and questions.have_texts_and_images:
        pairs = questions.by_text(rows, ids)
    elif any(ids):
        lacking = next((row for row, key in zip(rows, ids, strict=True) if key is None), None)
        if lacking is not None:
            raise DataError(f"{lacking.where}: expected {_names(fields)} as on other lines")
        pairs = questions.by_id(rows, ids)
    else:
        pairs = questions.by_order(rows)
        if doubts is not None and not all(row.texts for row in rows):
            doubts.append(
                f"{rows[0].where}: nothing says which question is answered: give {' and '.join(fields)}, or the image "
                f"and the question, on every line; if the answers are in the order of the questions, type --by-order"
            )
    for index, row in pairs:
        check_question(row, asked[index], pairs, asked)
    return pairs


def _names(fields: Sequence[str]) -> str:
    return ", ".join(fields) if len(fields) > 1 else repr(fields[0])


def check_question(row: Row, asked: Asked, pairs: Iterable[tuple[int, Row]], all_asked: Sequence[Asked]) -> None:
    """Refuse a row whose question or image is not that of the question it is matched to.

    Raises:
        DataError: It is not; the message says how many rows agree.
    """
    texts, image = row.texts, row.image
    wrong = None
    others = {key: text for key, text in texts.items() if not is_asked(text, asked.text)} if asked.text else {}
    # Beside the question there may be an instruction, but no other question.
    if others and (len(others) == len(texts) or any(text.strip().endswith("?") for text in others.values())):
        key, text = next(iter(others.items()))
        wrong = f"{key!r} is {text[:80]!r}, and {asked.name} is {asked.text[:80]!r}"
    elif asked.image and image is not None and image != image_name(asked.image):
        wrong = f"the image is {image!r}, and that of {asked.name} is {asked.image!r}"
    if wrong is not None:
        pairs = list(pairs)
        agree = sum(any(is_asked(t, all_asked[i].text) for t in r.texts.values()) for i, r in pairs)
        raise DataError(
            f"{row.where}: {wrong}: the answers belong to other questions, to another release of them, or are in "
            f"another order ({agree} of {len(pairs)} questions beside the answers agree)"
        )


class _Questions:
    """The questions of a benchmark, by what identifies them."""

    def __init__(self, asked: Sequence[Asked], fields: Sequence[str], source: str):
        self.asked, self.fields, self.source = asked, fields, source
        self.have = "have" if source.endswith("s") else "has"
        self.splits = list(dict.fromkeys(question.split for question in asked))
        self.index = {(question.split, question.key): i for i, question in enumerate(asked)}
        self.have_texts_and_images = all(question.text and question.image for question in asked)

    def by_order(self, rows: Sequence[Row], *, typed: bool = False) -> list[tuple[int, Row]]:
        """Row by row in the order of the questions."""
        if len(rows) != len(self.asked):
            file, lacking = re.split(r" (?:line|entry|row) ", rows[0].where)[0], ", ".join(self.fields)
            raise DataError(
                f"{file} has {len(rows)} answers{'' if typed else f' without {lacking}'}, {self.source} "
                f"{len(self.asked)} questions: give one answer per question in their order, or {lacking} on every line"
            )
        return list(enumerate(rows))

    def by_text(self, rows: Sequence[Row], ids: Sequence[tuple[str, ...] | None]) -> list[tuple[int, Row]]:
        """By image and question; the split or the id decides where several questions are alike."""
        of_image: dict[int | str, list[int]] = {}
        for i, question in enumerate(self.asked):
            of_image.setdefault(image_name(question.image), []).append(i)
        pairs = []
        for row, key in zip(rows, ids, strict=True):
            image, texts = row.image, list(row.texts.values())
            fit = [i for i in of_image.get(image, ()) if any(is_asked(t, self.asked[i].text) for t in texts)]  # type: ignore[arg-type]
            if not fit:
                splits = self._said(row) or self.splits
                meant = next((self.index[s, key] for s in splits if key and (s, key) in self.index), None)
                if meant is not None:  # The id says which question it should have been.
                    check_question(row, self.asked[meant], [(meant, row)], self.asked)
                raise DataError(
                    f"{row.where}: {self.source} {self.have} no question {texts[0][:80]!r} about the image {image!r}: "
                    "the answers belong to other questions, or to another release of them"
                )
            said = self._said(row)
            found = [i for i in fit if said is None or self.asked[i].split in said]
            if len(found) > (1 if said is None else len(said)):
                found = [i for i in found if self.asked[i].key == key]
            if not found or len(found) != (1 if said is None else len(said)):
                names = ", ".join(self.asked[i].name for i in fit)
                raise DataError(
                    f"{row.where}: the question is asked {len(fit)} times ({names}): add 'split' to every line, or "
                    "score one split at a time"
                )
            pairs += [(i, row) for i in found]
        return pairs

    def _said(self, row: Row) -> list[str] | None:
        """The splits that a row names; None if it names none or there is one only.

        Raises:
            DataError: There is no such split.
        """
        value = next((v for k in SPLIT_KEYS if isinstance(v := row.fields.get(k), str) and v), None)
        if value is None or self.splits == [""]:
            return None
        named = [value] if value in self.splits else [part.strip() for part in value.split(",")]
        known = [split for split in named if split in self.splits]
        # One answer to the same question may count in several splits, of which only some are scored.
        if not known or (len(named) == 1 and named != known):
            self._refuse_split(row, value)
        return known

    def _refuse_split(self, row: Row, value: str) -> None:
        raise DataError(
            f"{row.where}: the question files have the splits {', '.join(self.splits)}, and the line says {value!r}; "
            "score one split at a time, or add 'split' to every line"
        )

    def by_id(self, rows: Sequence[Row], ids: Sequence[tuple[str, ...] | None]) -> list[tuple[int, Row]]:
        """By id, within the splits that rows name or that LLaVA's numbering stands for."""
        shifted = self._llava_splits(rows, ids)
        pairs = []
        for row, key in zip(rows, ids, strict=True):
            splits = self._said(row)
            if shifted is not None and key is not None:
                number = int(key[0])
                splits, key = [shifted[number // _OFFSET]], (str(number % _OFFSET),)
            if splits is None:
                if len(self.splits) > 1:
                    self._refuse_split(row, "")
                splits = self.splits
            for split in splits:
                if (split, key) not in self.index:
                    name = Asked(key or (), split=split).name
                    zero = "; questions are numbered from 1 there" if key == ("0",) else ""
                    raise DataError(f"{row.where}: {self.source} {self.have} no {name}{zero}")
                pairs.append((self.index[split, key], row))  # type: ignore[index]
        return pairs

    def _llava_splits(self, rows: Sequence[Row], ids: Sequence[tuple[str, ...] | None]) -> dict[int, str] | None:
        """Range of LLaVA's numbers to split, decided by the questions beside the answers; None for other numbers."""
        numbers = [int(key[0]) if key and len(key) == 1 and key[0].isdecimal() else -1 for key in ids]
        own = [int(q.key[0]) if len(q.key) == 1 and q.key[0].isdecimal() else 0 for q in self.asked]
        if min(numbers) < 0 or not _OFFSET <= max(numbers) < 3 * _OFFSET or max(own) >= _OFFSET:
            return None
        found: dict[int, str] = {}
        for place in sorted({number // _OFFSET for number in numbers}):
            group = [(n % _OFFSET, row) for n, row in zip(numbers, rows, strict=True) if n // _OFFSET == place]
            usual = [split for split in self.splits if split.endswith(_OFFSET_SPLITS[place])]
            fit = [split for split in self.splits if self._all_agree(split, group)]
            chosen = usual if not fit or set(usual) & set(fit) else fit
            if len(chosen) != 1:
                raise DataError(
                    f"{group[0][1].where}: the numbers are LLaVA's, where those from {place * _OFFSET + 1} are POPE's "
                    f"{_OFFSET_SPLITS[place]} questions of the first release; give that question file too (found "
                    f"{', '.join(self.splits)})"
                )
            found[place] = chosen[0]
        if len(set(found.values())) < len(found):
            raise DataError(
                f"{rows[0].where}: two ranges of LLaVA's numbers are questions of one split: score one at a time"
            )
        return found

    def _all_agree(self, split: str, rows: Sequence[tuple[int, Row]]) -> bool:
        indices = [self.index.get((split, (str(number),))) for number, _ in rows]
        return all(
            i is not None and row.texts and any(is_asked(t, self.asked[i].text) for t in row.texts.values())
            for i, (_, row) in zip(indices, rows, strict=True)
        )
