"""What README shows works as shown."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from families.tiny_llava import RAGGED, collate, forward

import vlmfix
from vlmfix.cli import command_parser

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for folder in ("", ".github", "scripts", "tests", "evals", "vlmfix")
    for path in sorted((ROOT / folder).rglob("*.md") if folder else ROOT.glob("*.md"))
}
METHODS, DECODING, VERIFICATION = (
    DOCUMENTS[f"vlmfix/{room}/README.md"] for room in ("methods", "decoding", "verification")
)
EVERYTHING = "\n".join(DOCUMENTS.values())


def half_heads() -> Any:
    (source,) = (block for block in re.findall(r"```python\n(.*?)```", METHODS, re.DOTALL) if "HalfHeads" in block)
    names: dict[str, Any] = {}
    exec(source.partition("\n\n\nvlmfix.patch")[0], names)
    return names["HalfHeads"]


def test_the_method_in_the_readme_runs(tiny: Any) -> None:
    stock = forward(tiny, collate([RAGGED[0]])).logits
    vlmfix.patch(tiny, half_heads()())
    assert (forward(tiny, collate([RAGGED[0]])).logits - stock).abs().max() > 0.01
    vlmfix.patch(tiny, half_heads()(strength=1.0))
    assert torch.equal(forward(tiny, collate([RAGGED[0]])).logits, stock)
    with pytest.raises(vlmfix.MethodError, match="strength"):
        half_heads()(strength="much")


def test_the_front_page_is_short() -> None:
    assert len(DOCUMENTS["README.md"].splitlines()) <= 250


@pytest.mark.parametrize("name", DOCUMENTS)
def test_files_that_are_named_exist(name: str) -> None:
    names = re.findall(r"(?<![\w/])(?:scripts|evals|vlmfix|tests)/[\w./]+\w", DOCUMENTS[name])
    for file in names:
        assert (ROOT / file).exists() or "my_method" in file, file


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_somewhere(name: str) -> None:
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)#?([^)\s]*)\)", DOCUMENTS[name]):
        path = (ROOT / name).parent / target if target else ROOT / name
        assert path.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}, anchor


@pytest.mark.parametrize("folder", ["vlmfix", "vlmfix/methods", "vlmfix/verification"])
def test_a_room_tells_of_files_it_has(folder: str) -> None:
    room = ROOT / folder
    text = (room / "README.md").read_text(encoding="utf-8")
    named = re.findall(r"`([\w/]+(?:\.pyi?|/))`", text) + re.findall(r"(?:scripts|vlmfix)/[\w./]+\w", text)
    assert len(named) > 8
    for name in named:
        assert (room / name).exists() or (ROOT / name).exists(), name


def test_the_methods_table_is_complete() -> None:
    listed = set(re.findall(r"^\| `(\w+)` \|", METHODS + DECODING + VERIFICATION, re.MULTILINE))
    assert set(vlmfix.list_methods()) <= listed


def shown_commands() -> list[str]:
    """What README says to type: commands of its blocks, lines joined, and those in its text that have an option."""
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", EVERYTHING, re.DOTALL)).replace("\\\n", " ")
    lines = [line for line in blocks.splitlines() if line.startswith("vlmfix ")]
    return lines + re.findall(r"`(vlmfix [a-z]+ [^`|]*--[^`|]*)`", EVERYTHING)


@pytest.mark.parametrize("command", shown_commands())
def test_commands_in_the_readme_are_understood(command: str) -> None:
    assert command_parser().parse_args(shlex.split(command, comments=True)[1:]).verb == command.split()[1]


def test_verbs_the_readme_names_exist() -> None:
    verbs = next(
        action for action in command_parser()._actions if isinstance(action, argparse._SubParsersAction)
    ).choices
    assert set(re.findall(r"`vlmfix (\w+)", EVERYTHING)) <= set(verbs)
    (kinds,) = re.findall(r"`vlmfix score ([\w|]+)`", DOCUMENTS["evals/README.md"])
    scored = next(action for action in verbs["score"]._actions if isinstance(action, argparse._SubParsersAction))
    assert set(kinds.split("|")) == set(scored.choices)


def options_of(parser: argparse.ArgumentParser) -> Iterator[str]:
    for action in parser._actions:
        yield from action.option_strings
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                yield from options_of(below)


def test_options_the_readme_names_exist() -> None:
    known = set(options_of(command_parser()))
    for script in (ROOT / "scripts").rglob("*"):
        if script.is_file() and script.suffix in ("", ".py"):
            known |= set(re.findall(r"[\"'](--[a-z][\w-]*)[\"']", script.read_text(encoding="utf-8")))
    launchers = {"--nproc-per-node", "--multi_gpu", "--num_processes", "--cpu"}  # torchrun's, accelerate's
    launchers |= {"--headless", "--window-size", "--screenshot"}  # a browser's
    launchers |= {"--model_args", "--tasks", "--use_cache", "--its-own"}  # those of programs in vlmfix run
    launchers |= {"--port", "--trust-remote-code"}  # of transformers serve
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", EVERYTHING))
    assert len(named) > 30 and named - known <= launchers
