"""AMBER as a task: images to describe, and yes/no questions about existence, attributes and relations."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from vlmfix.errors import DataError

from ...data.samples import Answers, Sample
from ...data.source import choose, find_file, find_image, image_number, is_dataset
from ...data.write import digest
from ..base import Scored, ScoredTask, Stopper, distinct, write_list
from ..chair.early_stop import StopCurve
from ..yes_no import parse_answer
from .data import AmberData, AmberItem, load_amber, read_json
from .figures import AmberTable, score_responses
from .objects import description_counter, spacy_similarity, tagged_nouns

#: Of the questions; the descriptions are asked for as AMBER does. It names no prompt that makes a model answer with one
#: word (its authors compare the logits of Yes and No), so this is VLMEvalKit's.
PROMPT = "{question} Please answer yes or no."


NEW_TOKENS = 16


_ANSWERS = {True: "Yes", False: "No"}


@dataclass(frozen=True)
class AmberQuery:
    """One item to ask.

    Attributes:
        item: Its annotation.
        image: File name of the image.
        path: Its file.
        text: The query.
    """

    item: AmberItem
    image: str
    path: Path
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
    path = find_file(root, ["query_all.json", "query/query_all.json"], "queries")
    rows = read_json(path)
    try:
        asked = {int(row["id"]): (str(row["image"]), str(row["query"])) for row in rows}
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: expected a JSON list of objects with id, image and query ({error!r})") from error
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
class AmberTask(ScoredTask):
    """AMBER's items, or those of some of its images.

    Attributes:
        queries: The items, in their order.
        data: The annotations of these items.
        max_new_tokens: Limits of a description's and of an answer's length.
        spacy: Model of the word similarity, or None for exact words only.
    """

    name: ClassVar[str] = "amber"
    scoring: ClassVar[tuple[str, ...]] = ("similarity",)

    queries: tuple[AmberQuery, ...]
    data: AmberData = field(repr=False)
    max_new_tokens: tuple[int, int]
    spacy: str | None = None

    @classmethod
    def make(
        cls,
        where: str,
        *,
        limit: int | None,
        seed: int,
        prompt: str | None,
        max_new_tokens: tuple[int, int],
        spacy: str | None = None,
    ) -> AmberTask:
        """Read the items and choose at most ``limit`` images, with all that is asked about them."""
        data, queries = load_queries(where)
        kept = set(choose((q.image for q in queries), limit, seed))
        queries = [q for q in queries if q.image in kept]
        data = replace(data, items={q.item.id: q.item for q in queries})
        if any(q.item.task == "generative" for q in queries):
            tagged_nouns()  # A missing tagger is found here, not after the last description.
        if spacy is not None:
            spacy_similarity(spacy)  # Likewise a missing model.
        prompt = prompt or PROMPT
        samples = [_sample(q, prompt, max_new_tokens) for q in queries]
        return cls(distinct(samples), prompt, tuple(queries), data, max_new_tokens, spacy)

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
            text = answers[_sample(query, self.prompt, self.max_new_tokens).key].text
            read = None if query.item.task == "generative" else parse_answer(text, "vlmeval")
            found[query.item.id] = text if read is None else _ANSWERS[read]
        return found

    def table(self, answers: Answers) -> Scored:
        """One row per description and per question, in the order of the items."""
        similarity = None if self.spacy is None else spacy_similarity(self.spacy)
        native = score_responses(self.data, self.responses(answers), similarity=similarity, similarity_name=self.spacy)
        queries = {q.item.id: q for q in self.queries}
        ids = [*native.caption_ids.tolist(), *native.question_ids.tolist()]
        asked = [queries[i] for i in ids]
        return Scored(
            image_ids=np.asarray([image_number(self.name, q.image) for q in asked], dtype=np.int64),
            splits=tuple(q.item.task for q in asked),
            items=tuple(str(i) for i in ids),
            columns={**_columns(native), "margin": self._margins(native, answers)},
            benchmark=self.name,
            native=native,
        )

    def stopper(self, answers: Answers, decode: Callable[[list[int]], str]) -> Stopper | None:
        """The descriptions, ended earlier; the questions stay as they are."""
        asked = {
            q.item.id: _sample(q, self.prompt, self.max_new_tokens) for q in self.queries if q.item.task == "generative"
        }
        if not any(self.data.items[i].truth for i in asked):
            return None
        given = {i: answers[sample.key] for i, sample in asked.items()}
        curve = StopCurve(
            {i: answer.tokens for i, answer in given.items()},
            {i: answer.eos_gaps for i, answer in given.items()},
            decode,
            {i: len(self.data.items[i].truth) for i in given},
            description_counter(self.data, similarity=None if self.spacy is None else spacy_similarity(self.spacy)),
        )

        def at(cover: float) -> tuple[float, Scored]:
            bias, cut, _ = curve.cut(cover)
            shorter = {asked[i].key: replace(given[i], text=text) for i, text in cut.items()}
            return bias, self.table({**answers, **shorter})

        return at

    def _margins(self, native: AmberTable, answers: Answers) -> NDArray[np.float64]:
        """Logit of yes minus that of no at the first token of every answer; NaN where it was not recorded."""
        found = {q.item.id: answers[_sample(q, self.prompt, self.max_new_tokens).key].score for q in self.queries}
        given = [found[i] for i in native.question_ids.tolist()]
        scores = [np.nan if score is None else score for score in given]
        return np.asarray([*[np.nan] * len(native.caption_ids), *scores], dtype=np.float64)

    def about(self, table: Scored | None) -> str:
        """Items, images, similarity and how answers are read."""
        described = sum(q.item.task == "generative" for q in self.queries)
        images = len({q.image for q in self.queries})
        return (
            f"AMBER: {described} descriptions, {len(self.queries) - described} questions on {images} images; word "
            f"similarity {self.spacy or 'none, exact words only'} (official: en_core_web_lg); F1 of the answer no; "
            "an answer is read as Yes or No if just one of the words is in it"
        )

    def counts(self, table: Scored) -> dict[str, Any]:
        """The official counts, with unparsed answers and empty descriptions."""
        native: AmberTable = table.native
        return native.counts()

    def breakdown(self, table: Scored) -> dict[str, dict[str, float]]:
        """Per dimension, as the official script prints: percentages with one decimal.

        The last row answers every question by the larger one of the logits of Yes and No, as AMBER's authors do.
        """
        shown = {"Descriminative Task": "all questions", "Exsitence": "Existence"}
        figures: Mapping[str, Mapping[str, float]] = table.native.figures()
        found = {shown.get(k, k): dict(v) for k, v in figures.items() if k != "Generative Task"}
        asked = np.flatnonzero(table.questions)
        if len(asked) and np.isfinite(table.margin[asked]).all():
            found["all questions, by logits"] = _figures(table.margin[asked] <= 0, ~table.label[asked])
        return found

    def questions(self, table: Scored) -> NDArray[np.int64]:
        """The rows that are not descriptions."""
        return np.flatnonzero(table.questions)

    def export(self, folder: Path, answers: Answers) -> None:
        """``amber.json``: id and response of every item, as the official script reads."""
        write_list(
            folder / "amber.json", [{"id": i, "response": text} for i, text in sorted(self.responses(answers).items())]
        )


def _sample(query: AmberQuery, prompt: str, limits: tuple[int, int]) -> Sample:
    number = image_number("amber", query.image)
    if query.item.task == "generative":
        return Sample("amber", number, query.path, query.text, limits[0], "gaps")
    return Sample("amber", number, query.path, prompt.replace("{question}", query.text), limits[1])


def _figures(answered_no: NDArray[np.bool_], truth_no: NDArray[np.bool_]) -> dict[str, float]:
    """Percentages, the positive class being no."""
    right = int((answered_no & truth_no).sum())
    return {
        "Accuracy": 100 * float((answered_no == truth_no).mean()),
        "Precision": 100 * right / int(answered_no.sum()) if answered_no.any() else math.nan,
        "Recall": 100 * right / int(truth_no.sum()) if truth_no.any() else math.nan,
        "F1": 200 * right / both if (both := int(answered_no.sum()) + int(truth_no.sum())) else math.nan,
    }


def _columns(native: AmberTable) -> dict[str, NDArray[Any]]:
    """The columns of descriptions, then those of questions, with nothing in the rows of the other kind."""
    n, m = len(native.caption_ids), len(native.question_ids)

    def described(values: Any) -> NDArray[Any]:
        return np.concatenate([np.asarray(values), np.zeros(m, dtype=np.asarray(values).dtype)])

    def answered(values: Any) -> NDArray[Any]:
        return np.concatenate([np.zeros(n, dtype=np.asarray(values).dtype), np.asarray(values)])

    label, prediction = native.label, native.prediction
    return {
        "descriptions": described(np.ones(n, dtype=np.bool_)),
        "nouns": described(native.nouns),
        "hallucinated": described(native.hallucinated),
        "hallucinating": described(native.hallucinated > 0),
        "covered": described(native.covered),
        "truth_objects": described(native.truth_objects),
        "cognitive": described(native.cognitive),
        "cognitive_objects": described(native.cognitive_objects),
        "questions": answered(np.ones(m, dtype=np.bool_)),
        "label": answered(label),
        "prediction": answered(prediction),
        "correct": answered(prediction == label),
        "unparsed": answered(prediction < 0),
        "right_no": answered((prediction == 0) & ~label),
        "answered_no": answered(prediction == 0),
        "truth_no": answered(~label),
    }
