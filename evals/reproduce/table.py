"""What is known of a published table, and how its commands are made."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

LABELS = {
    "paper": "read in the paper",
    "rescored": "recomputed from released captions",
    "second-hand": "second-hand: quoted by somebody else",
    "README": "README of the authors' repository",
}
LLAVA, NEXT = "llava-hf/llava-1.5-7b-hf", "llava-hf/llava-v1.6-vicuna-7b-hf"
BLIP = "Salesforce/instructblip-vicuna-7b"
POPE_FILES = tuple(f"{{pope}}/coco_pope_{split}.json" for split in ("random", "popular", "adversarial"))
#: Of LLaVA-1.5-7B at batch 1, as the IRI paper prints them; the slower step is that of AdaIAT's timing file.
SECONDS_PER_STEP, SECONDS_PER_PREFILL = (0.036, 0.110), 0.100
BATCH = 8

CHAIR_SETTING = "the published images are not known; ours are drawn by seed from all of val2014"
CHAIR_MODE = "CHAIR's mode is not stated in what we read; nltk is what most such papers use"
HELP_ME = "Please help me describe the image in detail."
NO_SYSTEM = "LLaVA's own prompt begins with a system sentence, which the checkpoint's chat template leaves out"


@dataclass(frozen=True)
class Row:
    """Published figures of one method.

    Attributes:
        method: Its label in the run; for rescored files the name of the result.
        figures: Such as ``chair.chair_s`` -> percent.
        spread: Published standard deviation over seeds, where there is one.
        label: How well the figures are known, if not as the table says.
    """

    method: str
    figures: Mapping[str, float]
    spread: Mapping[str, float] = field(default_factory=dict)
    label: str | None = None


@dataclass(frozen=True)
class Table:
    """One published table, or the part of it that can be met.

    Attributes:
        title: What it shows.
        source: Paper and table.
        label: One of :data:`LABELS`.
        rows: Expected figures, the plain model first.
        commands: Words with the placeholders {model}, {data}, {train}, {pope}, {captions} and {out}.
        runs: Folders (or one folder of result files) below {out} that ``--check`` reads.
        model: Default of {model}; None where no model is needed.
        notes: How our run differs from the published one, and what else a reader must know.
        captions: Captions per run and method, for the estimate.
        steps: Decoding steps of a batch of captions (its longest caption).
        questions: Distinct questions per run and method, for the estimate.
    """

    title: str
    source: str
    label: str
    rows: Sequence[Row]
    commands: Sequence[Sequence[str]]
    runs: Sequence[str]
    model: str | None = LLAVA
    notes: Sequence[str] = ()
    captions: int = 0
    steps: int = 170
    questions: int = 0

    @property
    def minutes(self) -> tuple[float, float]:
        """GPU time of all runs, a lower and an upper estimate."""
        count = len(self.runs) * len(self.rows)
        decoding = math.ceil(self.captions / BATCH) * self.steps
        low, high = (count * (decoding * step + self.questions * SECONDS_PER_PREFILL) / 60 for step in SECONDS_PER_STEP)
        return low, high


def chair(**figures: float) -> dict[str, float]:
    """Figures of CHAIR under their keys: s, i, recall, f1, words."""
    names = {"s": "chair_s", "i": "chair_i", "recall": "recall", "f1": "f1", "words": "length_words"}
    return {f"chair.{names[name]}": value for name, value in figures.items()}


def evaluation(name: str, *words: str, seed: int = 0) -> tuple[str, ...]:
    """A command of ``vlmfix eval`` into {out}/NAME."""
    common = ("vlmfix", "eval", "--model", "{model}", "--data", "{data}", "--dtype", "float16", "--no-controls")
    return (*common, *words, "--seed", str(seed), "--out", f"{{out}}/{name}")


def captioning(name: str, *words: str, seed: int = 0, tokens: int = 512) -> tuple[str, ...]:
    """A command that captions 500 images and scores CHAIR in nltk mode."""
    size = ("--limit", "500", "--max-new-tokens", str(tokens))
    return evaluation(name, "--benchmark", "chair", "--chair-mode", "nltk", *size, *words, seed=seed)


def polling(name: str, *words: str, files: Sequence[str] = POPE_FILES) -> tuple[str, ...]:
    """A command that asks POPE's official questions, as they are."""
    return evaluation(name, "--benchmark", "pope", "--pope-questions", *files, *words)


def seeds(name: str, *words: str) -> dict[str, Sequence[object]]:
    """Commands and folders of five seeds, as in VHR's Table 1."""
    names = [f"{name}-seed{seed}" for seed in range(5)]
    commands = [captioning(each, *words, seed=seed) for seed, each in enumerate(names)]
    return {"commands": commands, "runs": names}


def rescoring(file: str, name: str, mode: str) -> tuple[str, ...]:
    """A command of ``vlmfix score chair``."""
    words = (
        "vlmfix",
        "score",
        "chair",
        "--captions",
        f"{{captions}}/{file}",
        "--ground-truth",
        "{data}",
        "--mode",
        mode,
    )
    return (*words, "--out", f"{{out}}/{name}.json")
