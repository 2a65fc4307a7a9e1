"""MMHal-Bench as a task: open questions, whose answers a judge rates.

In a file for ``vlmfix score mmhal`` rows find their questions by ``index`` (from 0), or by ``image_id`` and
``question``, or by order if asked to. Rows with ``rating`` (0 to 6) or ``judgement`` (text with "Rating: N") are
scored. Rows with the model's answer only cannot be: the requests to a judge are written instead.
"""

from __future__ import annotations

import shlex
import subprocess
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from vlmfix.errors import DataError, VlmfixError

from ...data.answers import AnswerFile, FileAnswers
from ...data.matching import Asked
from ...data.model_text import word
from ...data.records import text_of
from ...data.samples import Answer, Answers, Records
from ...data.source import dataset_rows, find_file, find_image, is_dataset, own_image
from ...data.write import digest, write_text
from ...options import EvalOptions
from ...tables import number, plain_table
from ...testbed import default_cache_dir
from ..base import ScoredFile, write_lines, write_list
from ..choice import RunData
from ..questions import Questions, add_question_file
from .figures import (
    MAX_RATING,
    TYPES,
    MmhalItem,
    MmhalTable,
    judge_prompt,
    load_mmhal,
    read_items,
    score_judgements,
)

_JUDGEMENT_KEYS = ("judgement", "judgment", "evaluation")


@dataclass(frozen=True)
class Judge:
    """Who rates answers.

    Attributes:
        name: For the table; the figures depend on it.
        ask: From a prompt to the judgement.
    """

    name: str
    ask: Callable[[str], str] = field(compare=False)

    @classmethod
    def of(cls, options: EvalOptions) -> Judge | None:
        """The judge that the options of a run name, if any."""
        if isinstance(options.judge, str):
            return cls.of_command(options.judge, options.judge_name)
        return None if options.judge is None else cls(str(options.judge_name), options.judge)

    @classmethod
    def of_command(cls, command: str, name: str | None = None) -> Judge:
        """A command that reads the prompt from its standard input and writes the judgement.

        Args:
            command: The command line.
            name: Of the judge; default the command.

        Raises:
            VlmfixError: The command is empty.
        """
        words = shlex.split(command)
        if not words:
            raise VlmfixError("--judge expects a command that reads a prompt and writes a judgement")

        def ask(prompt: str) -> str:
            try:
                done = subprocess.run(words, input=prompt, capture_output=True, text=True, check=True)
            except (OSError, subprocess.CalledProcessError) as error:
                said = str(getattr(error, "stderr", "") or error).strip().splitlines()
                raise VlmfixError(
                    f"--judge {command}: {said[-1] if said else error}; the answers are kept, so type the same command "
                    "again once it works, or leave --judge out"
                ) from error
            return done.stdout

        return cls(name or command, ask)

    def judge(self, prompt: str) -> str:
        """The judgement of a prompt; each is asked for once and kept in the cache folder."""
        path = default_cache_dir().parent / "judgements" / f"{digest([self.name, prompt])}.txt"
        if not path.is_file():
            write_text(path, self.ask(prompt))
        return path.read_text(encoding="utf-8")


