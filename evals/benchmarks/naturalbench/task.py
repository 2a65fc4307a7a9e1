"""NaturalBench as a task: groups of two questions about two images, yes/no or of two options.

``vlmfix score naturalbench`` takes rows of ``Index`` (the item: four times the group, and its place there), the model's
words (``prediction``), and perhaps ``Question``, ``Answer`` and ``Question_Type``. ``Answer`` is the right answer,
whatever its case: it is never read as the model's. Without ``--questions`` every row needs it.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from vlmfix.errors import DataError

from ...data.answers import AnswerFile, FileAnswers, yes_no
from ...data.formats import labelled
from ...data.matching import Asked, Row
from ...data.records import text_of
from ...data.samples import Answers, Records
from ...data.source import whole_number
from ...stats.bootstrap import finite
from ...tables import number, plain_table
from ..base import ScoredFile, write_lines
from ..questions import Questions
from .data import NUMBER, bare, item, load_items, read_questions
from .figures import OPTIONS, NaturalItem, NaturalTable, parse_answer, score_answers, whole

GROUPS = 1900
"""Groups of the release."""

_NAMES = {"Index": "index", "Question": "question", "Image": "image", "Question_Type": "type", "Answer": "label"}


@dataclass(frozen=True)
class NaturalBench(Questions):
    """The items of NaturalBench, or those of some of its groups, which ``--limit`` counts."""

    name: ClassVar[str] = "naturalbench"
    title: ClassVar[str] = "NaturalBench"
    summary: ClassVar[str] = "two questions about two images, each with either answer"
    figures = NaturalTable.FIGURES
    records: ClassVar[Records] = "text"
    identified_by: ClassVar[tuple[str, ...]] = ("number", "text", "label")

    asked: tuple[NaturalItem, ...]

    @classmethod
    def load(cls, where: str) -> list[NaturalItem]:
        """See :func:`~vlmfix.evals.benchmarks.naturalbench.data.load_items`."""
        return load_items(where)

    def score(self, answers: Answers) -> NaturalTable:
        """One row per item; what belongs to a group, question or image stands on its first one."""
        return score_answers(self.asked, self.texts(answers))

    def about(self) -> str:
        """Groups, kinds and the rule."""
        groups = len({each.unit for each in self.asked})
        kinds = [each.kind for each in self.asked]
        return (
            f"NaturalBench: {groups} groups, which are what is resampled ({kinds.count('yes_no')} yes/no items and "
            f"{kinds.count('multiple_choice')} of options), official rule, which takes the article a for option A"
        )

    def breakdown(self, table: NaturalTable) -> dict[str, dict[str, float]]:
        """The figures of each kind of question."""
        names = {figure.name: figure.title for figure in table.FIGURES if figure.name != "yes_ratio"}
        parts = {kind: part.summary() for kind, part in table.by_split().items()}
        return {kind: {title: 100 * found[name] for name, title in names.items()} for kind, found in parts.items()}

    def export(self, folder: Path, answers: Answers) -> None:
        """``naturalbench.jsonl``: the rows by items of the data set, with ``prediction``, in the official order."""
        rows = [
            {
                "Index": each.number,
                "Question": each.question,
                "Image": each.image,
                "Answer": each.right,
                "Question_Type": each.kind,
                "prediction": text,
            }
            for each, text in zip(self.asked, self.texts(answers), strict=True)
        ]
        write_lines(folder / "naturalbench.jsonl", sorted(rows, key=lambda row: int(str(row["Index"]))))

    @classmethod
    def add_score_arguments(cls, parser: ArgumentParser) -> None:
        """Add the file of questions."""
        text = "the data set's rows, or test_set.json (default: Answer beside the answers)"
        parser.add_argument("--questions", type=Path, metavar="FILE", help=text)

    @classmethod
    def from_files(cls, path: Path, options: Namespace) -> tuple[NaturalBench, FileAnswers]:
        """Read answers and the items that they are to.

        Raises:
            DataError: A row names no item or another's, or a group is incomplete and ``--subset`` is not typed.
        """
        file = AnswerFile.of(path, options)
        file.usual = ("prediction",)
        rows = [_numbered(row) for row in labelled(file.rows(), file.text_key, _NAMES)]
        items = read_questions(options.questions) if options.questions else _from_rows(rows)
        asked = [Asked((str(i.number),), i.question, truth=_spellings(i), kind="item") for i in items]
        found = file.matched(rows, asked, fields=("index",), remedy="")
        groups = whole([items[i] for i in found])
        total = len(whole(items)) if options.questions else GROUPS
        lacking = sorted({items[i].unit for i in found} - groups, key=int)
        if (lacking or len(groups) < total) and not file.subset:
            shown = f"; group {lacking[0]} lacks some of its four answers" if lacking else ""
            raise DataError(
                f"{path} answers {len(groups)} of {total} groups wholly{shown}: answer them all, or type --subset to "
                "score the whole groups"
            )
        kept = {i: row for i, row in found.items() if items[i].unit in groups}
        if not kept:
            raise DataError(f"{path} answers no group wholly: a group is four items, numbered by Index")
        file.covers({"groups": (len(groups), total)})
        if lacking:
            file.facts["incomplete_groups"] = len(lacking)
            file.notes.append(f"{len(lacking)} groups lack answers and are in no figure")
        given = file.given(list(kept.values()), [asked[i] for i in kept], _readings)
        return cls.answered(file, [items[i] for i in kept], [each.answer() for each in given])

    def report_file(self, own: ScoredFile, other: ScoredFile | None, seed: int) -> tuple[dict[str, Any], str]:
        """The official figures, of all and of each kind."""
        table: NaturalTable = own.table
        parts = {"all": table, **table.by_split()}
        titles = [figure.title for figure in table.FIGURES]
        lines = [["kind", "groups", *titles, "unparsed"]]
        for kind, part in parts.items():
            figures, counts = part.summary(), part.counts()
            values = [number(finite(figures)[figure.name]) for figure in table.FIGURES]
            lines.append([kind, str(counts["groups"]), *values, str(counts["unparsed"])])
        text = f"NaturalBench, official rule, {own.path}\n{plain_table(lines)}"
        if articles := int(table.article.sum()):
            text += f"\n{articles} answers are read as option A by an a that may be an article before B"
        result = {
            "counts": table.counts(),
            "summary": finite(table.summary()),
            "kinds": {
                kind: {"counts": p.counts(), "summary": finite(p.summary())} for kind, p in table.by_split().items()
            },
        }
        return result, text


def _numbered(row: Row) -> Row:
    """A row with its item's number, and with its question as the benchmark's items have it."""
    fields = {**row.fields, "index": whole_number(row.fields.get("index"), row.where, NUMBER)}
    if isinstance(fields.get("question"), str):
        fields["question"] = bare(fields["question"])
    return Row(row.where, fields)


def _from_rows(rows: Sequence[Row]) -> list[NaturalItem]:
    """The items of rows that bring their right answers, each once."""
    found: dict[int, NaturalItem] = {}
    for row in rows:
        fields = row.fields
        right, kind = text_of(fields, row.where, ("label",)), str(fields.get("type") or "")
        made = item(fields["index"], kind, str(fields.get("question") or ""), right, row.where)
        found.setdefault(made.number, made)
    return list(found.values())


def _spellings(each: NaturalItem) -> frozenset[str]:
    return yes_no(each.label) if each.kind == "yes_no" else frozenset({each.right.lower()})


def _readings(text: str) -> tuple[bool | None, ...]:
    return tuple(parse_answer(text, kind) for kind in OPTIONS)
