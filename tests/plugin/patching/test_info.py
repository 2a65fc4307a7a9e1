"""``vlmfix info`` says of each method what ``patch`` does with it."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
from families import by_name
from families.tiny_llava import RAGGED, collate
from transformers import AutoModelForImageTextToText

import vlmfix
from vlmfix.cli import main
from vlmfix.info import verdict
from vlmfix.model.anatomy import analyse

ONE = collate([RAGGED[0]])


def test_a_model_is_described(processor_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(processor_folder)]) == 0
    shown = capsys.readouterr().out
    model = AutoModelForImageTextToText.from_pretrained(processor_folder)
    size = sum(parameter.numel() for parameter in model.parameters()) * 4
    assert f"{size / 1e3:.3g} kB of weights at 32 bits" in shown
    # Keys and values of 3 layers, 2 heads of 8 dimensions, 4 bytes each.
    assert f"{2 * 3 * 2 * 8 * 4 / 1e3:.3g} kB of keys and values per token" in shown
    layers = sum(parameter.numel() for parameter in model.model.language_model.layers.parameters())
    read = (layers + model.lm_head.weight.numel()) * 4
    assert f"a new token reads at most {read / 1e3:.3g} kB of them ({read / 2e9:.2g} ms at 2 TB/s)" in shown
    assert f"a token of the prompt takes {2 * layers / 1e9:.2g} GFLOP" in shown
    listed = {line.split()[0] for line in shown.splitlines() if line[2:3].isalpha() and line.startswith("  ")}
    assert set(vlmfix.list_methods()) <= listed


@pytest.mark.parametrize("family", ["llava", "mllama", "florence2"])
def test_what_is_said_of_a_method_is_what_patch_does(family: str) -> None:
    model = by_name(family).build()
    words = set()
    for name in vlmfix.list_methods():
        word, text = verdict(name, analyse(model))
        words.add(word)
        if word == "yes":
            with warnings.catch_warnings(record=True) as told:
                vlmfix.unpatch(vlmfix.patch(model, name))
            assert text and all(str(each.message) in text for each in told)
        else:
            with pytest.raises(vlmfix.VlmfixError) as error:
                vlmfix.patch(model, name)
            assert str(error.value) == text
    assert words >= {"yes", "not as is"} and ("no" in words) == (family != "llava")


def test_an_embedded_model_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "tiny"]) == 0
    assert "model_type llava" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["none", "vhr", "m3id", "vcd", "sid", "causalmm", "deco", "dola", "memvr", "vista"])
def test_what_a_step_costs_is_what_it_does(tiny: Any, name: str) -> None:
    """The layers' forwards with their rows, and the head's, of one new token."""
    told = verdict(name, analyse(tiny))[1]
    vlmfix.patch(tiny, name)
    rows: list[int] = []
    heads: list[int] = []
    tiny.model.language_model.layers[0].register_forward_hook(lambda _, args, out: rows.append(args[0].shape[0]))
    tiny.get_output_embeddings().register_forward_hook(lambda *_: heads.append(1))
    counts = []
    for length in (2, 3):
        rows.clear()
        heads.clear()
        tiny.generate(**ONE, max_new_tokens=length, min_new_tokens=length, do_sample=False, use_cache=True)
        counts.append((len(rows), sum(rows), len(heads)))
    forwards, samples, read = (more - fewer for more, fewer in zip(counts[1], counts[0], strict=True))
    assert samples == 1 + ("a second branch" in told)
    assert forwards == 1 + ("a second forward each step" in told)
    number = re.search(r"the head (\d+) times", told)
    assert read == (int(number[1]) if number else forwards)
