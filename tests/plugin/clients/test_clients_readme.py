"""The Python of the room's README runs as it stands there."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from client_runs import answer, inputs, picture, stock

import vlmfix
from vlmfix.clients.options import methods_among
from vlmfix.methods.registry import method_from_dict

README = (Path(str(vlmfix.__file__)).parent / "clients" / "README.md").read_text(encoding="utf-8")


def block(word: str) -> str:
    """The block of Python that holds a word."""
    (found,) = (text for text in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if word in text)
    return str(found)


def test_a_recipe_beside_the_weights(processor_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(processor_folder, tmp_path / "my-model")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(block("save_recipe_beside_weights"), names)
    patched = vlmfix.patch(stock(processor_folder), "vhr", alpha=2.0)
    assert answer(names["model"], "my-model", picture(0)) == answer(patched, processor_folder, picture(0))


def test_opera_for_one_call(processor_folder: Path) -> None:
    names = {"vlmfix": vlmfix, "model": stock(processor_folder), "inputs": inputs(processor_folder, picture(0))}
    names["model"].generation_config.max_new_tokens = 4
    ids = eval(block("opera_generate").strip(), names)
    assert ids.shape[1] == names["inputs"]["input_ids"].shape[1] + 4


def test_every_block_is_run_here() -> None:
    words = ("save_recipe_beside_weights", "opera_generate", "vlmeval", "extra_body", "simple_evaluate")
    assert len({block(word) for word in words}) == README.count("```python") == len(words)


def test_the_model_of_lm_eval(monkeypatch: pytest.MonkeyPatch) -> None:
    lm_eval = pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install lm-eval")
    asked: dict[str, Any] = {}
    monkeypatch.setattr(lm_eval, "simple_evaluate", lambda **words: asked.update(words))
    exec(block("simple_evaluate"), {})
    from lm_eval.api.registry import get_model
    from lm_eval.utils import simple_parse_args_string

    assert get_model(asked["model"]).__module__ == "vlmfix.clients.lm_eval_model"
    methods, rest = methods_among(simple_parse_args_string(asked["model_args"]))
    assert methods == (vlmfix.VHR(alpha=2.0),) and rest == {"pretrained": "MODEL"}


def test_a_subclass_for_vlmevalkit(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for VLMEvalKit, which no package index has: its models keep theirs as ``self.model``."""

    class Qwen2VLChat:
        def __init__(self, model_path: str) -> None:
            self.model = tiny

    kit = ModuleType("vlmeval.vlm")
    kit.Qwen2VLChat = Qwen2VLChat  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vlmeval", ModuleType("vlmeval"))
    monkeypatch.setitem(sys.modules, "vlmeval.vlm", kit)
    names: dict[str, Any] = {}
    exec(block("vlmeval"), names)
    made = names["PatchedQwen2VL"]("pai", model_path="x")
    assert vlmfix.status(made.model).methods[0].name == "pai"


def test_a_request_with_methods_of_its_own() -> None:
    asked: dict[str, Any] = {}
    completions = SimpleNamespace(create=lambda **words: asked.update(words))
    client = SimpleNamespace(chat=SimpleNamespace(completions=completions))
    exec(block("extra_body"), {"client": client, "messages": []})
    assert method_from_dict(asked["extra_body"]["vlmfix"]) == vlmfix.PAI(alpha=0.3)
