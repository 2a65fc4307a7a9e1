"""CHAIR as a task: images to caption."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from ...data.samples import Answers, Sample
from ...data.write import digest, write_text
from ...stats.intervals import finite
from ..base import Task, effort
from .figures import ChairTable, invented_by_category, score_captions
from .matcher import ChairMatcher
from .text_quality import TextTable, length_matched, score_texts, text_differences, text_quality


@dataclass(frozen=True)
class ChairTask(Task):
    """Images to caption and what is in them.

    Attributes:
        samples: One per image, by image id.
        truth: Image id to its objects, in the matcher's mode.
        matcher: Finds objects in captions.
        max_new_tokens: Limit of the caption's length.
    """

    name: ClassVar[str] = "chair"

    samples: tuple[Sample, ...]
    truth: Mapping[int, frozenset[str]]
    matcher: ChairMatcher
    max_new_tokens: int

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

    def table(self, answers: Answers) -> ChairTable:
        """Count the objects of every caption."""
        return score_captions(self.captions(answers), self.truth, self.matcher)

    def text_table(self, answers: Answers) -> TextTable:
        """Repetition, truncation and endings of one method's captions."""
        truncated = {sample.image_id: answers[sample.key].truncated for sample in self.samples}
        return score_texts(self.captions(answers), truncated)

    def part(self, label: str, tables: Mapping[str, Any], answers: Mapping[str, Answers], seed: int) -> dict[str, Any]:
        """Counts, summary, truncation, and text quality with CHAIR at equal length."""
        table, own = tables[label], answers[label]
        return {
            "counts": {**table.counts(), "words": int(table.words.sum())},
            "summary": finite(table.summary()),
            "truncated": sum(own[sample.key].truncated for sample in self.samples),
            **effort(self, own, answers[next(iter(tables))]),
            "text_quality": self._quality(label, tables, answers, seed),
            "invented": invented_by_category(table),
        }

    def _quality(
        self, label: str, tables: Mapping[str, Any], answers: Mapping[str, Answers], seed: int
    ) -> dict[str, Any]:
        baseline = next(iter(tables))
        own, other = self.captions(answers[label]), self.captions(answers[baseline])
        truncated = {sample.image_id: answers[label][sample.key].truncated for sample in self.samples}
        part = text_quality(own, truncated)
        if label != baseline:
            pair = (tables[label], tables[baseline])
            part["length_matched"] = length_matched((own, other), pair, self.truth, self.matcher, seed)
            texts = (self.text_table(answers[label]), self.text_table(answers[baseline]))
            part["differences"] = text_differences(*texts, seed)
        return part

    def export(self, folder: Path, answers: Answers) -> None:
        """``chair.jsonl``: image_id and caption, one line per image."""
        rows = [{"image_id": image_id, "caption": text} for image_id, text in self.captions(answers).items()]
        write_text(folder / "chair.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
