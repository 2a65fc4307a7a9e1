"""What a user can type and import, and what is refused."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import vlmfix
from golden.bench import Bench, done, say

VERBS = (
    "eval",
    "methods",
    "info",
    "score",
    "calibrate",
    "tune",
    "power",
    "inspect",
    "trace",
    "compare",
    "plot",
    "run",
    "serve",
    "export",
)
SCORED = (
    "chair",
    "pope",
    "amber",
    "hallusionbench",
    "mmhal",
    "mme",
    "dashb",
    "naturalbench",
    "mmvp",
    "mmstar",
    "scienceqa",
)

CHOICES: dict[str, dict[str, str]] = {
    "--benchmark": {
        "eval": "chair pope sycophancy amber mme hallusionbench mmhal custom dashb naturalbench mmvp mmstar scienceqa",
        "tune": "chair pope",
    },
    "--split": {"": "heldout heldout2 calibration"},
    "--dtype": {"": "auto float32 bfloat16 float16"},
    "--chair-mode": {"": "original nltk"},
    "--mode": {"chair": "original nltk mixed"},
    "--parser": {
        "pope": "official official_raw opera vcd lmms vlmeval",
        "mme": "official lmms",
        "mmvp": "letter_or_text lmms",
    },
}
"""What the help of an option must name, by verb; under an empty one for all."""


def methods(bench: Bench) -> Any:
    """Every method with its parameters and their defaults."""
    found: dict[str, Any] = {}
    for line in done("methods").splitlines():
        name, _, rest = line.partition(": ")
        if line.startswith(" "):
            parameter, _, default = line.strip().partition(" = ")
            found[next(reversed(found))]["parameters"][parameter] = default
        else:
            found[name] = {"paper": re.findall(r"arXiv [\d.]+", rest), "parameters": {}}
    return found


def info(bench: Bench) -> Any:
    """What is seen in the embedded model."""
    from vlmfix.evals import testbed

    text = done("info", Path(str(testbed.__file__)).parent / "model")
    return sorted(set(re.findall(r"\d+|\w+Attention|Llava\w+", text)))


def help_texts(bench: Bench) -> Any:
    """The options and choices of every verb."""
    commands: list[tuple[str, ...]] = [(), *((verb,) for verb in VERBS), *(("score", name) for name in SCORED)]
    found = {}
    for words in commands:
        said = say(*words, "--help")
        assert said.status == 0 and said.out.startswith("usage: vlmfix"), words
        shown = dict.fromkeys(sorted(re.findall(r"(?<!\S)--[a-z-]+", said.out)), True)
        explained = dict(re.findall(r"^  (--[a-z-]+)((?:.*\n)(?:(?!  -).*\n)*)", said.out, re.MULTILINE))
        for option in CHOICES.keys() & explained.keys():
            choices = CHOICES[option].get(words[-1], CHOICES[option].get("", ""))
            shown |= {f"{option} {name}": name in re.split(r"\W+", explained[option]) for name in choices.split()}
        found[" ".join(["vlmfix", *words])] = shown
    return found


def public_names(bench: Bench) -> Any:
    """Every public name with its parameters, and the attributes of classes (of all methods those of their base)."""
    from vlmfix import probes

    found = {}
    for module in (vlmfix, probes):
        for name in sorted(module.__all__):
            found[f"{module.__name__}.{name}"] = described(getattr(module, name))
    found["methods"] = dict.fromkeys(sorted(vlmfix.list_methods()), True)
    return found


def described(public: Any) -> Any:
    """Parameters with their defaults, and the public attributes of a class; strings stay as they are."""
    if inspect.isclass(public) and issubclass(public, BaseException):
        return [base.__name__ for base in public.__mro__]
    if not callable(public):
        return type(public).__name__
    names: list[str] = []
    if inspect.isclass(public) and (public is vlmfix.Method or not issubclass(public, vlmfix.Method)):
        names = [name for name in dir(public) if not name.startswith("_")]
    attributes = dict.fromkeys(names, True)
    parameters = inspect.signature(public).parameters.values()
    return {"parameters": {p.name: default(p.default) for p in parameters}, "attributes": attributes}


def default(value: Any) -> str:
    """A parameter's default in words."""
    return "required" if value is inspect.Parameter.empty else repr(value)


REFUSED: dict[str, tuple[str, ...]] = {
    "eval --method vhrr": ("vhrr", "vhr"),
    "eval --method vhr --set alfa=2": ("alfa", "alpha"),
    "eval --method vhr --set alpha=much": ("alpha",),
    "eval --method vhr --set alpha": ("--set", "key=value"),
    "eval --method opera": ("opera", "vlmfix score chair"),
    "eval --method adhh": ("adhh", "calibrate"),
    "eval --limit 0": ("--limit",),
    "eval --benchmark amber": ("amber", "--benchmark-data amber="),
    "eval --benchmark-data mme=x": ("mme", "--benchmark"),
    "eval --benchmark amber --benchmark-data amber=/nowhere": ("/nowhere",),
    "eval --benchmark nothing": ("nothing", "chair"),
    "eval --judge cat": ("--judge", "mmhal"),
    "eval --pope-prompt yes": ("{question}",),
    "eval --model /nowhere": ("/nowhere",),
    "eval --data /nowhere": ("/nowhere",),
    "eval --limt 3": ("--limt",),
    "score chair": ("--captions",),
    "score chair /nowhere --ground-truth /nowhere": ("/nowhere",),
    "score nothing": ("nothing", "chair"),
    "score pope /nowhere": ("/nowhere",),
    "compare /nowhere": ("/nowhere",),
    "plot /nowhere": ("/nowhere",),
    "power --power 2": ("power",),
    "power /nowhere": ("/nowhere",),
    "calibrate vhr": ("vhr", "act"),
    "calibrate act --set nothing=1": ("nothing",),
    "tune --method none": ("none",),
    "tune --method vhr --range alpha=3:1": ("alpha",),
    "inspect --scene -1": ("-1",),
    "inspect --out /nowhere/page.html": ("/nowhere",),
    "inspect --image /nowhere": ("/nowhere",),
    "info /nowhere": ("/nowhere",),
    "nothing": ("nothing", "eval"),
}
"""Commands that are refused, and words that the message must hold."""