@dataclass(frozen=True)
class Mmhal(Questions):
    """The questions of MMHal-Bench, or some of them.

    Attributes:
        judge: Who rates the answers; without one they are not scored.
        judgements: What a judge wrote about each answer of a file.
        judged_by: Name of that judge; empty if the user does not say.
        requests: Where the requests to a judge about a file's answers go.
    """

    name: ClassVar[str] = "mmhal"
    title: ClassVar[str] = "MMHal-Bench"
    summary: ClassVar[str] = "open questions, whose answers a judge rates"
    figures = MmhalTable.FIGURES
    scoring: ClassVar[tuple[str, ...]] = ("judge",)
    identified_by: ClassVar[tuple[str, ...]] = ("index", "image_id", "text")
    new_tokens: ClassVar[int] = 256
    records: ClassVar[Records] = "text"

    asked: tuple[MmhalItem, ...]
    judge: Judge | None = None
    judgements: tuple[str, ...] = ()
    judged_by: str = ""
    requests: Path = Path()

    @classmethod
    def load(cls, where: str) -> list[MmhalItem]:
        """Read the questions and find their images.

        Args:
            where: A folder with ``response_template.json`` and the images, under their OpenImages id or the name in
                their address, also below ``images``; or a data set with the template's fields and an image, in its
                order.

        Raises:
            DataError: A file is missing or broken, or an image is missing.
        """
        found = []
        if is_dataset(where):
            rows = list(dataset_rows(where))
            for item, (place, row) in zip(read_items(rows), rows, strict=True):
                found.append(replace(item, path=own_image(row, place)))
            return found
        folder = Path(where)
        for item in load_mmhal(find_file(folder, ["response_template.json"], "questions")):
            names = [f"{item.image_id}{suffix}" for suffix in (".jpg", ".png")]
            names.append(str(item.row.get("image_src", item.image_id)).rpartition("/")[2])
            found.append(replace(item, path=find_image([folder / "images", folder], names, f"question {item.index}")))
        return found

    @classmethod
    def make(cls, options: EvalOptions, data: RunData) -> Mmhal:
        """Read the questions, choose at most ``--limit``, and see who judges."""
        return replace(super().make(options, data), judge=Judge.of(options))

    def settings(self) -> dict[str, Any]:
        """Prompt, length limit, judge and a digest of the questions."""
        return {**super().settings(), "judge": None if self.judge is None else self.judge.name}

    def _requests(self, answers: Answers) -> list[dict[str, Any]]:
        """What a judge is asked about each answer."""
        given = zip(self.asked, self.texts(answers), strict=True)
        return [{"index": item.index, "prompt": judge_prompt(item, text)} for item, text in given]

    def score(self, answers: Answers) -> MmhalTable | None:
        """One row per question, or None if nobody judges the answers."""
        if self.judgements:
            return score_judgements(self.asked, self.judgements, judge=self.judged_by or "unnamed")
        if self.judge is None:
            return None
        said = [self.judge.judge(request["prompt"]) for request in self._requests(answers)]
        return score_judgements(self.asked, said, judge=self.judge.name)

    def about(self) -> str:
        """Questions and judge."""
        if self.judge is None:
            return (
                f"MMHal-Bench: {len(self.asked)} questions, not scored, because there is no judge; what to ask one is "
                "in official/METHOD/mmhal.judge.jsonl, and --judge COMMAND --rescore --out FOLDER asks it"
            )
        return (
            f"MMHal-Bench: {len(self.asked)} questions, rated by {self.judge.name} (official: gpt-4-0314) with an "
            "instruction of ours"
        )

    def breakdown(self, table: MmhalTable) -> dict[str, dict[str, float]]:
        """Average rating per type of question."""
        return {kind: {"score/6": value} for kind, value in table.by_type().items()}

    def export(self, folder: Path, answers: Answers) -> None:
        """``mmhal.json``: the template filled in, as the official script reads; and the requests to a judge."""
        given = zip(self.asked, self.texts(answers), strict=True)
        write_list(folder / "mmhal.json", [{**item.row, "model_answer": text} for item, text in given])
        write_lines(folder / "mmhal.judge.jsonl", self._requests(answers))

    @classmethod
    def add_score_arguments(cls, parser: ArgumentParser) -> None:
        """Add the file of questions, and what is to be known about a judge."""
        add_question_file(parser, "response_template.json")
        parser.add_argument("--judge", metavar="NAME", help="name of the judge, for the table")
        parser.add_argument("--requests", type=Path, metavar="FILE", help="where requests go (default: beside FILE)")

    @classmethod
    def from_files(cls, path: Path, options: Namespace) -> tuple[Mmhal, FileAnswers]:
        """Read judgements, or answers that are not judged.

        Raises:
            DataError: Questions and answers do not match, or only some lines are judged.
        """
        items = load_mmhal(options.questions)
        file = AnswerFile.of(path, options)
        file.usual = ("model_answer", "answer", "response", "text")
        rows = file.rows()
        by_index = any("index" in row.fields for row in rows)
        asked = [
            Asked(
                (str(item.index),) if by_index else (item.image_id, item.text),
                item.text,
                truth=frozenset({word(item.reference)}),
            )
            for item in items
        ]
        found = file.matched(rows, asked, fields=("index",) if by_index else ("image_id", "question"))
        picked, rows = [items[i] for i in found], list(found.values())
        judged = [any(row.fields.get(key) is not None for key in ("rating", *_JUDGEMENT_KEYS)) for row in rows]
        if not any(judged):
            requests = options.requests or path.with_name(path.stem + ".judge.jsonl")
            given = file.given(rows, [asked[i] for i in found])
            return cls.answered(file, picked, [each.answer() for each in given], requests=requests)
        if not all(judged):
            raise DataError(f"{rows[judged.index(False)].where} has no rating or judgement: judge all answers")
        if all("rating" in row.fields for row in rows):
            judgements = [f"Rating: {row.code('rating', MAX_RATING)}" for row in rows]
        else:
            judgements = [text_of(row.fields, row.where, _JUDGEMENT_KEYS) for row in rows]
        told = {"judgements": tuple(judgements), "judged_by": options.judge or ""}
        return cls.answered(file, picked, [Answer("")] * len(rows), **told)

    def report_file(self, own: ScoredFile, other: ScoredFile | None, seed: int) -> tuple[dict[str, Any] | None, str]:
        """The official figures; or where the requests to a judge are, which are written here."""
        table: MmhalTable | None = own.table
        if table is None:
            return None, self._ask_a_judge(own)
        counts, summary, by_type = table.counts(), table.summary(), table.by_type()
        columns = ["questions", "score (0-6)", "hallucinated", *TYPES, "unparsed"]
        values = [f"{summary['average_score']:.2f}", number(summary["hallucination_rate"])]
        types = [f"{by_type[name]:.2f}" if name in by_type else "-" for name in TYPES]
        hint = "" if self.judged_by else " (say who with --judge NAME: the figures depend on it)"
        shown = plain_table([columns, [str(len(table)), *values, *types, str(counts["unparsed"])]])
        result = {"judge": table.judge, "counts": counts, **summary}
        result |= {"by_type": list(by_type.values()), "types_in_order": list(by_type)}
        return result, f"MMHal-Bench, judge {table.judge}{hint}, {own.path}\n{shown}"

    def _ask_a_judge(self, own: ScoredFile) -> str:
        if not any(text.strip() for text in self.texts(own.answers)):
            raise DataError(f"{own.path}: every answer is empty; fill in 'model_answer'")
        write_lines(self.requests, self._requests(own.answers))
        return (
            f"MMHal-Bench, {own.path}: not scored, because a judge must rate the answers (officially gpt-4-0314 at "
            f"temperature 0).\nThe {len(self.asked)} requests are in {self.requests}. Have 'prompt' of each line "
            "answered (the instruction is ours, not the official one),\nwrite the answers as JSON lines with index and "
            "judgement, and score that file with --judge NAME."
        )
