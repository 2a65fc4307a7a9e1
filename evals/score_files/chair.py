"""CHAIR of captions that lie in a file, whoever generated them; no model is loaded.

The file holds one caption per image (see :mod:`vlmfix.evals.data.records`): the image under ``image_id`` (an
integer, ``COCO_val2014_000000002239.jpg`` or ``000000002239.jpg``), ``image``, ``image_path``, ...; the text under
``caption``, ``text``, ``answer``, ``response``, .... A line that repeats an earlier one counts once; two different
captions of one image are an error. Optional on all lines: ``truncated`` (true or false), or ``finish_reason`` ("length"
where the token limit ended the caption), for the truncation rate. Without them there is the unfinished rate only: the
share of captions that do not end in final punctuation (see :mod:`vlmfix.evals.benchmarks.chair.text_quality`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vlmfix.errors import DataError, UnsupportedFeatureError

from ..benchmarks.chair.figures import ChairTable, score_captions
from ..benchmarks.chair.text_quality import TextTable, length_matched, score_texts
from ..benchmarks.chair.truth import MODES, GroundTruth, ScoringMode, caption_mode, load_ground_truth
from ..benchmarks.coco_objects import ChairMatcher
from ..data.records import answer_of, image_id_of, read_rows
from ..data.write import SCHEMA_VERSION, write_json
from ..stats.intervals import CONFIDENCE, finite, interval_dict
from ..tables import difference_cell, interval_cell, number, plain_table

_FIGURES = ("chair_s", "chair_i", "recall", "precision", "f1")


_COLUMNS = ("captions", "CHAIR_s", "CHAIR_i", "recall", "precision", "F1", "words", "tokens", "rep-4", "loops")


_LEGEND = (
    "words, tokens: mean per caption, split at spaces (POPE paper) and as in OPERA's script; rep-4: repeated runs of "
    "four words;\nloops: captions with more than half of them repeated; unfinished: without final punctuation"
)


@dataclass(frozen=True)
class Captions:
    """The captions of a file.

    Attributes:
        path: The file.
        texts: Image id -> caption.
        truncated: Image id -> whether the token limit ended it; None if the file does not say.
        repeated: Lines left out because they repeat an earlier one.
    """

    path: Path
    texts: Mapping[int, str]
    truncated: Mapping[int, bool] | None
    repeated: int


@dataclass(frozen=True)
class Scored:
    """A file's captions with their tables."""

    captions: Captions
    table: ChairTable
    quality: TextTable

    def result(self) -> dict[str, Any]:
        """Counts and figures for JSON, the counts under the names of the official scripts' outputs.

        ``sentences`` has for each caption the objects it mentions, and the words of those that are not there.
        """
        return {
            "counts": self.table.counts(),
            "summary": finite(self.table.summary()),
            "text_quality": {"counts": self.quality.counts(), "summary": finite(self.quality.summary())},
            "repeated_lines": self.captions.repeated,
            "sentences": [
                {"image_id": int(image_id), "mentions": list(nodes), "hallucinated": list(words)}
                for image_id, nodes, words in zip(
                    self.table.image_ids, self.table.nodes, self.table.hallucinated_words, strict=True
                )
            ],
        }


def read_captions(path: Path, *, text_key: str | None = None) -> Captions:
    """Read one caption per image.

    Args:
        path: The file, as the module says.
        text_key: Where the caption is, if not under a usual name.

    Raises:
        DataError: A line has no image id or no text, or an image has two different captions.
    """
    places: dict[int, str] = {}
    texts: dict[int, str] = {}
    flags: dict[int, bool | None] = {}
    repeated = 0
    for where, row in read_rows(path, what="caption file"):
        image_id, text = image_id_of(row, where), answer_of(row, where, text_key)
        if image_id in texts:
            if texts[image_id] != text:
                raise DataError(
                    f"{where}: image {image_id} has a caption already, another one on {places[image_id]}; CHAIR takes "
                    "one caption per image: leave one of the lines, or score the two sets one by one"
                )
            repeated += 1
            continue
        places[image_id], texts[image_id], flags[image_id] = where, text, _cut_off(row, where)
    known = {i: flag for i, flag in flags.items() if flag is not None}
    if known and len(known) < len(flags):
        lacking = next(places[i] for i, flag in flags.items() if flag is None)
        raise DataError(
            f"{lacking}: expected 'truncated' or 'finish_reason' as on other lines: give it on all, or none"
        )
    return Captions(path, texts, known or None, repeated)


def _cut_off(row: Mapping[str, Any], where: str) -> bool | None:
    flag, reason = row.get("truncated"), row.get("finish_reason")
    if flag is not None and not isinstance(flag, bool):
        raise DataError(f"{where}: expected true or false in 'truncated', found {str(flag)[:40]!r}")
    return flag if flag is not None else None if reason is None else reason == "length"


