"""MMHal-Bench as a task: open questions, whose answers a judge rates."""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from vlmfix.errors import DataError, VlmfixError

from ...data.samples import Answers, Sample
from ...data.source import choose, dataset_rows, find_file, find_image, image_number, is_dataset, row_image
from ...data.write import digest, write_text
from ...options import EvalOptions
from ...testbed import default_cache_dir
from ..base import Benchmark, distinct, texts, write_lines, write_list
from ..choice import RunData
from .data import MmhalItem, load_mmhal, load_sources, read_items
from .figures import MmhalTable, judge_prompt, score_judgements

PROMPT = "{question}"


NEW_TOKENS = 256


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


def load_items(where: str) -> tuple[list[MmhalItem], list[dict[str, Any]], list[Path]]:
    """Read the questions and find their images.

    Args:
        where: A folder with ``response_template.json`` and the images, under their OpenImages id or the name in their
            address, also below ``images``; or a data set with the template's fields and an image, in its order.

    Returns:
        The questions, their rows as they are in the template, and their images.

    Raises:
        DataError: A file is missing or broken, or an image is missing.
    """
    if is_dataset(where):
        rows = list(dataset_rows(where))
        items = read_items([(place, dict(row)) for place, row in rows])
        paths = [row_image(row, place) for place, row in rows]
        if None in paths:
            raise DataError(f"{rows[paths.index(None)][0]}: expected an image")
        return items, [{k: v for k, v in r.items() if k != "image"} for _, r in rows], [p for p in paths if p]
    folder = Path(where)
    file = find_file(folder, ["response_template.json"], "questions")
    items, sources = load_mmhal(file), load_sources(file)
    found = []
    for item, row in zip(items, sources, strict=True):
        names = [f"{item.image_id}{suffix}" for suffix in (".jpg", ".png")]
        names.append(str(row.get("image_src", item.image_id)).rpartition("/")[2])
        found.append(find_image([folder / "images", folder], names, f"question {item.index}"))
    return items, sources, found


@dataclass(frozen=True)
class Mmhal(Benchmark):
    """The questions of MMHal-Bench, or some of them.

    Attributes:
        items: The questions.
        rows: Their rows of the template.
        each: The sample of each question.
        samples: The different ones among them.
        prompt: Template with ``{question}``.
        max_new_tokens: Limit of an answer's length.
        judge: Who rates the answers; without one they are not scored.
    """

    name: ClassVar[str] = "mmhal"
    title: ClassVar[str] = "MMHal-Bench"
    summary: ClassVar[str] = "open questions, whose answers a judge rates"
    figures = MmhalTable.FIGURES
    scoring: ClassVar[tuple[str, ...]] = ("judge",)

    items: tuple[MmhalItem, ...]
    rows: tuple[dict[str, Any], ...] = field(repr=False)
    each: tuple[Sample, ...]
    samples: tuple[Sample, ...]
    prompt: str
    max_new_tokens: int
    judge: Judge | None

    @classmethod
    def make(cls, options: EvalOptions, data: RunData) -> Mmhal:
        """Read the questions and choose at most ``--limit``."""
        items, rows, paths = load_items(data.own(cls.name))
        kept = set(choose((f"{item.index:04d}" for item in items), options.limit, options.seed))
        chosen = [i for i, item in enumerate(items) if f"{item.index:04d}" in kept]
        prompt, limit = options.prompt_of.get(cls.name, PROMPT), options.max_new_tokens or NEW_TOKENS
        each = tuple(
            Sample(
                cls.name,
                image_number(cls.name, items[i].image_id),
                paths[i],
                prompt.replace("{question}", items[i].question),
                limit,
                "text",
            )
            for i in chosen
        )
        picked, sources = tuple(items[i] for i in chosen), tuple(rows[i] for i in chosen)
        return cls(picked, sources, each, distinct(each), prompt, limit, Judge.of(options))

    def settings(self) -> dict[str, Any]:
        """Prompt, length limit, judge and a digest of the questions."""
        return {
            "prompt": self.prompt,
            "max_new_tokens": self.max_new_tokens,
            "judge": None if self.judge is None else self.judge.name,
            "questions": digest([[item.index, item.image_id, item.question] for item in self.items]),
        }

    def _requests(self, answers: Answers) -> list[str]:
        return [judge_prompt(item, text) for item, text in zip(self.items, texts(self.each, answers), strict=True)]

    def score(self, answers: Answers) -> MmhalTable | None:
        """One row per question, or None without a judge."""
        if self.judge is None:
            return None
        said = [self.judge.judge(request) for request in self._requests(answers)]
        return score_judgements(self.items, said, judge=self.judge.name)

    def about(self) -> str:
        """Questions and judge."""
        if self.judge is None:
            return (
                f"MMHal-Bench: {len(self.items)} questions, not scored, because there is no judge; what to ask one is "
                "in official/METHOD/mmhal.judge.jsonl, and --judge COMMAND --rescore --out FOLDER asks it"
            )
        return (
            f"MMHal-Bench: {len(self.items)} questions, rated by {self.judge.name} (official: gpt-4-0314) with an "
            "instruction of ours"
        )

    def counts(self, table: MmhalTable) -> dict[str, int]:
        """Questions, sum of the ratings, hallucinations, unparsed judgements."""
        return table.counts()

    def breakdown(self, table: MmhalTable) -> dict[str, dict[str, float]]:
        """Average rating per type of question."""
        return {kind: {"score/6": value} for kind, value in table.by_type().items()}

    def export(self, folder: Path, answers: Answers) -> None:
        """``mmhal.json``: the template filled in, as the official script reads; and the requests to a judge."""
        given = texts(self.each, answers)
        filled = [{**row, "model_answer": text} for row, text in zip(self.rows, given, strict=True)]
        write_list(folder / "mmhal.json", filled)
        requests = zip(self.items, self._requests(answers), strict=True)
        write_lines(
            folder / "mmhal.judge.jsonl", [{"index": item.index, "prompt": request} for item, request in requests]
        )
