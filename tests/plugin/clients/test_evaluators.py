"""Evaluators of others, in their own processes: their answers are those of a patched model's ``generate``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from client_runs import QUESTION, answer, picture, stock

import vlmfix
from vlmfix.clients.options import methods_among

PICTURES = f"""
import sys
from PIL import Image

def images(doc):
    return [Image.open(doc["image"]).convert("RGB")]

def text(doc, kwargs=None):
    return "{QUESTION}"

def results(doc, answers):
    return {{"words": len(answers[0].split())}}
"""

TASK = """
task: pictures
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/docs.json}}}}
test_split: test
output_type: generate_until
{given}
doc_to_target: "image"
generation_kwargs: {{max_new_tokens: 8, max_gen_toks: 8, do_sample: {sample}, num_beams: 1, temperature: {heat}}}
process_results: !function pictures.results
metric_list: [{{metric: words, aggregation: mean, higher_is_better: true}}]
"""

OF = {
    "lm_eval": f"doc_to_image: !function pictures.images\ndoc_to_text: '<image>{QUESTION}'",
    "lmms_eval": "doc_to_visual: !function pictures.images\ndoc_to_text: !function pictures.text",
}
"""How each of them is given the question."""

VHR = {"alpha": 0.5, "layers": ":"}


@pytest.fixture
def run(processor_folder: Path, tmp_path: Path) -> Any:
    """Return what runs an evaluator's module on two pictures and reads the answers."""
    docs = []
    for number in range(2):
        picture(number).save(tmp_path / f"{number}.png")
        docs.append({"image": str(tmp_path / f"{number}.png")})
    (tmp_path / "docs.json").write_text(json.dumps(docs))
    (tmp_path / "pictures.py").write_text(PICTURES)

    def start(client: str, before: list[str], model: str, arguments: str, *more: str, sample: bool = False) -> Any:
        if find_spec(client) is None:
            pytest.skip(f"{client} is not installed")
        task = TASK.format(folder=tmp_path, given=OF[client], sample=str(sample).lower(), heat=int(sample))
        (tmp_path / "pictures.yaml").write_text(task)
        words = ["--model", model, "--model_args", f"pretrained={processor_folder},dtype=float32,{arguments}"]
        words += ["--tasks", "pictures", "--include_path", str(tmp_path), "--device", "cpu", "--log_samples"]
        words += ["--output_path", str(tmp_path / "out"), "--batch_size", "1", *more]
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3]), "HF_HOME": str(tmp_path / "home")}
        done = subprocess.run(
            [sys.executable, *before, *words], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        lines = [line for path in tmp_path.rglob("*samples*.jsonl") for line in path.read_text().splitlines()]
        samples = sorted(map(json.loads, lines), key=lambda each: each["doc_id"])
        answers = [each["filtered_resps"] for each in samples]
        return done, [each[0] if isinstance(each, list) else each for each in answers]

    return start


def expected(folder: Path, method: str = "vhr", **parameters: Any) -> list[str]:
    model = stock(folder)
    before = [answer(model, folder, picture(number)) for number in range(2)]
    vlmfix.patch(model, method, **parameters)
    after = [answer(model, folder, picture(number)) for number in range(2)]
    assert before != after and all(map(str.split, after))
    return after


LM_EVAL = ["-c", "import vlmfix.clients.lm_eval_model; from lm_eval.__main__ import cli_evaluate; cli_evaluate()"]


@pytest.mark.slow
def test_lm_eval_with_its_plugin(run: Any, processor_folder: Path, tmp_path: Path) -> None:
    arguments = "method=vhr,method.alpha=0.5,method.layers=:"
    done, answers = run("lm_eval", LM_EVAL, "vlmfix", arguments, "--apply_chat_template")
    assert answers == expected(processor_folder, **VHR), done.stderr
    (results,) = (tmp_path / "out").rglob("results*.json")
    assert json.loads(results.read_text())["config"]["vlmfix"].startswith("VHR(layers=(0, 1, 2), alpha=0.5")
    done, _ = run("lm_eval", LM_EVAL, "vlmfix", arguments, "--apply_chat_template", "--use_cache", str(tmp_path / "db"))
    assert done.returncode != 0 and "name neither the model nor its patch" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("client", "program", "model", "arguments", "options"),
    [
        ("lm_eval", ["lm_eval"], "hf-multimodal", "revision=main", ["--apply_chat_template"]),
        ("lmms_eval", ["-m", "lmms_eval"], "llava_hf", "device_map=cpu", []),
    ],
)
def test_an_evaluator_in_a_run(
    run: Any, processor_folder: Path, client: str, program: list[str], model: str, arguments: str, options: list[str]
) -> None:
    before = ["-m", "vlmfix", "run", "vhr", "--set", "alpha=0.5", "layers=:", "--", *program]
    done, answers = run(client, before, model, arguments, *options)
    assert answers == expected(processor_folder, **VHR), done.stderr
    assert done.returncode == 0 and "2 prompts (0 without an image)" in done.stdout


@pytest.mark.slow
def test_lmms_eval_with_its_plugin(run: Any, processor_folder: Path) -> None:
    arguments = "base=llava_hf,device_map=cpu,method=opera,method.num_beams=2"  # the task says num_beams: 1
    done, answers = run("lmms_eval", ["-m", "lmms_eval"], "vlmfix", arguments)
    assert answers == expected(processor_folder, "opera", num_beams=2), done.stdout + done.stderr
    assert "method=opera" in done.stdout


@pytest.mark.slow
def test_cached_answers_of_lmms_eval_are_those_of_the_method(run: Any, processor_folder: Path, tmp_path: Path) -> None:
    for method in ("vhr", "pai"):
        arguments = f"base=llava_hf,device_map=cpu,method={method},method.alpha=0.5,method.layers=:"
        before = ["-m", "lmms_eval", "--use_cache", str(tmp_path / "cache")]
        done, answers = run("lmms_eval", before, "vlmfix", arguments)
        assert answers == expected(processor_folder, method, **VHR), done.stdout + done.stderr
        for path in tmp_path.rglob("*samples*.jsonl"):
            path.unlink()
    assert list((tmp_path / "cache").rglob("*"))


@pytest.mark.slow
def test_a_refused_call_ends_lmms_eval(run: Any) -> None:
    before = ["-m", "vlmfix", "run", "opera", "--", "-m", "lmms_eval"]
    done, answers = run("lmms_eval", before, "llava_hf", "device_map=cpu", sample=True)
    assert done.returncode == 2 and not answers, done.stdout + done.stderr
    assert "opera returns the best beam and draws nothing" in done.stderr


def test_methods_among_the_arguments_of_a_model() -> None:
    methods, rest = methods_among({"pretrained": "x", "method": "vhr", "method.alpha": 3, "method.layers": "1:"})
    assert methods == (vlmfix.VHR(alpha=3, layers="1:"),) and rest == {"pretrained": "x"}
    assert methods_among({"method": "default"}) == (None, {})
    for wrong in ({"pretrained": "x"}, {"method": "vhrr"}, {"method": "vhr", "method.alfa": 1}):
        with pytest.raises(vlmfix.MethodError):
            methods_among(wrong)
