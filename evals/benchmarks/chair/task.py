"""CHAIR: objects that captions invent (Rohrbach et al. 2018, arXiv:1809.02156).

A file for ``vlmfix score chair`` holds one caption per image: the image under ``image_id`` (an integer,
``COCO_val2014_000000002239.jpg`` or ``000000002239.jpg``), ``image``, ``image_path``, ... A line that repeats an
earlier one counts once; two different captions of one image are an error. Optional on all lines: ``truncated`` (true or
false), or ``finish_reason`` ("length" where the token limit ended the caption), for the truncation rate. Without them
there is the unfinished rate only: the share of captions that do not end in final punctuation (see
:mod:`vlmfix.evals.benchmarks.chair.text_quality`).
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from vlmfix.errors import DataError, UnsupportedFeatureError, how_to_install

from ...data.answers import AnswerFile, FileAnswers, Given, cut_off_flags
from ...data.records import image_id_of
from ...data.samples import Answers, Sample
from ...data.write import digest
from ...options import EvalOptions
from ...stats.bootstrap import CONFIDENCE, finite
from ...stats.table import Table, differences
from ...tables import difference_cell, interval_cell, number, plain_table
from ...testbed import CAPTION_TOKENS
from ..base import Benchmark, ScoredFile, write_lines
from ..choice import RunData
from ..coco_objects import ChairMatcher, MarkedText, ground_truth, mark_objects
from .figures import ChairTable, invented_by_category, score_captions
from .text_quality import TextTable, length_matched, score_texts, text_differences
from .truth import MODES, GroundTruth, caption_mode, load_ground_truth

PROMPT = "Please describe this image in detail."

NEW_TOKENS = 512

_FIGURES = ("chair_s", "chair_i", "recall", "precision", "f1")

_COLUMNS = ("captions", "CHAIR_s", "CHAIR_i", "recall", "precision", "F1", "words", "tokens", "rep-4", "loops")

_LEGEND = (
    "words, tokens: mean per caption, split at spaces (POPE paper) and as in OPERA's script; rep-4: repeated runs of "
    "four words;\nloops: captions with more than half of them repeated; unfinished: without final punctuation"
)

_TOKENS_NEED = f"which needs nltk: {how_to_install('nltk')},\nthen python -m nltk.downloader punkt_tab"

_EPILOG = """\
--ground-truth takes a COCO folder (instances_val2014.json, captions_val2014.json, also below annotations/), or JSON:
  {"mode": "nltk", "objects": {"139": ["book", "chair"], ...}}    or {"139": [...]}, or lines of image_id, objects
  {"categories": [...], "objects": {"139": [14, 15], ...}}        places in the list of categories
