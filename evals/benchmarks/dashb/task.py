"""DASH-B: is the object in an image that only suggests it (DASH, Augustin et al. 2025, arXiv:2503.23573)?

Half of the images were retrieved because models see an object there that is not. The official rule reads an answer: yes
if "yes" is anywhere in it, else no if "no" is, else neither, which is wrong.

    TNR = images without the object answered no / images without it,  TPR = with it answered yes / images with it
    harmonic mean = 2 TPR TNR / (TPR + TNR)

``vlmfix score dashb`` takes the official answers: rows of img_id, object_name, gt, response and answer (what the rule
made of the response), or with question_id. Without ``--questions`` the rows' ``gt`` is the right answer.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from vlmfix.errors import DataError

from ...data.answers import AnswerFile, FileAnswers, yes_no
from ...data.matching import Asked, Row
from ...data.samples import Answers
from ...data.source import image_number
from ...stats.bootstrap import FloatArray, finite
from ...stats.figures import Auc, Column, Figure, SumStatistic, divide, one, share, stacked
from ...stats.table import Table
from ...tables import number, plain_table
from ..base import ScoredFile, write_list
from ..questions import Questions
from ..yes_no import ACCURACY, CELLS, YES_RATIO, parse_answer, says_yes, yes_no_columns
from .data import SIDES, DashImage, Images, distinct_images, load_images, named, read_questions

IMAGES_PER_SIDE = 1341
"""Images of the release without the object, and as many with it."""


def _sides(table: Any) -> FloatArray:
    label = np.asarray(table.label, dtype=np.bool_)
    return stacked(table.correct & ~label, ~label, table.correct & label, label)


def _harmonic_mean(sums: FloatArray) -> FloatArray:
    tnr, tpr = (divide(sums[..., i], sums[..., i + 1]) for i in (0, 2))
    return divide(2 * tnr * tpr, tnr + tpr)


@dataclass(frozen=True, eq=False)
class DashTable(Table):
    """One row per image; its splits are the objects, its columns those of yes/no answers."""

    FIGURES: ClassVar[tuple[Figure, ...]] = (
        Figure(
            "tnr",
            "TNR",
            1,
            share(lambda t: t.correct & ~t.label, lambda t: ~t.label),
            headline=True,
            help="images without the object that are answered no",
        ),
        Figure(
            "tpr",
            "TPR",
            1,
            share(lambda t: t.correct & t.label, "label"),
            headline=True,
            help="images with the object that are answered yes; no to everything makes TNR 100",
        ),
        Figure("accuracy", "accuracy", 1, ACCURACY, control="yes bias", head_control=True, help="right answers"),
        Figure("harmonic_mean", "harmonic mean", 1, SumStatistic(_sides, _harmonic_mean), help="of TNR and TPR"),
        Figure("yes_ratio", "yes", 0, YES_RATIO, help="answers that say yes"),
        Figure("auc", "AUC", 1, Auc(), column=False),
    )
    COUNTS: ClassVar[Mapping[str, Column]] = {
        "n": one,
        "negatives": lambda t: ~t.label,
        "positives": "label",
        "correct": "correct",
        **CELLS,
        "yes": says_yes,
        "unparsed": "unparsed",
    }

    def tnr_of_objects(self) -> float:
        """Mean TNR of the objects, NaN without an image that lacks its object."""
        found = [part.summary()["tnr"] for part in self.by_split().values() if not part.label.all()]
        return float(np.mean(found)) if found else float("nan")


def score_answers(
    images: Sequence[DashImage], answers: Sequence[str], scores: Sequence[float | None] = ()
) -> DashTable:
    """Score answers.

    Args:
        images: In any order, each once.
        answers: One per image.
        scores: Yes-minus-no logits of the answers, if there are any.

    Raises:
        DataError: there is no image, or one stands twice.
    """
    distinct_images(images, "the answers to DASH-B")
    read = [parse_answer(text, "repope") for text in answers]  # The authors' rule for both benchmarks.
    return DashTable(
        np.asarray([image_number("dashb", image.picture) for image in images], dtype=np.int64),
        yes_no_columns([image.label for image in images], read, scores),
        tuple(image.object_name for image in images),
        tuple(image.text for image in images),
    )


@dataclass(frozen=True)
class DashB(Questions):
    """The images of DASH-B, or some of them; ``--limit`` is so many without and as many with their object."""

    name: ClassVar[str] = "dashb"
    title: ClassVar[str] = "DASH-B"
    summary: ClassVar[str] = "objects that are not there, in images that suggest them"
    figures = DashTable.FIGURES
    matched_on: ClassVar[Mapping[str, str]] = {"yes bias": "yes_ratio"}
    row_by_row: ClassVar[bool] = True
    prompt_template: ClassVar[str] = "{question} Please answer only with yes or no."
    identified_by: ClassVar[tuple[str, ...]] = ("picture", "text")
    limit_per: ClassVar[str] = "side"

    asked: tuple[DashImage, ...]

    @classmethod
    def load(cls, where: str) -> list[DashImage]:
        """Read the images' names and find their files.

        Args:
            where: The repository's folder, with ``images/dash_benchmark_neg.json``, ``..._pos.json`` and
                ``images/neg/SOURCE/OBJECT/FILE``; or a data set with dataset, object, answer, img_id and image.

        Raises:
            DataError: A list or an image is missing or broken.
        """
        return load_images(where)

    def score(self, answers: Answers) -> DashTable:
        """One row per image."""
        return score_answers(self.asked, self.texts(answers), self.scores(answers))

    def about(self) -> str:
        """Images of both halves, and objects."""
        there = sum(image.label for image in self.asked)
        objects = len({image.object_name for image in self.asked})
        return f"DASH-B: {len(self.asked) - there} images without and {there} with the object, {objects} objects"

    def breakdown(self, table: DashTable) -> dict[str, dict[str, float]]:
        """TNR and TPR per object."""
        found = {name: part.summary() for name, part in table.by_split().items()}
        return {name: {"TNR": 100 * part["tnr"], "TPR": 100 * part["tpr"]} for name, part in found.items()}

    def details(
        self, label: str, tables: Mapping[str, Any], answers: Mapping[str, Answers], seed: int
    ) -> dict[str, Any]:
        """The mean TNR of the objects."""
        return finite({"tnr_of_objects": tables[label].tnr_of_objects()})

    def export(self, folder: Path, answers: Answers) -> None:
        """``dashb_answers.json``: the official list, with the source too, without which names are not unique."""
        rows = []
        for image, text in zip(self.asked, self.texts(answers), strict=True):
            read = parse_answer(text, "repope")
            rows.append(
                {
                    **({"question_id": int(image.question_id)} if image.question_id.isdecimal() else {}),
                    **({"dataset": image.source} if image.source else {}),
                    "img_id": image.file,
                    "object_name": image.object_name,
                    "gt": "yes" if image.label else "no",
                    "response": text,
                    "answer": None if read is None else "yes" if read else "no",
                }
            )
        write_list(folder / "dashb_answers.json", rows)

    @classmethod
    def add_score_arguments(cls, parser: ArgumentParser) -> None:
        """Add the files of questions."""
        parser.add_argument(
            "--questions",
            type=Path,
            nargs="+",
            metavar="FILE",
            help="dash_benchmark_neg.json and ..._pos.json, or the data set's rows (default: gt beside the answers)",
        )

    @classmethod
    def from_files(cls, path: Path, options: Namespace) -> tuple[DashB, FileAnswers]:
        """Read answers and the images that they are about.

        Raises:
            DataError: A row names no image, or another's; or images lack an answer and ``--subset`` is not typed.
        """
        file = AnswerFile.of(path, options)
        file.usual = ("response",)
        rows = file.rows()
        if options.questions:
            images = read_questions(options.questions)
            known = Images(images)
            rows = [_with_id(row, known.of(row)) for row in rows]
        else:
            rows = file.distinct(rows)
            images = [_own(row, label) for row, label in zip(rows, file.labels(rows), strict=True)]
            rows = [_with_id(row, image) for row, image in zip(rows, images, strict=True)]
            images = list({image.picture: image for image in images}.values())
        asked = [Asked((image.picture,), truth=yes_no(image.label), kind="image") for image in images]
        found = file.matched(rows, asked, fields=("picture",), remedy="--subset scores those that are there")
        if not options.questions:
            _is_whole(file, [images[i] for i in found])
        given = file.given(list(found.values()), [asked[i] for i in found], lambda text: {parse_answer(text, "repope")})
        if file.text_key is None and file.facts.get("text_key") == "answer":
            raise DataError(
                f"{path}: 'answer' is the right answer in DASH-B's data set, and what a rule read in its answer files: "
                "give the model's words as 'response', or say --text-key answer if they are"
            )
        return cls.answered(file, [images[i] for i in found], [each.answer() for each in given])

    def report_file(self, own: ScoredFile, other: ScoredFile | None, seed: int) -> tuple[dict[str, Any], str]:
        """The official figures, and the mean TNR of the objects."""
        table: DashTable = own.table
        figures, counts = table.summary(), table.counts()
        names = {f.name: f.title for f in table.FIGURES if f.name in figures}
        of_objects = table.tnr_of_objects()
        columns = ["images", *names.values(), "TNR of objects", "unparsed"]
        values = [str(counts["n"]), *(number(figures[name]) for name in names), number(of_objects)]
        lines = [f"DASH-B, {own.path}", plain_table([columns, [*values, str(counts["unparsed"])]])]
        if not counts["negatives"] or not counts["positives"] or counts["negatives"] != counts["positives"]:
            lines.append("the halves are not equal: the accuracy is that of all images, not the mean of TNR and TPR")
        result = {"counts": counts, "summary": finite(figures), "breakdown": self.breakdown(table)}
        result["breakdown"] = {name: finite(row) for name, row in result["breakdown"].items()}
        return {**result, **finite({"tnr_of_objects": of_objects})}, "\n".join(lines)


def _own(row: Row, label: bool) -> DashImage:
    """The image that a row names, with the right answer that it brings."""
    name, file, source = named(row)
    if not name or not file:
        raise DataError(f"{row.where}: expected object_name and img_id, because names of files are not unique")
    return DashImage(label, source, name, file)


def _with_id(row: Row, image: DashImage) -> Row:
    """The row with what identifies its image."""
    return Row(row.where, {**row.fields, "picture": image.picture})


def _is_whole(file: AnswerFile, images: Sequence[DashImage]) -> None:
    """Refuse less than the release where no list says what there is."""
    there = {side: sum(image.side == side for image in images) for side in SIDES.values()}
    if set(there.values()) != {IMAGES_PER_SIDE} and not file.subset:
        raise DataError(
            f"{file.path} answers {there['neg']} images without and {there['pos']} with the object, of "
            f"{IMAGES_PER_SIDE} each: answer them all, give --questions, or type --subset to score what is there"
        )
    file.covers({f"images of {side}": (count, IMAGES_PER_SIDE) for side, count in there.items()})
