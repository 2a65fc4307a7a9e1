"""AMBER as a task: images to describe, and yes/no questions about existence, attributes and relations."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from vlmfix.errors import DataError

from ...data.samples import Answers, Sample
from ...data.source import choose, find_file, find_image, image_number, is_dataset
from ...data.write import digest
from ...options import EvalOptions
from ...testbed import CAPTION_TOKENS
from ..base import Benchmark, distinct, write_list
from ..choice import RunData, answer_limit
from ..yes_no import parse_answer
from .data import QUERY_FILES, AmberData, AmberItem, load_amber, read_queries
from .figures import AmberTable, score_responses
from .objects import Nouns, known_lemmas, spacy_similarity, tagged_nouns

#: Of the questions; the descriptions are asked for as AMBER does. It names no prompt that makes a model answer with one
#: word (its authors compare the logits of Yes and No), so this is VLMEvalKit's.
PROMPT = "{question} Please answer yes or no."


NEW_TOKENS = 512
"""The limit of a description."""


_ANSWERS = {True: "Yes", False: "No"}


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
            known_lemmas(annotations)
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
        """Responses by item id; to a question "Yes" or "No" where just one of the words is in the answer, else it."""
        found = {}
        for query in self.queries:
            text = answers[self.sample(query).key].text
            read = None if query.item.task == "generative" else parse_answer(text, "vlmeval")
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
        return cache(tagged_nouns())

    def score(self, answers: Answers) -> AmberTable:
        """One row per description and per question, in the order of the items."""
        keys = {q.item.id: self.sample(q).key for q in self.queries}
        return score_responses(
            self.data,
            self.responses(answers),
            nouns=self._nouns if self._described else None,
            similarity=None if self.spacy is None else spacy_similarity(self.spacy),
            similarity_name=self.spacy,
            image_ids={q.item.id: image_number(self.name, q.image) for q in self.queries},
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

    def counts(self, table: AmberTable) -> dict[str, int]:
        """The official counts, with unparsed answers and empty descriptions."""
        return table.counts()

    def breakdown(self, table: AmberTable) -> dict[str, dict[str, float]]:
        """Per dimension, as the official script prints: percentages with one decimal.

        The last row answers every question by the larger one of the logits of Yes and No, as AMBER's authors do.
        """
        shown = {"Descriminative Task": "all questions", "Exsitence": "Existence"}
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


def _figures(answered_no: NDArray[np.bool_], truth_no: NDArray[np.bool_]) -> dict[str, float]:
    """Percentages, the positive class being no."""
    right = int((answered_no & truth_no).sum())
    return {
        "Accuracy": 100 * float((answered_no == truth_no).mean()),
        "Precision": 100 * right / int(answered_no.sum()) if answered_no.any() else math.nan,
        "Recall": 100 * right / int(truth_no.sum()) if truth_no.any() else math.nan,
        "F1": 200 * right / both if (both := int(answered_no.sum()) + int(truth_no.sum())) else math.nan,
    }