nltk and mixed need nltk and its data:
""" + (f"  {how_to_install('nltk')}\n  python -m nltk.downloader punkt_tab averaged_perceptron_tagger_eng\n")


@dataclass(frozen=True)
class Chair(Benchmark):
    """Images to caption and what is in them.

    Attributes:
        samples: One per image, by image id.
        truth: Image id to its objects, in the matcher's mode.
        matcher: Finds objects in captions.
        max_new_tokens: Limit of the caption's length.
        source: The ground truth that a file's captions are scored with; None where a run asks for captions.
        counter: Counts a file's tokens as the official scripts do; None where nltk or its data are not there.
        cut_off: Image id to whether the token limit ended a file's caption; None if the file does not say.
    """

    name: ClassVar[str] = "chair"
    title: ClassVar[str] = "CHAIR"
    summary: ClassVar[str] = "objects that captions name and that are not in the image"
    figures = ChairTable.FIGURES
    matched_on: ClassVar[Mapping[str, str]] = {"early stop": "recall"}
    row_by_row: ClassVar[bool] = True
    rows_are: ClassVar[str] = "captions"
    side_names: ClassVar[tuple[str, ...]] = ("text",)
    file_flag: ClassVar[str] = "--captions"

    samples: tuple[Sample, ...]
    truth: Mapping[int, frozenset[str]]
    matcher: ChairMatcher
    max_new_tokens: int
    source: GroundTruth | None = None
    counter: ChairMatcher | None = None
    cut_off: Mapping[int, bool] | None = None

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
        """Count the objects of every caption, and a file's tokens."""
        captions, mode = self.captions(answers), None if self.source is None else self.source.mode
        table = score_captions(captions, self.truth, self.matcher, ground_truth_mode=mode)
        if "tokens" in table.columns or self.counter is None:
            return table
        lengths = [len(self.counter.match(captions[int(i)]).tokens) for i in table.image_ids]
        return replace(table, columns={**table.columns, "tokens": np.array(lengths, dtype=np.int64)})

    def text_table(self, answers: Answers) -> TextTable:
        """Repetition, truncation (of a file if it tells it) and endings of one method's captions."""
        truncated = self.cut_off
        if self.source is None:
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

    @classmethod
    def add_score_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Add what scoring needs to know beside the captions."""
        parser.epilog, parser.formatter_class = _EPILOG, argparse.RawDescriptionHelpFormatter
        parser.add_argument(
            "--ground-truth",
            "--data",
            type=Path,
            required=True,
            metavar="PATH",
            help="COCO folder with the annotations, or a file of objects per image",
        )
        parser.add_argument(
            "--mode",
            "--chair-mode",
            choices=MODES,
            default="original",
            help="word matching of captions and ground truth; mixed: captions nltk, ground truth original, as in "
            "OPERA's table (default: original)",
        )

    @classmethod
    def from_files(cls, path: Path, options: argparse.Namespace) -> tuple[Chair, FileAnswers]:
        """Read captions and the ground truth of their images.

        Raises:
            DataError: A file is missing or broken, or an image has no ground truth.
            UnsupportedFeatureError: The mode needs nltk, which is not installed.
        """
        file = AnswerFile.of(path, options)
        captions = read_captions(file)
        matcher = ChairMatcher(caption_mode(options.mode))
        truth = load_ground_truth(options.ground_truth, sorted(captions), options.mode)
        samples = tuple(Sample(cls.name, i, None, "") for i in sorted(captions))
        counter = matcher if matcher.exact_tokens else _token_counter()
        made = cls(samples, truth.objects, matcher, 0, truth, counter, cut_off_flags(captions))
        answers = FileAnswers(file, samples, [captions[sample.image_id].answer() for sample in samples])
        if blank := sum(not text.strip() for text in made.captions(answers).values()):
            file.notes.append(f"{blank} of {len(captions)} captions are blank, and count as captions without objects")
        return made, answers

    def _part(self, scored: ScoredFile) -> dict[str, Any]:
        """Counts and figures, the counts under the names of the official scripts' outputs.

        ``sentences`` has for each caption the objects it mentions, and the words of those that are not there.
        """
        table, quality = scored.table, scored.task.text_table(scored.answers)
        return {
            "counts": table.counts(),
            "summary": finite(table.summary()),
            "text_quality": {"counts": quality.counts(), "summary": finite(quality.summary())},
            "sentences": [
                {"image_id": int(image_id), "mentions": list(nodes), "hallucinated": list(words)}
                for image_id, nodes, words in zip(table.image_ids, table.nodes, table.hallucinated_words, strict=True)
            ],
        }

    def report_file(self, own: ScoredFile, other: ScoredFile | None, seed: int) -> tuple[dict[str, Any], str]:
        """CHAIR with text quality, and the differences to a baseline, also at equal length."""
        truth, matcher = self.source, self.matcher
        assert truth is not None, "captions of a file have a source of their ground truth"
        for each in filter(None, (own, other)):
            if not any(each.table.nodes):
                text = next(iter(self.captions(each.answers).values()))
                raise DataError(
                    f"{each.path}: no caption names an object of CHAIR's list (the first is {text[:40]!r}): there is "
                    "nothing to count in refusals, nor in another language, as the list holds English words"
                )
        mode = matcher.mode if matcher.mode == truth.mode else "mixed"
        result: dict[str, Any] = {
            "mode": mode,
            "caption_mode": matcher.mode,
            "ground_truth": {"mode": truth.mode, "source": truth.source},
            **self._part(own),
        }
        if other is None:
            table = plain_table(_rows(own))
        else:
            compared = {"file": str(other.path), **other.facts, **self._part(other)}
            result["baseline"] = {**compared, **self._compared(own, other, seed)}
            table = f"{plain_table(_rows(own, other, result['baseline']))}\n\n{_matched_table(result['baseline'])}"
        if self.counter is None:
            table += "\ntokens: not counted, " + _TOKENS_NEED
        how = f"captions {matcher.mode}, ground truth {truth.mode}"
        how = "captions and ground truth" if matcher.mode == truth.mode else how
        head = f"CHAIR, mode {mode} ({how}), {own.path}\nground truth: {truth.source}"
        return result, f"{head}\n{table}\n{_LEGEND}"

    def _compared(self, own: ScoredFile, other: ScoredFile, seed: int) -> dict[str, Any]:
        texts = (self.captions(own.answers), other.task.captions(other.answers))
        files = [(own.path, texts[0]), (other.path, texts[1])]
        for (path, captions), (their_path, theirs) in (files, files[::-1]):
            if lacking := sorted(set(captions) - set(theirs)):
                raise DataError(
                    f"{their_path} has no caption of {len(lacking)} images that {path} has one of (first: image "
                    f"{lacking[0]}); a paired comparison needs the same images in both: leave these out, or caption "
                    "them"
                )
        figures = [figure for figure in ChairTable.FIGURES if figure.name != "length_tokens"]
        found = differences(figures, own.table, other.table, seed)
        matched = length_matched(texts, (own.table, other.table), self.truth, self.matcher, seed)
        return {"differences": found, "length_matched": matched, "confidence": CONFIDENCE}


def read_captions(file: AnswerFile) -> dict[int, Given]:
    """Read one caption per image, by image id.

    Raises:
        DataError: A line has no image id or no text, or an image has two different captions.
    """
    rows = file.rows("caption file")
    found: dict[int, Given] = {}
    repeated = 0
    for given in file.given(rows):
        image_id = image_id_of(given.row.fields, given.row.where)
        first = found.setdefault(image_id, given)
        if first.text != given.text:
            raise DataError(
                f"{given.row.where}: image {image_id} has a caption already, another one on {first.row.where}; CHAIR "
                "takes one caption per image: keep only one of these lines, or score the two sets one by one"
            )
        repeated += first is not given
    file.repeats(repeated)
    return found


def _token_counter() -> ChairMatcher | None:
    """Counts tokens as the official scripts do; no figure of mode ``original`` but the length in tokens needs it."""
    try:
        return ChairMatcher("original", tokenizer="punkt")
    except (DataError, UnsupportedFeatureError):
        return None


def _rows(
    own: ScoredFile, other: ScoredFile | None = None, compared: Mapping[str, Any] | None = None
) -> list[list[str]]:
    scored = [own] if other is None else [own, other]
    cut = any(each.task.cut_off is not None for each in scored)
    rows = [["", *_COLUMNS, "unfinished", *(["cut off"] if cut else [])]]
    for name, each in zip(("", "baseline") if other is None else ("captions", "baseline"), scored, strict=False):
        figures, quality = each.table.summary(), each.task.text_table(each.answers).summary()
        cells = [str(len(each.table)), *(number(figures[key]) for key in _FIGURES)]
        cells += [number(figures[key], percent=False) for key in ("length_words", "length_tokens")]
        cells += [number(quality[key]) for key in ("repetition", "looping", "unfinished")]
        rows.append([name, *cells, *([number(quality.get("truncation"))] if cut else [])])
    if compared is not None:
        found = compared["differences"]
        shown = [(found[key], True) for key in _FIGURES] + [(found["length_words"], False)]
        for name, cell in (("difference", difference_cell), ("95 %", interval_cell)):
            cells = [cell(difference, percent=percent) for difference, percent in shown]
            rows.append([name, "", *cells, *[""] * (len(rows[0]) - 2 - len(cells))])
    return rows


def _matched_table(compared: Mapping[str, Any]) -> str:
    rows = [
        ["both cut to equal length", *(c for n in ("CHAIR_i", "CHAIR_s") for c in (n, "baseline", "diff.", "95 %"))]
    ]
    for name, title in (("words", "words: the shorter one's"), ("mentions", "mentions: as many as the fewer")):
        part, cells = compared["length_matched"][name], []
        for key in ("chair_i", "chair_s"):
            found = part[key]
            cells += [number(found["method_value"]), number(found["baseline_value"])]
            cells += [difference_cell(found["difference"]), interval_cell(found["difference"])]
        rows.append([title, *cells])
    return plain_table(rows) + "\n*: the interval (bootstrap over images, paired) excludes zero"