def score_chair_file(
    path: Path,
    ground_truth: Path,
    *,
    mode: str = "original",
    text_key: str | None = None,
    baseline: Path | None = None,
    out: Path | None = None,
    seed: int = 0,
) -> str:
    """Score captions with CHAIR.

    Args:
        path: The captions, see :func:`read_captions`.
        ground_truth: COCO folder (only its annotation files are read), or a file; see
            :mod:`vlmfix.evals.benchmarks.chair.truth`.
        mode: ``"original"``, ``"nltk"`` or ``"mixed"``, see :mod:`vlmfix.evals.benchmarks.chair.truth`.
        text_key: Where the text of a line is, if not under a usual name.
        baseline: Captions of the same images to compare with: paired differences, and CHAIR at equal length.
        out: Where to write figures and integer counts as JSON, if anywhere.
        seed: Seed of the bootstrap.

    Returns:
        A plain-text table.

    Raises:
        DataError: A file is missing or broken, the two files are not about the same images, or an image has no ground
            truth.
        UnsupportedFeatureError: The mode needs nltk, which is not installed.
    """
    if mode not in MODES:
        raise DataError(f"CHAIR is scored in mode {', '.join(MODES)}, not {mode!r}")
    scoring: ScoringMode = mode  # type: ignore[assignment]
    captions = read_captions(path, text_key=text_key)
    other = None if baseline is None else read_captions(baseline, text_key=text_key)
    if other is not None:
        _check_same_images(captions, other)
    matcher = ChairMatcher(caption_mode(scoring))
    truth = load_ground_truth(ground_truth, sorted(captions.texts), scoring)
    counter = matcher if matcher.exact_tokens else _token_counter()
    own = _scored(captions, truth, matcher, counter)
    result = {
        "benchmark": "chair",
        "mode": mode,
        "caption_mode": matcher.mode,
        "ground_truth": {"mode": truth.mode, "source": truth.source},
        **own.result(),
    }
    text = _head(mode, matcher, truth, own)
    if other is None:
        table = plain_table(_rows(own))
    else:
        reference = _scored(other, truth, matcher, counter)
        result["baseline"] = {
            "file": str(baseline),
            **reference.result(),
            **_compared(own, reference, truth, matcher, seed),
        }
        table = f"{plain_table(_rows(own, reference, result['baseline']))}\n\n{_matched_table(result['baseline'])}"
    if counter is None:
        table += "\ntokens: not counted, " + _TOKENS_NEED
    write_result(out, path, result)
    return f"{text}\n{table}\n{_LEGEND}"


_TOKENS_NEED = "which needs nltk: pip install 'vlmfix[nltk]' && python -m nltk.downloader punkt_tab"


def _token_counter() -> ChairMatcher | None:
    """Counts tokens as the official scripts do; no figure of mode ``original`` but the length in tokens needs it."""
    try:
        return ChairMatcher("original", tokenizer="punkt")
    except (DataError, UnsupportedFeatureError):
        return None


def _scored(captions: Captions, truth: GroundTruth, matcher: ChairMatcher, counter: ChairMatcher | None) -> Scored:
    table = score_captions(captions.texts, truth.objects, matcher, ground_truth_mode=truth.mode)
    if "tokens" not in table.columns and counter is not None:
        lengths = [len(counter.match(captions.texts[int(i)]).tokens) for i in table.image_ids]
        table = dataclasses.replace(table, columns={**table.columns, "tokens": np.array(lengths, dtype=np.int64)})
    return Scored(captions, table, score_texts(captions.texts, captions.truncated))


def _check_same_images(captions: Captions, other: Captions) -> None:
    for own, theirs in ((captions, other), (other, captions)):
        lacking = sorted(set(own.texts) - set(theirs.texts))
        if lacking:
            raise DataError(
                f"{theirs.path} has no caption of {len(lacking)} images that {own.path} has one of (first: image "
                f"{lacking[0]}); a paired comparison needs the same images in both: leave these out, or caption them"
            )


def _compared(own: Scored, reference: Scored, truth: GroundTruth, matcher: ChairMatcher, seed: int) -> dict[str, Any]:
    differences = {
        figure.name: interval_dict(figure.statistic.difference(own.table, reference.table, seed=seed))
        for figure in ChairTable.FIGURES
        if figure.name != "length_tokens"
    }
    texts = (own.captions.texts, reference.captions.texts)
    matched = length_matched(texts, (own.table, reference.table), truth.objects, matcher, seed)
    return {"differences": differences, "length_matched": matched, "confidence": CONFIDENCE}


def _head(mode: str, matcher: ChairMatcher, truth: GroundTruth, own: Scored) -> str:
    how = (
        "captions and ground truth"
        if matcher.mode == truth.mode
        else f"captions {matcher.mode}, ground truth {truth.mode}"
    )
    lines = [f"CHAIR, mode {mode} ({how}), {own.captions.path}", f"ground truth: {truth.source}"]
    if own.captions.repeated:
        lines.append(f"{own.captions.repeated} lines repeat an earlier one word for word: counted once")
    return "\n".join(lines)


def _rows(own: Scored, reference: Scored | None = None, compared: Mapping[str, Any] | None = None) -> list[list[str]]:
    scored = [own] if reference is None else [own, reference]
    cut = any(each.captions.truncated is not None for each in scored)
    rows = [["", *_COLUMNS, "unfinished", *(["cut off"] if cut else [])]]
    for name, each in zip(("", "baseline") if reference is None else ("captions", "baseline"), scored, strict=False):
        figures, quality = each.table.summary(), each.quality.summary()
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


def write_result(out: Path | None, path: Path, result: Mapping[str, Any]) -> None:
    """Write figures and counts as JSON to ``out``, if it is given; ``path`` is the file they were scored from."""
    if out is not None:
        write_json(out, {"schema_version": SCHEMA_VERSION, "file": str(path), **result})
