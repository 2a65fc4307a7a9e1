"""A recipe beside the weights, and OPERA as a function: answers are those of a patched model."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from client_runs import QUESTION, answer, inputs, picture, stock
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

import vlmfix

VHR = {"alpha": 0.5, "layers": ":"}


@pytest.fixture
def folder(processor_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model's folder with a recipe; code of such folders is cached elsewhere than at home."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    shutil.copytree(processor_folder, tmp_path / "model")
    vlmfix.save_recipe_beside_weights(tmp_path / "model", "vhr", **VHR)
    return tmp_path / "model"


@pytest.fixture
def expected(processor_folder: Path) -> str:
    model = stock(processor_folder)
    before = answer(model, processor_folder, picture(0))
    after = answer(vlmfix.patch(model, "vhr", **VHR), processor_folder, picture(0))
    assert before != after
    return after


def trusted(folder: Path) -> Any:
    return AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)


def test_whoever_trusts_the_folder_gets_a_patched_model(folder: Path, processor_folder: Path, expected: str) -> None:
    model = trusted(folder)
    assert vlmfix.status(model) is None
    assert answer(model, folder, picture(0)) == expected
    assert answer(model, folder, picture(0)) == expected
    assert vlmfix.status(model).prompts == 2 and vlmfix.status(model).methods[0].alpha == 0.5
    plain = answer(stock(processor_folder), folder, picture(0))  # older versions trust every folder
    assert answer(model, folder, picture(0), vlmfix=None) == plain
    assert answer(vlmfix.unpatch(model), folder, picture(0)) == plain
    assert answer(trusted(folder), folder, picture(0), vlmfix=None) == plain  # also in the first call


def test_a_pipeline(folder: Path, expected: str) -> None:
    ask = pipeline("image-text-to-text", model=str(folder), trust_remote_code=True)
    said = ask(
        text=AutoProcessor.from_pretrained(folder).apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}],
            add_generation_prompt=True,
        ),
        images=picture(0),
        return_full_text=False,
        generate_kwargs={"max_new_tokens": 8, "do_sample": False},
    )
    assert said[0]["generated_text"].strip() == expected


def test_without_trust(folder: Path, expected: str) -> None:
    assert answer(vlmfix.from_pretrained(folder), folder, picture(0)) == expected
    assert answer(vlmfix.from_pretrained(folder, trust_remote_code=True), folder, picture(0)) == expected
    (folder / "vlmfix.json").unlink()
    with pytest.raises(vlmfix.MethodError, match=r"no vlmfix\.json beside the weights of .*model"):
        vlmfix.from_pretrained(folder)


def test_a_patch_of_ones_own_goes_before(folder: Path, processor_folder: Path) -> None:
    model = vlmfix.patch(trusted(folder), "none")
    assert answer(model, folder, picture(0)) == answer(stock(processor_folder), folder, picture(0))
    assert vlmfix.status(model).methods[0].name == "none" and vlmfix.status(model).prompts == 1


def test_threads_patch_once(folder: Path, expected: str) -> None:
    model = trusted(folder)
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: answer(model, folder, picture(0)), range(4)))
    assert answers == [expected] * 4 and vlmfix.status(model).prompts == 4


def test_opera_beside_the_weights(folder: Path) -> None:
    vlmfix.save_recipe_beside_weights(folder, "opera", num_beams=2)
    expected = answer(vlmfix.patch(stock(folder), "opera", num_beams=2), folder, picture(0))
    model = trusted(folder)
    assert answer(model, folder, picture(0), num_beams=1) == expected
    assert vlmfix.status(model).edited[0] > 0


def test_what_is_no_model_or_no_recipe_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(vlmfix.UnsupportedModelError, match="holds no vision-language model"):
        vlmfix.save_recipe_beside_weights(tmp_path, "vhr")
    before = (folder / "vlmfix.json").read_bytes()
    for name, parameters in (("vhrr", {}), ("vhr", {"layers": [99]}), ("adhh", {})):
        with pytest.raises(vlmfix.MethodError):
            vlmfix.save_recipe_beside_weights(folder, name, **parameters)
    assert (folder / "vlmfix.json").read_bytes() == before


def test_opera_as_a_function(processor_folder: Path) -> None:
    model = stock(processor_folder)
    asked = {**inputs(processor_folder, picture(0)), "max_new_tokens": 8, "do_sample": False}
    plain = model.generate(**asked)
    found = model.generate(**asked, custom_generate=vlmfix.opera_generate(num_beams=3, threshold=2))
    assert vlmfix.status(model) is None and torch.equal(model.generate(**asked), plain)
    vlmfix.patch(model, "opera", num_beams=3, threshold=2)
    assert torch.equal(found, model.generate(**asked))
    assert not torch.equal(found, plain)


def test_opera_as_a_function_refuses(processor_folder: Path) -> None:
    model = stock(processor_folder)
    asked = {**inputs(processor_folder, picture(0)), "max_new_tokens": 8, "do_sample": False}
    with pytest.raises(vlmfix.UnsupportedFeatureError, match="beams of its own"):
        model.generate(**asked, num_beams=2, custom_generate=vlmfix.opera_generate())
    with pytest.raises(vlmfix.UnsupportedFeatureError, match="this prompt has none"):
        model.generate(torch.tensor([[1, 9, 10]]), max_new_tokens=2, custom_generate=vlmfix.opera_generate())
    with pytest.raises(vlmfix.MethodError, match="num_beams"):
        vlmfix.opera_generate(num_beams=0)
