"""Options are fields: their flags, types, defaults, help texts and bounds stand there, for every verb."""

from __future__ import annotations

import argparse
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import pytest

from vlmfix.cli import VERBS, command_parser, main
from vlmfix.errors import VlmfixError
from vlmfix.evals.calibrate import CalibrateOptions
from vlmfix.evals.flags import MODEL, OUTPUT, add_verb, check_options, option, typed_values
from vlmfix.evals.inspect.command import InspectOptions
from vlmfix.evals.options import EvalOptions, Options
from vlmfix.evals.tune.command import TuneOptions


@dataclass(frozen=True, kw_only=True)
class Toy:
    """Every kind of option."""

    method: str = option("what to do", group=MODEL, default=MISSING, name="method", metavar="METHOD")
    settings: tuple[str, ...] = option("parameters", group=MODEL, name="--set", default=(), metavar="KEY=VALUE")
    exclude: tuple[Path, ...] | None = option("files", group=MODEL, metavar="FILE")
    mode: str = option("how", group=MODEL, default="fast", choices=("fast", "good"))
    budget: int = option("how often", group=MODEL, default=20, metavar="N", at_least=2)
    size: int | str | None = option("how many (default: the model's)", group=MODEL, at_least=1, word="auto")
    cached: bool = option("keep what is there", group=OUTPUT, default=True)
    dry: bool = option("write nothing, at 100 %", group=OUTPUT, default=False)
    inside: int = 3

    def __post_init__(self) -> None:
        check_options(self)


@pytest.fixture
def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="vlmfix")
    add_verb(made.add_subparsers(), "toy", Toy, about="What it does.", help_of={"budget": "tries"})
    return made


def typed(parser: argparse.ArgumentParser, words: str) -> Toy:
    return Toy(**typed_values(Toy, parser.parse_args(["toy", *words.split()])))


def test_what_is_not_typed_keeps_its_default(parser: argparse.ArgumentParser) -> None:
    assert typed(parser, "vhr") == Toy(method="vhr")
    words = "vhr --set a=1 b=2 --set c=3 --exclude x --mode good --budget 4 --size auto --no-cached --dry"
    assert typed(parser, words) == Toy(
        method="vhr",
        settings=("a=1", "b=2", "c=3"),
        exclude=(Path("x"),),
        mode="good",
        budget=4,
        size="auto",
        cached=False,
        dry=True,
    )
    assert typed(parser, "vhr --size 5").size == 5


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"budget": 1}, "--budget must be at least 2, got 1"),
        ({"mode": "slow"}, "--mode must be one of fast, good, got 'slow'"),
        ({"size": 0}, "--size must be at least 1"),
        ({"size": "all"}, "--size must be a number or auto"),
    ],
)
def test_bounds_hold_from_python_too(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(VlmfixError, match=message):
        Toy(method="vhr", **wrong)


@pytest.mark.parametrize("words", ["", "vhr --mode slow", "vhr --budget many", "vhr --size most", "vhr --inside 4"])
def test_what_cannot_be_typed_is_refused(words: str, parser: argparse.ArgumentParser) -> None:
    with pytest.raises(SystemExit):
        typed(parser, words)


def test_help_names_every_default(parser: argparse.ArgumentParser, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parser.parse_args(["toy", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for part in ("tries (default: 20)", "how (default: fast)", "keep what is there (default: on)", "at 100 %"):
        assert part in text
    assert text.count("the model's)") == 1 and "--inside" not in text
    assert text.index("What it does.") < text.index("model and method:") < text.index("output:")


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_every_verb_begins_with_examples(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main([verb, "--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    before = text[: text.index("options:")] if "options:" in text else text
    assert before.count(f"\n  vlmfix {verb}") >= 3
    assert max(map(len, text.splitlines())) <= 120


@pytest.mark.parametrize("options", [EvalOptions, TuneOptions, CalibrateOptions, InspectOptions])
def test_verbs_share_the_options_of_one_class(options: type[Options]) -> None:
    shared = {each.name for each in fields(Options)}
    assert shared <= {each.name for each in fields(options)}
    given = {"method": "vhr"} if options in (TuneOptions, CalibrateOptions) else {}
    made = options(model="m", dtype="float16", settings=("alpha=2",), **given)
    as_eval = made.as_eval(out=None, split="heldout")
    assert {name: getattr(as_eval, name) for name in shared} == {name: getattr(made, name) for name in shared}


def test_examples_are_words_the_parser_takes() -> None:
    """All but those with a place for the reader's own."""
    import shlex

    from vlmfix.evals import calibrate, evaluate
    from vlmfix.evals.inspect import command as inspect
    from vlmfix.evals.tune import command as tune

    parser = command_parser()
    taken = 0
    for module in (evaluate, tune, calibrate, inspect):
        for line in module._ABOUT.splitlines():
            if line.startswith("  vlmfix ") and "..." not in line:
                words = shlex.split((line.partition("   ")[2] and line.strip().partition("   ")[0]) or line)
                parser.parse_args(words[1:])
                taken += 1
    assert taken >= 12
