"""AMBER as a task: images to describe, and yes/no questions about existence, attributes and relations.

``vlmfix score amber`` takes rows with ``id`` and the response, which is read word by word as the official script does.
"""

from __future__ import annotations

import math
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from vlmfix.errors import DataError

from ...data.answers import AnswerFile, FileAnswers, yes_no
from ...data.matching import Asked, id_text
from ...data.samples import Answers, Sample
from ...data.source import choose, find_file, find_image, image_number, is_dataset
from ...data.write import digest
from ...options import EvalOptions
from ...tables import number, plain_table
from ...testbed import CAPTION_TOKENS
from ..base import Benchmark, ScoredFile, distinct, write_list
from ..choice import RunData, answer_limit
from ..yes_no import parse_answer, readings
from .data import QUERY_FILES, AmberData, AmberItem, load_amber, load_texts, read_queries
from .figures import AmberTable, score_responses
from .objects import Nouns, known_lemmas, spacy_similarity, tagged_nouns

#: Of the questions; the descriptions are asked for as AMBER does. It names no prompt that makes a model answer with one
#: word (its authors compare the logits of Yes and No), so this is VLMEvalKit's.
PROMPT = "{question} Please answer yes or no."

NEW_TOKENS = 512
"""The limit of a description."""

_ANSWERS = {True: "Yes", False: "No"}

#: How the official script's names of question groups are shown; the JSON file keeps them as they are spelt there.
_SPELT = {"Descriminative Task": "All", "Exsitence": "Existence"}


@dataclass(frozen=True)
class AmberQuery:
    """One item to ask.

    Attributes:
        item: Its annotation.
        image: File name of the image.
        path: Its file; None where only answers are scored.
        text: The query.
    """

    item: AmberItem
    image: str
    path: Path | None
    text: str


def load_queries(where: str) -> tuple[AmberData, list[AmberQuery]]:
    """Read the annotations and the queries, and find the images.

    Args:
        where: A folder with AMBER's ``data`` (annotations.json, relation.json, safe_words.txt, query_all.json, also
            below ``data`` and ``query``) and its images (``AMBER_1.jpg``, also below ``image`` or ``images``).

    Raises:
        DataError: A file is missing or broken, or an image is missing.
    """
    if is_dataset(where):
        raise DataError("AMBER's annotations are files: give the folder of junyangwang0410/AMBER, with its images")
    folder = Path(where)
    root = find_file(folder, ["annotations.json", "data/annotations.json"], "annotations").parent
    data = load_amber(root)
    path = find_file(root, QUERY_FILES, "queries")
    asked = read_queries(path)
    lacking = [i for i in data.items if i not in asked]
    if lacking:
        raise DataError(f"{path} has no query for item {lacking[0]} of annotations.json: take both from one release")
    places = [folder / "image", folder / "images", folder, root]
    paths: dict[str, Path] = {}
    for image, _ in asked.values():
        if image not in paths:
            paths[image] = find_image(places, [image], "AMBER")
    return data, [AmberQuery(item, asked[i][0], paths[asked[i][0]], asked[i][1]) for i, item in data.items.items()]


