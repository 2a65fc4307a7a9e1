"""AMBER of responses in a file: ``id`` and the text, taken word by word as the official script does."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vlmfix.errors import DataError

from ...data.answers import AnswerFile, FileAnswers, yes_no
from ...data.matching import Asked, id_text
from ...data.samples import Answers
from ...tables import number, plain_table
from ..base import ScoredFile
from ..parts import Parts, answered, subset_lines
from ..yes_no import readings
from .data import load_amber, load_texts
from .figures import AmberTable, score_responses
from .objects import spacy_similarity
from .task import Amber, AmberQuery


@dataclass(frozen=True)
class AmberFile(Amber):
    """AMBER as a file answers it.

    Attributes:
        parts: How many items of each task are answered.
    """

    parts: Parts = field(default_factory=dict)

    @classmethod
    def add_score_arguments(cls, parser: ArgumentParser) -> None:
        """Add what scoring needs to know beside the responses."""
        parser.add_argument(
            "--data",
            type=Path,
            required=True,
            metavar="DIR",
            help="folder with annotations.json, relation.json and safe_words.txt",
        )
        parser.add_argument(
            "--spacy",
            metavar="MODEL",
            help="word similarity, officially en_core_web_lg (default: none, exact words only)",
        )

    @classmethod
    def from_files(cls, path: Path, options: Namespace) -> tuple[Amber, FileAnswers]:
        """See :func:`read_amber`."""
        return read_amber(path, options)

    def responses(self, answers: Answers) -> dict[int, str]:
        """Responses by item id, as they are."""
        return {query.item.id: answers[self.sample(query).key].text for query in self.queries}

    def score(self, answers: Answers) -> AmberTable:
        """One row per description and per question, in the order of the items."""
        similarity = None if self.spacy is None else spacy_similarity(self.spacy)
        return score_responses(self.data, self.responses(answers), similarity=similarity, similarity_name=self.spacy)

    def report_file(self, own: ScoredFile, other: ScoredFile | None, seed: int) -> tuple[dict[str, Any], str]:
        """The official figures, per dimension."""
        table, parts = own.table, self.parts
        counts, figures, score = table.counts(), table.figures(), table.official_score()
        summary = {} if score is None else {"AMBER": score}
        result = {"similarity": table.similarity, "counts": counts, "answered": answered(parts)}
        result |= {"figures": dict(figures), "summary": summary}
        lines = [f"AMBER, word similarity {table.similarity} (official: en_core_web_lg), {own.path}"]
        lines += subset_lines(parts)
        generative = figures.pop("Generative Task", None)
        if generative is not None:
            cells = [number(value, percent=False) for value in generative.values()]
            columns = ["descriptions", *generative, "empty"]
            lines.append(plain_table([columns, [str(counts["non_hallu_num"]), *cells, str(counts["empty"])]]))
        if figures:
            # The JSON file keeps the names as the official script spells them.
            shown = {"Descriminative Task": "All", "Exsitence": "Existence"}
            rows = [
                [shown.get(name, name), *(number(value, percent=False) for value in group.values())]
                for name, group in figures.items()
            ]
            lines.append(plain_table([["questions", *next(iter(figures.values()))], *rows]))
            lines.append(
                f"unparsed: {counts['unparsed']} of {counts['qa_correct_num']} (neither 'Yes' nor 'No': wrong)"
            )
        return result, "\n".join([*lines, *(f"AMBER score: {value:.2f}" for value in summary.values())])


def read_amber(path: Path, options: Namespace) -> tuple[Amber, FileAnswers]:
    """Read responses.

    Args:
        path: The responses.
        options: As typed.

    Raises:
        DataError: A line has no id or no text, an id occurs twice or is unknown, or its question is another one.
    """
    data, texts = load_amber(options.data), load_texts(options.data)
    file = AnswerFile.of(path, options)
    file.usual = ("response", "answer", "text", "caption")
    rows = file.rows()
    for row in rows:
        key = id_text(row.fields.get("id"))
        if not key.isdecimal() or int(key) not in data.items:
            found = row.fields.get("id")
            raise DataError(f"{row.where}: expected 'id', an item of AMBER's annotations, found {found!r}")
    items = list(data.items.values())
    asked = [
        Asked(
            (str(item.id),),
            *texts.get(item.id, ("", "")),
            frozenset() if item.label is None else yes_no(item.label),
            kind="item",
        )
        for item in items
    ]
    found = file.matched(rows, asked, fields=("id",), remedy="", subset=True, source="AMBER")
    picked = [items[index] for index in found]
    questions = all(item.label is not None for item in picked)
    given = file.given(
        list(found.values()),
        [asked[index].text for index in found],
        [asked[index].truth for index in found],
        readings if questions else None,
    )
    parts = {
        f"{task} items": (sum(i.task == task for i in picked), sum(i.task == task for i in items))
        for task in dict.fromkeys(item.task for item in items)
    }
    if options.subset:
        data = replace(data, items={item.id: item for item in picked})
    else:  # A task may be left out as a whole; its groups are not shown then.
        parts = {task: there for task, there in parts.items() if there[0]}
    queries = tuple(AmberQuery(item, str(item.id), None, str(item.id)) for item in picked)
    task = AmberFile(queries, data, (), "{question}", (0, 0), options.spacy, parts)
    samples = [task.sample(query) for query in queries]
    return task, FileAnswers(file, samples, [each.answer() for each in given])
