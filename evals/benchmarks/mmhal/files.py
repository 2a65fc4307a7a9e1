"""MMHal-Bench of judged answers in a file, or what a judge is to be asked about the answers in it.

Rows find their questions by ``index`` (from 0), or by ``image_id`` and ``question``, or by order if asked to.
Rows with ``rating`` (0 to 6) or ``judgement`` (text with "Rating: N") are scored. Rows with the model's answer only
cannot be: the requests to a judge are written instead.
"""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vlmfix.errors import DataError

from ...data.answers import AnswerFile, FileAnswers
from ...data.matching import Asked, Row
from ...data.model_text import word
from ...data.records import text_of
from ...data.samples import Answer, Answers, Sample
from ...data.write import write_text
from ...tables import number, plain_table
from ..base import ScoredFile
from ..parts import Parts, add_by_order, answered, code_of, subset_lines
from .data import TYPES, load_mmhal
from .figures import MAX_RATING, MmhalTable, judge_prompt, score_judgements, score_ratings
from .task import Mmhal

_JUDGEMENT_KEYS = ("judgement", "judgment", "evaluation")


@dataclass(frozen=True)
class MmhalFile(Mmhal):
    """MMHal-Bench as a file answers it.

    Attributes:
        total: How many questions there are.
        judged_by: Name of the judge, if the user says.
        requests: Where requests to a judge go.
        ratings: Of the answers, if the file has them.
        judgements: Likewise, as the judge wrote them.
    """

    total: int
    judged_by: str | None
    requests: Path
    ratings: tuple[int, ...] = ()
    judgements: tuple[str, ...] = ()

    @classmethod
    def add_score_arguments(cls, parser: ArgumentParser) -> None:
        """Add what scoring needs to know beside the answers."""
        parser.add_argument("--questions", type=Path, required=True, metavar="FILE", help="response_template.json")
        parser.add_argument("--judge", metavar="NAME", help="name of the judge, for the table")
        parser.add_argument("--requests", type=Path, metavar="FILE", help="where requests go (default: beside FILE)")
        add_by_order(parser)

    @classmethod
    def from_files(cls, path: Path, options: Namespace) -> tuple[Mmhal, FileAnswers]:
        """See :func:`read_mmhal`."""
        return read_mmhal(path, options)

    def score(self, answers: Answers) -> MmhalTable | None:
        """One row per question, or None if nobody judged the answers."""
        judge = self.judged_by or "unnamed"
        if self.ratings:
            return score_ratings(self.items, self.ratings, judge=judge)
        return score_judgements(self.items, self.judgements, judge=judge) if self.judgements else None

    def report_file(self, own: ScoredFile, other: ScoredFile | None, seed: int) -> tuple[dict[str, Any] | None, str]:
        """The official figures; or where the requests to a judge are, which are written here."""
        table, parts = own.table, {"questions": (len(self.items), self.total)}
        if table is None:
            return None, self._ask_a_judge(own, parts)
        counts, summary, by_type = table.counts(), table.summary(), table.by_type()
        result = {"judge": table.judge, "counts": counts, "answered": answered(parts), **summary}
        columns = ["questions", "score (0-6)", "hallucinated", *TYPES, "unparsed"]
        values = [f"{summary['average_score']:.2f}", number(summary["hallucination_rate"])]
        types = [f"{by_type[name]:.2f}" if name in by_type else "-" for name in TYPES]
        hint = "" if self.judged_by else " (say who with --judge NAME: the figures depend on it)"
        shown = plain_table([columns, [str(len(table)), *values, *types, str(counts["unparsed"])]])
        text = "\n".join([f"MMHal-Bench, judge {table.judge}{hint}, {own.path}", *subset_lines(parts), shown])
        return {**result, "by_type": list(by_type.values()), "types_in_order": list(by_type)}, text

    def _ask_a_judge(self, own: ScoredFile, parts: Parts) -> str:
        texts = [own.answers[sample.key].text for sample in self.each]
        if not any(text.strip() for text in texts):
            raise DataError(f"{own.path}: every answer is empty; fill in 'model_answer'")
        lines = [
            json.dumps({"index": item.index, "prompt": judge_prompt(item, text)})
            for item, text in zip(self.items, texts, strict=True)
        ]
        write_text(self.requests, "\n".join(lines) + "\n")
        told = (
            f"MMHal-Bench, {own.path}: not scored, because a judge must rate the answers (officially gpt-4-0314 at "
            f"temperature 0).\nThe {len(lines)} requests are in {self.requests}. Have 'prompt' of each line answered "
            "(the instruction is ours, not the official one),\nwrite the answers as JSON lines with index and "
            "judgement, and score that file with --judge NAME."
        )
        return "\n".join([told, *subset_lines(parts)])


def read_mmhal(path: Path, options: Namespace) -> tuple[Mmhal, FileAnswers]:
    """Read judgements, or answers that are not judged.

    Args:
        path: The file, as the module says.
        options: As typed.

    Raises:
        DataError: Questions and answers do not match, or only some lines are judged.
    """
    items = load_mmhal(options.questions)
    file = AnswerFile.of(path, options)
    file.usual = ("model_answer", "answer", "response", "text")
    rows = file.rows()
    by_index = any("index" in row.fields for row in rows)
    asked = [
        Asked(
            (str(item.index),) if by_index else (item.image_id, item.question),
            item.question,
            truth=frozenset({word(item.reference)}),
        )
        for item in items
    ]
    found = file.matched(
        rows,
        asked,
        fields=("index",) if by_index else ("image_id", "question"),
        subset=options.subset,
        by_order=options.by_order,
        remedy="--subset scores those that are there",
    )
    picked, rows = tuple(items[i] for i in found), list(found.values())
    each = tuple(Sample(Mmhal.name, item.index, None, item.question) for item in picked)
    requests = options.requests or path.with_name(path.stem + ".judge.jsonl")
    task = MmhalFile(picked, (), each, each, "{question}", 0, None, len(items), options.judge, requests)
    judged = [any(row.fields.get(key) is not None for key in ("rating", *_JUDGEMENT_KEYS)) for row in rows]
    if not any(judged):
        given = file.given(rows, [asked[i].text for i in found], [asked[i].truth for i in found])
        return task, FileAnswers(file, each, [each.answer() for each in given])
    if not all(judged):
        raise DataError(f"{rows[judged.index(False)].where} has no rating or judgement: judge all answers")
    return _judged(task, rows), FileAnswers(file, each, [Answer("", (), False, (), None, 0.0)] * len(rows))


def _judged(task: MmhalFile, rows: Sequence[Row]) -> MmhalFile:
    if all("rating" in row.fields for row in rows):
        return replace(task, ratings=tuple(code_of(row.fields, "rating", row.where, MAX_RATING) for row in rows))
    return replace(task, judgements=tuple(text_of(row.fields, row.where, _JUDGEMENT_KEYS) for row in rows))