@dataclass(frozen=True)
class Amber(Benchmark):
    """AMBER's items, or those of some of its images.

    Attributes:
        queries: The items, in their order.
        data: The annotations of these items.
        samples: Everything it asks, each different question once.
        prompt: Template of the questions with ``{question}``.
        max_new_tokens: Limits of a description's and of an answer's length.
        spacy: Model of the word similarity, or None for exact words only.
        word_by_word: Whether an answer must be "Yes" or "No"; otherwise just one of the words must be in it.
    """

    name: ClassVar[str] = "amber"
    title: ClassVar[str] = "AMBER"
    summary: ClassVar[str] = "descriptions, and questions about existence, attributes and relations"
    figures = AmberTable.FIGURES
    matched_on: ClassVar[Mapping[str, str]] = {"early stop": "cover", "yes bias": "yes_ratio"}
    scoring: ClassVar[tuple[str, ...]] = ("similarity",)

    queries: tuple[AmberQuery, ...]
    data: AmberData = field(repr=False)
    samples: tuple[Sample, ...]
    prompt: str
    max_new_tokens: tuple[int, int]
    spacy: str | None = None
    word_by_word: bool = False

    @classmethod
    def make(cls, options: EvalOptions, data: RunData) -> Amber:
        """Read the items and choose at most ``--limit`` images, with all that is asked about them."""
        annotations, queries = load_queries(data.own(cls.name))
        kept = set(choose((q.image for q in queries), options.limit, options.seed))
        queries = [q for q in queries if q.image in kept]
        annotations = replace(annotations, items={q.item.id: q.item for q in queries})
        if options.spacy is not None:
            spacy_similarity(options.spacy)  # A missing model is found here, not after the last answer.
        prompt = options.prompt_of.get(cls.name, PROMPT)
        long = options.max_new_tokens or CAPTION_TOKENS.get(options.model, NEW_TOKENS)
        limits = (long, answer_limit(options))
        made = cls(tuple(queries), annotations, (), prompt, limits, options.spacy)
        if made._described:
            made._nouns  # noqa: B018  Likewise a missing tagger.
        return replace(made, samples=distinct([made.sample(query) for query in queries]))

    def settings(self) -> dict[str, Any]:
        """Prompt, length limits, similarity and a digest of the items."""
        items = [[q.item.id, q.item.task, q.text, q.image, sorted(q.item.truth), q.item.label] for q in self.queries]
        return {
            "prompt": self.prompt,
            "max_new_tokens": list(self.max_new_tokens),
            "similarity": self.spacy,
            "items": digest(items),
        }

    def responses(self, answers: Answers) -> dict[int, str]:
        """Responses by item id; of a question "Yes" or "No" if exactly one of them is in the answer, else all of it."""
        found = {}
        for query in self.queries:
            text = answers[self.sample(query).key].text
            raw = self.word_by_word or query.item.task == "generative"
            read = None if raw else parse_answer(text, "vlmeval")
            found[query.item.id] = text if read is None else _ANSWERS[read]
        return found

    def sample(self, query: AmberQuery) -> Sample:
        """What the model is asked of an item."""
        number = image_number(self.name, query.image)
        if query.item.task == "generative":
            return Sample(self.name, number, query.path, query.text, self.max_new_tokens[0], "gaps")
        text = self.prompt.replace("{question}", query.text)
        return Sample(self.name, number, query.path, text, self.max_new_tokens[1])

    @property
    def _described(self) -> bool:
        return any(query.item.task == "generative" for query in self.queries)

    @cached_property
    def _nouns(self) -> Nouns:
        """Tags each different description once: the early stop scores the same ones again and again."""
        known_lemmas(self.data)
        return cache(tagged_nouns())

    def score(self, answers: Answers) -> AmberTable:
        """One row per description and per question, in the order of the items."""
        keys = {q.item.id: self.sample(q).key for q in self.queries}
        return score_responses(
            self.data,
            self.responses(answers),
            nouns=self._nouns if self._described and not self.word_by_word else None,
            similarity=None if self.spacy is None else spacy_similarity(self.spacy),
            similarity_name=self.spacy,
            image_ids={q.item.id: image_number(self.name, q.image) for q in self.queries if q.path is not None},
            scores={i: answers[key].score for i, key in keys.items()},
        )

    def about(self) -> str:
        """Items, images, similarity and how answers are read."""
        described = sum(q.item.task == "generative" for q in self.queries)
        images = len({q.image for q in self.queries})
        return (
            f"AMBER: {described} descriptions, {len(self.queries) - described} questions on {images} images; word "
            f"similarity {self.spacy or 'none, exact words only'} (official: en_core_web_lg); F1 of the answer no; "
            "an answer is read as Yes or No if just one of the words is in it"
        )

    def breakdown(self, table: AmberTable) -> dict[str, dict[str, float]]:
        """Per dimension, as the official script prints: percentages with one decimal.

        The last row answers every question by the larger one of the logits of Yes and No, as AMBER's authors do.
        """
        shown = {**_SPELT, "Descriminative Task": "all questions"}
        found = {shown.get(k, k): dict(v) for k, v in table.figures().items() if k != "Generative Task"}
        asked = np.flatnonzero(table.columns["questions"])
        if len(asked) and np.isfinite(table.margin[asked]).all():
            found["all questions, by logits"] = _figures(table.margin[asked] <= 0, ~table.label[asked])
        return found

    def export(self, folder: Path, answers: Answers) -> None:
        """``amber.json``: id and response of every item, as the official script reads."""
        write_list(
            folder / "amber.json", [{"id": i, "response": text} for i, text in sorted(self.responses(answers).items())]
        )

    @classmethod
    def add_score_arguments(cls, parser: ArgumentParser) -> None:
        """Add the annotations and the word similarity."""
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
        """Read responses.

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
        matched = file.matched(rows, asked, fields=("id",), source="AMBER", remedy="")
        picked = [items[index] for index in matched]
        questions = all(item.label is not None for item in picked)
        given = file.given(list(matched.values()), [asked[index] for index in matched], readings if questions else None)
        parts = {
            f"{task} items": (sum(i.task == task for i in picked), sum(i.task == task for i in items))
            for task in dict.fromkeys(item.task for item in items)
        }
        if options.subset:
            data = replace(data, items={item.id: item for item in picked})
        else:  # A task may be left out as a whole; its groups are not shown then.
            parts = {task: there for task, there in parts.items() if there[0]}
        file.covers(parts)
        queries = tuple(AmberQuery(item, str(item.id), None, str(item.id)) for item in picked)
        made = cls(queries, data, (), "{question}", (0, 0), options.spacy, word_by_word=True)
        return made, FileAnswers(file, map(made.sample, queries), [each.answer() for each in given])

    def report_file(self, own: ScoredFile, other: ScoredFile | None, seed: int) -> tuple[dict[str, Any], str]:
        """The official figures, per dimension."""
        table: AmberTable = own.table
        counts, figures, score = table.counts(), table.figures(), table.official_score()
        summary = {} if score is None else {"AMBER": score}
        result = {"similarity": table.similarity, "counts": counts, "figures": dict(figures), "summary": summary}
        lines = [f"AMBER, word similarity {table.similarity} (official: en_core_web_lg), {own.path}"]
        if generative := figures.pop("Generative Task", None):
            cells = [number(value, percent=False) for value in generative.values()]
            columns = ["descriptions", *generative, "empty"]
            lines.append(plain_table([columns, [str(counts["non_hallu_num"]), *cells, str(counts["empty"])]]))
        if figures:
            rows = [
                [_SPELT.get(name, name), *(number(value, percent=False) for value in group.values())]
                for name, group in figures.items()
            ]
            lines.append(plain_table([["questions", *next(iter(figures.values()))], *rows]))
            lines.append(
                f"unparsed: {counts['unparsed']} of {counts['qa_correct_num']} (neither 'Yes' nor 'No': wrong)"
            )
        return result, "\n".join([*lines, *(f"AMBER score: {value:.2f}" for value in summary.values())])


def _figures(answered_no: NDArray[np.bool_], truth_no: NDArray[np.bool_]) -> dict[str, float]:
    """Percentages, the positive class being no."""
    right = int((answered_no & truth_no).sum())
    return {
        "Accuracy": 100 * float((answered_no == truth_no).mean()),
        "Precision": 100 * right / int(answered_no.sum()) if answered_no.any() else math.nan,
        "Recall": 100 * right / int(truth_no.sum()) if truth_no.any() else math.nan,
        "F1": 200 * right / both if (both := int(answered_no.sum()) + int(truth_no.sum())) else math.nan,
    }
