"""``vlmfix run``: the models that a program loads are patched, and what the program did is told."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from client_runs import PROGRAM, answer, picture, stock
from transformers import (
    AutoModelForCausalLM,
    GenerationMixin,
    LlamaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
)

import vlmfix
from vlmfix.cli import main
from vlmfix.clients.loading import PatchOnLoad
from vlmfix.methods.registry import make_method

VHR = (make_method("vhr", {"alpha": 0.5, "layers": ":"}),)
TYPED = ("vhr", "--set", "alpha=0.5", "layers=:")


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program that knows nothing of vlmfix; what a run changes for it is undone."""
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    monkeypatch.setattr(sys, "argv", [*sys.argv])
    monkeypatch.setattr(sys, "path", [*sys.path])
    return path


def test_a_script_is_run_with_its_model_patched(
    script: Path, processor_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    untouched = vars(PreTrainedModel)["from_pretrained"], GenerationMixin.generate
    model = stock(processor_folder)
    before = answer(model, processor_folder, picture(0))
    expected = answer(vlmfix.patch(model, VHR), processor_folder, picture(0))
    assert main(["run", *TYPED, "--", str(script), str(processor_folder)]) == 0
    said, status = capsys.readouterr().out.split("\n", 1)
    assert said == expected != before
    assert status.startswith("LlavaForConditionalGeneration patched with VHR(") and "1 prompts (0 without" in status
    assert (vars(PreTrainedModel)["from_pretrained"], GenerationMixin.generate) == untouched
    assert main(["run", "none", "--", "python3", str(script), str(processor_folder)]) == 0
    assert capsys.readouterr().out.split("\n", 1)[0] == before


def test_a_module_and_a_recipe(script: Path, processor_folder: Path, tmp_path: Path) -> None:
    vlmfix.save_recipe(tmp_path / "recipe.json", VHR)
    words = ["run", str(tmp_path / "recipe.json"), "--", "-m", "program", str(processor_folder)]
    done = subprocess.run(
        [sys.executable, "-m", "vlmfix", *words],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
    )
    expected = answer(vlmfix.patch(stock(processor_folder), VHR), processor_folder, picture(0))
    assert done.returncode == 0 and done.stdout.split("\n", 1)[0] == expected, done.stderr


NO_MODEL = "print('done')"
TEXT_MODEL = "from transformers import AutoModel; AutoModel.from_pretrained(sys.argv[1])"
NEVER_CALLED = "client_runs.stock(sys.argv[1])"
WITHOUT_PICTURE = "client_runs.stock(sys.argv[1]).generate(torch.tensor([[1, 9, 10]]), max_new_tokens=2)"
SECOND_RANK = "import os; os.environ['RANK'] = '1'; client_runs.stock(sys.argv[1])"  # which had nothing to do
FAILS = "client_runs.stock(sys.argv[1]); sys.exit(7)"
SWALLOWS = """
for number in range(2):
    try:
        client_runs.answer(client_runs.stock(sys.argv[1]), sys.argv[1], client_runs.picture(0), do_sample=True)
    except Exception:
        print("empty answer")
"""


@pytest.mark.parametrize(
    ("code", "method", "status", "told"),
    [
        (NO_MODEL, "vhr", 2, "loaded no vision-language model"),
        (NEVER_CALLED, "vhr", 2, "never called with a picture (0 prompts"),
        (WITHOUT_PICTURE, "vhr", 2, "never called with a picture (1 prompts"),
        (FAILS, "vhr", 7, ""),
        (SWALLOWS, "opera", 2, "opera returns the best beam and draws nothing"),
        (NO_MODEL, "vhrr", 2, "no method 'vhrr'"),
        (SECOND_RANK, "vhr", 0, ""),
    ],
)
def test_what_went_wrong_is_told(
    code: str,
    method: str,
    status: int,
    told: str,
    script: Path,
    processor_folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RANK", "0")
    script.write_text(f"import sys, torch, client_runs\n{code}")
    try:
        found: Any = main(["run", method, "--", str(script), str(processor_folder)])
    except SystemExit as exit_:
        found = exit_.code
    said = capsys.readouterr()
    assert (found, told in said.err) == (status, True), said.err
    assert "empty answer" not in said.out and ("patched with" in said.out) == ("stock" in code)


def test_all_models_of_a_program_are_patched(
    script: Path, processor_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = repr(str(processor_folder))
    script.write_text(f"""
import client_runs
first, second = client_runs.stock({folder}), client_runs.stock({folder})
for model, number in ((second, 0), (first, 1), (second, 2)):
    print(client_runs.answer(model, {folder}, client_runs.picture(number)))
""")
    assert main(["run", *TYPED, "--", str(script)]) == 0
    said = capsys.readouterr().out
    model = vlmfix.patch(stock(processor_folder), VHR)
    assert said.splitlines()[:3] == [answer(model, processor_folder, picture(number)) for number in range(3)]
    assert "1 prompts (0 without" in said and "2 prompts (0 without" in said and said.count("patched with") == 2


DISTRIBUTED = """
import os, sys, client_runs
import torch.distributed as dist
dist.init_process_group("gloo")
number, folder = dist.get_rank(), sys.argv[1]
said = client_runs.answer(client_runs.stock(folder), folder, client_runs.picture(number))
found = [None] * dist.get_world_size()
dist.all_gather_object(found, said)
if number == 0:
    print(found)
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_several_processes(script: Path, processor_folder: Path) -> None:
    script.write_text(DISTRIBUTED)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "vlmfix"]
    root = Path(__file__).parents[3]
    done = subprocess.run(
        [sys.executable, *launcher, "run", *TYPED, "--", str(script), str(processor_folder)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(root), str(root / "tests")])},
        capture_output=True,
        text=True,
    )
    model = vlmfix.patch(stock(processor_folder), VHR)
    expected = [answer(model, processor_folder, picture(number)) for number in range(2)]
    assert done.returncode == 0 and str(expected) in done.stdout.splitlines(), done.stderr
    assert all(f"process {number}: LlavaForConditionalGeneration patched" in done.stdout for number in range(2))


def test_a_launcher_starts_vlmfix_not_the_other_way_round(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["torchrun", "--nproc-per-node", "2"], ["-m", "torch.distributed.run"], ["accelerate", "launch"]):
        assert main(["run", "vhr", "--", *words, "x.py"]) == 2
        assert "Let it start vlmfix: " + " ".join(words[:2]) in capsys.readouterr().err


def test_models_of_another_kind_are_left_alone(
    script: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=9, **size)).save_pretrained(tmp_path / "text")
    script.write_text(f"import sys\n{TEXT_MODEL}")
    assert main(["run", "vhr", "--", str(script), str(tmp_path / "text")]) == 2
    assert "It loaded LlamaModel: " in capsys.readouterr().err


def test_a_model_that_is_made_in_another_way(processor_folder: Path) -> None:
    loaded = stock(processor_folder)
    with PatchOnLoad(VHR) as loading:
        model = LlavaForConditionalGeneration(loaded.config)
        model.load_state_dict(loaded.state_dict())
        model.generation_config = loaded.generation_config
        assert not loading.patched
        said = answer(model, processor_folder, picture(0))
    assert said == answer(vlmfix.patch(loaded, VHR), processor_folder, picture(0))
    assert loading.patched[0].status() == vlmfix.status(model)


def test_a_vision_language_model_that_cannot_be_patched_is_an_error(
    processor_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise vlmfix.UnsupportedModelError("not this one")

    monkeypatch.setattr("vlmfix.clients.loading.patch", refuse)
    with PatchOnLoad(VHR), pytest.raises(vlmfix.UnsupportedModelError, match="not this one"):
        stock(processor_folder)


def test_what_a_model_did_is_known_when_it_is_gone(processor_folder: Path) -> None:
    with PatchOnLoad(VHR) as loading:
        model = stock(processor_folder)
        answer(model, processor_folder, picture(0))
        status = str(vlmfix.status(model))
        del model
        gc.collect()
    assert str(loading.patched[0].status()) == status


def test_cached_answers_are_refused(script: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "vhr", "--", str(script), "--use_cache=answers"]) == 2
    assert "keys that do not name the patch" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", [["vhr", "program.py"], ["vhr", "--", "nothing.py"], ["default", "-s", "a=1", "--", "x"]]
)
def test_typing_errors_are_told(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", *words]) == 2
    assert capsys.readouterr().err.startswith("vlmfix: error: ")
