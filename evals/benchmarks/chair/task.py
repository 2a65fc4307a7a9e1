"""CHAIR: objects that captions invent (Rohrbach et al. 2018, arXiv:1809.02156)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from ...data.samples import Answers, Sample
from ...data.write import digest
from ...options import EvalOptions
from ...stats.bootstrap import finite
from ...stats.table import Table
from ...testbed import CAPTION_TOKENS
from ..base import Benchmark, write_lines
from ..choice import RunData
from ..coco_objects import ChairMatcher, MarkedText, ground_truth, mark_objects
from .figures import ChairTable, invented_by_category, score_captions
from .text_quality import TextTable, length_matched, score_texts, text_differences

PROMPT = "Please describe this image in detail."

NEW_TOKENS = 512


@dataclass(frozen=True)
class Chair(Benchmark):
    """Images to caption and what is in them.

    Attributes:
        samples: One per image, by image id.
        truth: Image id to its objects, in the matcher's mode.
        matcher: Finds objects in captions.
        max_new_tokens: Limit of the caption's length.
    """

    name: ClassVar[str] = "chair"
    title: ClassVar[str] = "CHAIR"
    summary: ClassVar[str] = "objects that captions name and that are not in the image"
    figures = ChairTable.FIGURES
    matched_on: ClassVar[Mapping[str, str]] = {"early stop": "recall"}
    row_by_row: ClassVar[bool] = True
    rows_are: ClassVar[str] = "captions"
    side_names: ClassVar[tuple[str, ...]] = ("text",)

    samples: tuple[Sample, ...]
    truth: Mapping[int, frozenset[str]]
    matcher: ChairMatcher
    max_new_tokens: int

    @classmethod
    def make(cls, options: EvalOptions, data: RunData) -> Chair:
        """Images of COCO, or of the testbed, with their ground truth."""
        ids = sorted(data.coco.select(ids=data.pool, limit=data.limit(), seed=options.seed))
        prompt, matcher = options.prompt or PROMPT, ChairMatcher(options.chair_mode)  # type: ignore[arg-type]
        limit = options.max_new_tokens or CAPTION_TOKENS.get(options.model, NEW_TOKENS)
        samples = tuple(Sample(cls.name, i, data.coco.image(i).path, prompt, limit, "gaps") for i in ids)
        return cls(samples, ground_truth(data.coco, ids, matcher), matcher, limit)

    def settings(self) -> dict[str, Any]:
        """Prompt, matcher mode, length limit, image ids and a digest of the ground truth."""
        return {
            "prompt": self.samples[0].question,
            "mode": self.matcher.mode,
            "max_new_tokens": self.max_new_tokens,
            "image_ids": [sample.image_id for sample in self.samples],
            "ground_truth": digest({str(i): sorted(objects) for i, objects in self.truth.items()}),
        }

    def captions(self, answers: Answers) -> dict[int, str]:
        """One method's captions by image id."""
        return {sample.image_id: answers[sample.key].text for sample in self.samples}

    def score(self, answers: Answers) -> ChairTable:
        """Count the objects of every caption."""
        return score_captions(self.captions(answers), self.truth, self.matcher)

    def text_table(self, answers: Answers) -> TextTable:
        """Repetition, truncation and endings of one method's captions."""
        truncated = {sample.image_id: answers[sample.key].truncated for sample in self.samples}
        return score_texts(self.captions(answers), truncated)

    def side_tables(self, answers: Answers) -> Mapping[str, Table]:
        """Text quality, as ``text``."""
        return {"text": self.text_table(answers)}

    @classmethod
    def text_differences(cls, own: Mapping[str, Table], other: Mapping[str, Table], seed: int) -> dict[str, Any]:
        """Of repetition, loops and truncated captions."""
        return text_differences(own["text"], other["text"], seed) if "text" in own else {}

    def about(self) -> str:
        """Mode, captions and their limit."""
        return (
            f"CHAIR {self.matcher.mode} mode, {len(self.samples)} captions of at most {self.max_new_tokens} new tokens"
        )

    def counts(self, table: ChairTable) -> dict[str, int]:
        """The official sums, and all words."""
        return {**table.counts(), "words": int(table.words.sum())}

    def details(
        self, label: str, tables: Mapping[str, Any], answers: Mapping[str, Answers], seed: int
    ) -> dict[str, Any]:
        """Text quality with CHAIR at equal length, and what was invented."""
        table, text = tables[label], self.text_table(answers[label])
        quality: dict[str, Any] = {"counts": text.counts(), "summary": finite(text.summary())}
        baseline = next(iter(tables))
        if label != baseline:
            captions = self.captions(answers[label]), self.captions(answers[baseline])
            pair = (table, tables[baseline])
            quality["length_matched"] = length_matched(captions, pair, self.truth, self.matcher, seed)
            quality["differences"] = text_differences(text, self.text_table(answers[baseline]), seed)
        return {"text_quality": quality, "invented": invented_by_category(table)}

    def marked(self, sample: Sample, text: str) -> MarkedText:
        """The objects of a caption, invented or present."""
        return mark_objects(self.matcher, self.truth[sample.image_id], text)

    def export(self, folder: Path, answers: Answers) -> None:
        """``chair.jsonl``: image_id and caption, one line per image."""
        rows = [{"image_id": image_id, "caption": text} for image_id, text in self.captions(answers).items()]
        write_lines(folder / "chair.jsonl", rows)
