"""The evaluation on a tiny random model: run, kill, resume, the same numbers; and what the report says."""

from __future__ import annotations

import errno
import html
import json
import math
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from declared import columns_of
from families.saved_llava import build_coco_folder, build_tiny_llava, write_lines
from run_folders import read, timeless
from shared_data import DATA, needs_data

import vlmfix
from vlmfix.cli import main
from vlmfix.errors import DataError, MethodError, UnsupportedModelError, VlmfixError
from vlmfix.evals import evaluate as runner
from vlmfix.evals import tables
from vlmfix.evals.benchmarks import columns, object_choice
from vlmfix.evals.benchmarks import yes_no as pope
from vlmfix.evals.benchmarks.chair import task as chair_task
from vlmfix.evals.benchmarks.chair import text_quality
from vlmfix.evals.benchmarks.object_questions import PopeQuestion
from vlmfix.evals.benchmarks.pope.task import Pope
from vlmfix.evals.data import samples, write
from vlmfix.evals.data.coco import load_image
from vlmfix.evals.report import text as report
from vlmfix.evals.report.text import sentences
from vlmfix.evals.run import answer_log as cache
from vlmfix.evals.run import answering, generate, models
from vlmfix.evals.run import batches as answer_plan
from vlmfix.evals.run import folder as folders
from vlmfix.evals.run import methods as config
from vlmfix.evals.run import plan as planning
from vlmfix.evals.scores import controls as control_lines
from vlmfix.evals.stats.figures import Auc
from vlmfix.observe.prompts import PromptBuilder
from vlmfix.observe.words import YesNo, yes_no_tokens

TOKENS = 12
#: The columns of a run of CHAIR and POPE.
METRICS = columns_of("chair", "pope")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model (``m``) and a COCO folder of four images (``c``)."""
    folder = tmp_path_factory.mktemp("home")
    build_tiny_llava(folder / "m")
    build_coco_folder(folder / "c", num_images=4)
    return folder


@pytest.fixture
def words(home: Path) -> Callable[..., list[str]]:
    """Builds command lines."""

    def make(out: Path, *more: object) -> list[str]:
        fixed = ["eval", "--model", home / "m", "--data", home / "c", "--out", out, "--max-new-tokens", TOKENS]
        return [str(word) for word in (*fixed, "--pope-max-new-tokens", 2, "--batch-size", 4, *more)]

    return make


@pytest.fixture(scope="module")
def finished(home: Path) -> Path:
    """The folder of an uninterrupted run of all methods and controls."""
    out = home / "finished"
    words = ["eval", "--model", home / "m", "--data", home / "c", "--out", out, "--max-new-tokens", TOKENS]
    assert main([str(word) for word in (*words, "--pope-max-new-tokens", 2, "--batch-size", 4)]) == 0
    return out


def lines(folder: Path) -> dict[str, str]:
    """Every answer's line without its time, by key."""
    text = (folder / folders.ANSWERS).read_text()
    assert text.endswith("\n")
    rows = [line.rpartition(',"seconds":')[0] for line in text.splitlines()]
    assert len({json.loads(row + "}")["key"] for row in rows}) == len(rows), "no answer twice"
    return {json.loads(row + "}")["key"]: row for row in rows}


def assert_same_run(folder: Path, finished: Path) -> None:
    assert lines(folder) == lines(finished)
    assert timeless(read(folder)) == timeless(read(finished))


# A whole run


def test_run_writes_a_complete_folder(finished: Path) -> None:
    results = read(finished)
    assert {path.name for path in finished.iterdir()} == {
        "answers.jsonl", "config.json", "counts.json", "official", "report.html", "report.md", "results.json",
    }  # fmt: skip
    labels = [method["label"] for method in results["methods"]]
    assert labels == ["none", "vhr", "vhr/all", "vhr/unselected", "var"]
    pope = results["methods"][0]["pope"]
    assert pope["all"]["counts"]["n"] == 3 * 4 * 6
    assert pope["asked"] < pope["all"]["counts"]["n"], "the splits share their positive questions"
    assert len(lines(finished)) == len(labels) * (4 + pope["asked"]) + 4, "it was asked about four captions"


def test_results_schema(finished: Path) -> None:
    results = read(finished)
    assert results["schema_version"] == write.SCHEMA_VERSION
    assert results["intervals"] == {
        "confidence": 0.95, "resamples": 2000, "resampled": "images", "method": "percentile bootstrap, paired",
        "controls": "matched again in every resample",
    }  # fmt: skip
    for method in results["methods"]:
        chair, pope = method["chair"], method["pope"]
        assert all(type(value) is int for value in chair["counts"].values())
        assert chair["summary"]["chair_s"] == chair["counts"]["hallucinated_captions"] / chair["counts"]["captions"]
        for part in (*pope["splits"], "all"):
            counts = pope[part]["counts"]
            assert all(type(value) is int for value in counts.values())
            assert counts["n"] == counts["TP"] + counts["FP"] + counts["TN"] + counts["FN"]
            assert pope[part]["summary"]["yes_ratio"] == (counts["TP"] + counts["FP"]) / counts["n"]
        assert chair["seconds"] > 0 and pope["seconds"] > 0
        if method["label"] == "none":
            assert "differences" not in method
        else:
            assert set(method["differences"]) == {m.key for m in METRICS}
            for interval in method["differences"].values():
                assert (
                    set(interval) >= {"estimate", "low", "high", "n", "undefined", "p_value", "p_holm"}
                    and interval["n"] == 4
                )
    stored = json.loads((finished / "config.json").read_text())
    assert stored["settings"] == results["settings"]
    assert stored["settings"]["chair"]["image_ids"] == [10, 20, 30, 40]
    assert stored["runtime"]["generation_config"]["suppress_tokens"] == [0, 1, 3, 4]
    assert stored["resolved"]["vhr"]["params"]["layers"] == [1]


def test_text_quality_and_paired_answers_of_a_run(finished: Path) -> None:
    results = read(finished)
    rows = [json.loads(line) for line in (finished / folders.ANSWERS).read_text().splitlines()]
    for method in results["methods"]:
        own = [row for row in rows if row["method"] == method["label"]]
        captions = {row["image_id"]: row["text"] for row in own if row["benchmark"] == "chair"}
        quality = method["chair"]["text_quality"]
        expected = text_quality.score_texts(captions)
        assert quality["counts"].items() >= expected.counts().items()
        assert quality["counts"]["truncated_captions"] == method["chair"]["truncated"]
        assert quality["summary"]["repetition"] == expected.summary()["repetition"]
        assert ("length_matched" in quality) == ("paired" in method["pope"]) == (method["label"] != "none")
    none, vhr, *_, var = results["methods"]
    for way in ("words", "mentions"):
        counts = vhr["chair"]["text_quality"]["length_matched"][way]["counts"]
        assert counts["baseline"]["mentions"] <= none["chair"]["counts"]["mentions"]
        assert var["chair"]["text_quality"]["length_matched"][way]["chair_i"]["difference"]["p_holm"] in (1.0, None)
    assert vhr["pope"]["paired"]["mcnemar"]["questions"] == vhr["pope"]["asked"], "every distinct question once"
    assert results["corrections"]["method"] == "Holm"
    assert all("verdict_holm" in control for control in results["controls"])
    text, markdown = report.text_report(results), (finished / "report.md").read_text()
    assert "rep-4" in text and "McNemar" in text
    assert "## Text quality" in markdown and "## Paired answers" in markdown


def test_differences_are_method_minus_none(finished: Path) -> None:
    results = read(finished)
    none = results["methods"][0]
    for method in results["methods"][1:]:
        for metric in METRICS:
            part, own = (m[metric.benchmark] for m in (none, method))
            part, own = (p if metric.benchmark == "chair" else p["all"] for p in (part, own))
            expected = own["summary"][metric.name] - part["summary"][metric.name]
            interval = method["differences"][metric.key]
            assert interval["estimate"] == pytest.approx(expected, abs=1e-12)
            assert interval["low"] <= interval["estimate"] <= interval["high"]


def test_none_is_the_stock_model(home: Path, finished: Path) -> None:
    import torch

    source = models.find_model(home / "m")
    model = models.load_model(source, dtype="float32", device="cpu")
    stored = json.loads((finished / folders.ANSWERS).read_text().splitlines()[0])
    assert stored["method"] == "none" and stored["benchmark"] == "chair"
    image = load_image(next((home / "c" / "val2014").glob(f"*{stored['image_id']}.png")))
    prompt = PromptBuilder(source.processor)(stored["question"])
    inputs = source.processor(images=[image], text=[prompt], return_tensors="pt")
    output = model.generate(**inputs, do_sample=False, max_new_tokens=TOKENS)[0, inputs["input_ids"].shape[1] :]
    tokens = output[output != 2]
    assert torch.equal(tokens, torch.tensor(stored["tokens"]))
    assert source.processor.tokenizer.decode(tokens) == stored["text"]


def test_recorded_gaps_and_scores_are_those_of_the_logits(home: Path, finished: Path) -> None:
    import torch

    source = models.find_model(home / "m")
    model = models.load_model(source, dtype="float32", device="cpu")
    rows = [json.loads(line) for line in (finished / folders.ANSWERS).read_text().splitlines()]
    stored = next(row for row in rows if row["method"] == "none" and row["benchmark"] == "pope")
    image = load_image(next((home / "c" / "val2014").glob(f"*{stored['image_id']}.png")))
    prompt = PromptBuilder(source.processor)(stored["question"])
    inputs = source.processor(images=[image], text=[prompt], return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits[0, -1]
    vocabulary = source.processor.tokenizer.get_vocab()
    assert stored["score"] == pytest.approx(float(logits[vocabulary["yes"]] - logits[vocabulary["no"]]), abs=1e-4)

    caption = next(row for row in rows if row["method"] == "none" and row["benchmark"] == "chair")
    image = load_image(next((home / "c" / "val2014").glob(f"*{caption['image_id']}.png")))
    prompt = PromptBuilder(source.processor)(caption["question"])
    inputs = source.processor(images=[image], text=[prompt], return_tensors="pt")
    tokens = torch.tensor([caption["tokens"]])
    ids = torch.cat([inputs.pop("input_ids"), tokens], dim=1)
    with torch.no_grad():
        logits = model(input_ids=ids, pixel_values=inputs["pixel_values"]).logits[0]
    steps = logits[-tokens.shape[1] - 1 :][: len(caption["eos_gaps"])]
    steps[:, [0, 1, 3, 4]] = -torch.inf  # suppressed in generation
    gaps = steps.amax(-1) - steps[:, 2]
    assert caption["eos_gaps"] == pytest.approx(gaps.tolist(), abs=1e-3)


def test_batch_size_does_not_change_answers(words: Any, finished: Path, tmp_path: Path) -> None:
    assert main(words(tmp_path / "run", "--batch-size", 3, "--method", "vhr", "--no-controls")) == 0
    rows = {key: json.loads(row + "}") for key, row in lines(tmp_path / "run").items()}
    expected = {key: json.loads(row + "}") for key, row in lines(finished).items()}
    assert rows.keys() < expected.keys(), "the key does not depend on batch size or on the other methods"
    for key, row in rows.items():
        assert row["text"] == expected[key]["text"]
        assert row.get("tokens") == expected[key].get("tokens")
        assert row.get("score") == pytest.approx(expected[key].get("score"), abs=1e-3)
        assert row.get("eos_gaps", []) == pytest.approx(expected[key].get("eos_gaps", []), abs=1e-3)


def test_the_report_tells_the_batch_size_of_the_answers(words: Any, finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    for name in ("config.json", "answers.jsonl"):
        (out / name).write_bytes((finished / name).read_bytes())
    assert main(words(out, "--batch-size", 8, "--rescore")) == 0
    results = json.loads((out / "results.json").read_text())
    assert results["batch_size"] == 4 and not any("batches of" in note for note in results["notes"])
    rows = (out / "answers.jsonl").read_bytes().splitlines(keepends=True)
    (out / "answers.jsonl").write_bytes(b"".join(rows[:-1]))
    assert main(words(out, "--batch-size", 8)) == 0
    results = json.loads((out / "results.json").read_text())
    assert results["batch_size"] == 8
    assert any("there came in batches of 4, new ones in batches of 8" in note for note in results["notes"])


@pytest.mark.parametrize("benchmark", ["chair", "pope"])
def test_one_benchmark_alone(benchmark: str, words: Any, finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert main(words(out, "--benchmark", benchmark, "--method", "var", "--no-controls")) == 0
    results = read(out)
    assert [method["label"] for method in results["methods"]] == ["none", "var"] and results["controls"] == []
    assert {"chair", "pope"} & results["methods"][0].keys() == {benchmark}
    assert timeless(results["methods"][0]) == {
        k: v for k, v in timeless(read(finished)["methods"][0]).items() if k not in {"chair", "pope"} - {benchmark}
    }


# Kill and resume


@pytest.mark.parametrize("seed", range(4))
def test_resume_after_a_cut_anywhere(seed: int, words: Any, finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    (out / "results.json").unlink()
    (out / "report.md").unlink()
    data = (out / folders.ANSWERS).read_bytes()
    (out / folders.ANSWERS).write_bytes(data[: random.Random(seed).randrange(len(data))])
    assert main(words(out)) == 0
    assert_same_run(out, finished)


def test_torn_last_line_is_dropped_with_a_message(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"key":"a"}\n{"key":"b"')
    with cache.AnswerLog(path) as log:
        assert list(log.records) == ["a"]
        log.append([{"key": "b"}, {"key": "a"}])
    assert "torn last line" in caplog.text
    assert path.read_bytes() == b'{"key":"a"}\n{"key":"b"}\n'


@pytest.mark.parametrize("line", [b'{"key": ', b"[1]", b'{"text": "x"}', b"\xff\xfe"])
def test_other_broken_lines_are_errors(line: bytes, words: Any, finished: Path, tmp_path: Path, refused: Any) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    rows = (out / folders.ANSWERS).read_bytes().splitlines()
    rows[2] = line
    (out / folders.ANSWERS).write_bytes(b"\n".join(rows) + b"\n")
    message = refused(words(out))
    assert "answers.jsonl line 3" in message and "--no-resume" in message


def test_ctrl_c_keeps_answers_and_says_how_to_go_on(
    words: Any, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    out = tmp_path / "run"
    calls = iter(range(100))
    stock = generate.Generator.generate

    def interrupted(self: Any, *arguments: Any) -> Any:
        if next(calls) == 7:
            raise KeyboardInterrupt
        return stock(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(generate.Generator, "generate", interrupted)
        assert main(words(out, "--no-resume")) == 130
    message = capsys.readouterr().err
    kept, whole = (sum('"asked"' not in line for line in lines(folder).values()) for folder in (out, finished))
    assert 0 < kept < whole and f"{kept} of {whole} answers are kept" in message
    assert "to go on, type: vlmfix eval --model" in message and "--no-resume" not in message
    assert "Traceback" not in message
    assert main(words(out)) == 0
    assert_same_run(out, finished)


def test_full_disk_keeps_answers(
    words: Any, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    out = tmp_path / "run"
    left = iter(range(9, -1, -1))
    stock = cache.AnswerLog._write_all

    def full(self: cache.AnswerLog, data: bytes) -> None:
        if not next(left):
            stock(self, data[:20])
            raise OSError(errno.ENOSPC, "No space left on device")
        stock(self, data)

    with monkeypatch.context() as patch:
        patch.setattr(cache.AnswerLog, "_write_all", full)
        assert main(words(out)) == 2
    message = capsys.readouterr().err
    assert "No space left" in message and "answers.jsonl" in message and "same command again" in message
    assert main(words(out)) == 0
    assert_same_run(out, finished)


def test_short_writes_are_completed(tmp_path: Path) -> None:
    with cache.AnswerLog(tmp_path / "a") as log:

        class Short:
            def __init__(self, file: Any) -> None:
                self.file = file

            def write(self, data: Any) -> int:
                return int(self.file.write(data[:3]))

        stock, log._file = log._file, Short(log._file)  # type: ignore[assignment]
        log._write_all(b"0123456789")
        log._file = stock
    assert (tmp_path / "a").read_bytes() == b"0123456789"


def test_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write.write_json(tmp_path / "x.json", {"old": 1})

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(write.os, "fsync", full)
    with pytest.raises(VlmfixError, match=r"x\.json.*same command again"):
        write.write_json(tmp_path / "x.json", {"new": 2})
    assert json.loads((tmp_path / "x.json").read_text()) == {"old": 1}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cwd", "x.json"]


def test_rescoring_loads_no_model(
    words: Any, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    (out / "results.json").unlink()
    monkeypatch.setattr(answering, "load_model", lambda *a, **k: pytest.fail("a complete run was generated again"))
    assert main(words(out)) == 0
    assert "0 to go" in capsys.readouterr().out
    assert_same_run(out, finished)
    seconds = [[m[b]["seconds"] for m in read(folder)["methods"]] for folder in (out, finished) for b in ("chair",)]
    assert seconds[0] == seconds[1], "times of stored answers are kept"


def test_folder_of_another_configuration(words: Any, finished: Path, tmp_path: Path, refused: Any) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    before = (out / folders.ANSWERS).read_bytes()
    message = refused(words(out, "--max-new-tokens", 5, "--set", "alpha=3", "--prompt", "What is this?"))
    assert f"chair.max_new_tokens: {TOKENS} in the folder, 5 now" in message
    assert "methods.vhr.alpha: 2.0 in the folder, 3 now" in message
    assert "chair.prompt" in message and "--out DIR" in message and "--no-resume" in message
    assert (out / folders.ANSWERS).read_bytes() == before
    assert main(words(out, "--benchmark", "chair", "--limit", 2, "--no-resume")) == 0
    assert read(out)["methods"][0]["chair"]["counts"]["captions"] == 2
    assert len(lines(out)) == 5 * 2 + 2, "it was asked about two captions"


def test_rescoring_answers_of_another_version(
    words: Any, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, refused: Any
) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    (out / "counts.json").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(planning, "versions", lambda: {**read(finished)["settings"]["versions"], "vlmfix": "9.9"})
        patch.setattr(answering, "load_model", lambda *a, **k: pytest.fail("answers were generated again"))
        assert "versions.vlmfix: 0.1.0 in the folder, 9.9 now" in refused(words(out))
        assert main(words(out, "--rescore")) == 0
        assert "answers come from other versions (vlmfix 0.1.0)" in capsys.readouterr().out
    again, before = read(out), read(finished)
    assert again.pop("notes") != before.pop("notes")
    assert timeless(again) == timeless(before)
    assert (out / "counts.json").read_text() == (finished / "counts.json").read_text()
    (out / folders.ANSWERS).write_bytes(b"".join((finished / folders.ANSWERS).read_bytes().splitlines(True)[:-1]))
    assert "1 of" in refused(words(out, "--rescore"))
    assert "holds no run" in refused(words(tmp_path / "none", "--rescore"))


def test_two_runs_cannot_share_a_folder(tmp_path: Path) -> None:
    with (
        cache.AnswerLog(tmp_path / "a.jsonl"),
        pytest.raises(VlmfixError, match="another run is writing"),
        cache.AnswerLog(tmp_path / "a.jsonl"),
    ):
        pass


def test_answers_without_configuration_are_refused(words: Any, finished: Path, tmp_path: Path, refused: Any) -> None:
    out = tmp_path / "run"
    out.mkdir()
    shutil.copy(finished / folders.ANSWERS, out)
    assert "no config.json" in refused(words(out))


# Bad input


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--method", "vhrr"], "no method 'vhrr'"),
        (["--set", "strength=2"], "no parameter 'strength'"),
        (["--set", "vhr.recycle=0.5"], "no parameter 'recycle'"),
        (["--set", "pai.gamma=2"], "method 'pai' is not in this run"),
        (["--set", "alpha"], "key=value"),
        (["--set", "alpha=-1"], "alpha must be"),
        (["--set", "alpha=large"], "alpha"),
        (["--limit", "0"], "--limit must be at least 1"),
        (["--batch-size", "-1"], "--batch-size must be at least 1"),
        (["--pope-prompt", "yes or no?"], "{question}"),
        (["--no-chat-template"], "no place for the image"),
        (["--ids", "missing.txt"], "--ids file missing.txt"),
        (["--data", "nowhere"], "nowhere"),
        (["--pope-questions", "missing.json"], "missing.json"),
    ],
)
def test_bad_options(more: list[str], expected: str, words: Any, tmp_path: Path, refused: Any) -> None:
    message = refused(words(tmp_path / "run", *more))
    assert message.startswith("vlmfix: error: ") and expected in message and "Traceback" not in message
    assert not (tmp_path / "run").exists(), "nothing is written before the options are known to be good"


def test_missing_and_unreadable_images(words: Any, home: Path, tmp_path: Path, refused: Any) -> None:
    data = tmp_path / "c"
    shutil.copytree(home / "c", data)
    images = sorted((data / "val2014").iterdir())
    images[0].unlink()
    (tmp_path / "ids.txt").write_text(f"10\n{images[1].name}\n")
    assert images[0].name in refused(words(tmp_path / "run", "--data", data, "--ids", tmp_path / "ids.txt"))
    images[1].write_bytes(images[1].read_bytes()[:60])
    assert f"{images[1].name} cannot be read" in refused(words(tmp_path / "run", "--data", data))
    (tmp_path / "ids.txt").write_text("[10, 77]")
    assert "77" in refused(words(tmp_path / "run", "--data", data, "--ids", tmp_path / "ids.txt"))


def test_absent_images_are_left_out_aloud(words: Any, home: Path, tmp_path: Path, capsys: Any) -> None:
    data = tmp_path / "c"
    shutil.copytree(home / "c", data)
    sorted((data / "val2014").iterdir())[0].unlink()
    out = tmp_path / "run"
    assert main(words(out, "--data", data, "--benchmark", "chair", "--method", "none")) == 0
    assert "only 3 of 4 annotated images" in capsys.readouterr().out
    assert "only 3 of 4 annotated images" in (out / "report.md").read_text()
    assert read(out)["settings"]["chair"]["image_ids"] == [20, 30, 40]


def test_models_that_are_none(home: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="no such model folder"):
        models.find_model(tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UnsupportedModelError, match=r"expected config\.json"):
        models.find_model(tmp_path / "empty")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UnsupportedModelError, match="not a vision-language model: its model_type is 'llama'"):
        models.find_model(tmp_path / "text")
    shutil.copytree(home / "m", tmp_path / "bare", ignore=shutil.ignore_patterns("*processor*", "token*"))
    with pytest.raises(UnsupportedModelError, match="processor"):
        models.find_model(tmp_path / "bare")
    shutil.copytree(home / "m", tmp_path / "weightless", ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(UnsupportedModelError, match="no weights"):
        models.find_model(tmp_path / "weightless")
    with pytest.raises(UnsupportedModelError, match="hub id"):
        models.find_model("nobody/no-such-model")


def test_model_without_template_needs_a_whole_prompt(home: Path, words: Any, tmp_path: Path, refused: Any) -> None:
    folder = build_tiny_llava(tmp_path / "m", chat_template=False)
    assert "--no-chat-template" in refused(words(tmp_path / "run", "--model", folder))
    prompts = ["--prompt", "USER: <image> Describe. ASSISTANT:", "--pope-prompt", "USER: <image> {question} ASSISTANT:"]
    assert main(words(tmp_path / "run", "--model", folder, "--method", "vhr", "--no-chat-template", *prompts)) == 0


# Parts


def test_prompts(home: Path) -> None:
    source = models.find_model(home / "m")
    build = PromptBuilder(source.processor)
    question = object_choice.PROMPT.replace("{question}", "Is there a dog in the image?")
    assert build(chair_task.PROMPT) == "USER: <image>\nPlease describe this image in detail. ASSISTANT:"
    assert build(question) == (
        "USER: <image>\nIs there a dog in the image?\nAnswer the question using a single word or phrase. ASSISTANT:"
    )


def test_yes_and_no_tokens(home: Path) -> None:
    tokenizer = models.find_model(home / "m").processor.tokenizer
    vocabulary = tokenizer.get_vocab()
    assert yes_no_tokens(tokenizer) == ((vocabulary["yes"],), (vocabulary["no"],))

    class Pieces:
        """As sentencepiece does: a leading space belongs to the word; yes in capitals has two pieces."""

        unk_token_id = 0

        def __init__(self, **pieces: list[int]) -> None:
            self.pieces = pieces

        def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
            return {"input_ids": self.pieces.get(text.replace(" ", "_"), [0])}

        def decode(self, tokens: list[int]) -> str:
            return " " if tokens == [1] else "Y"

    pieces = Pieces(yes=[5], _yes=[6], Yes=[1, 7], _Yes=[7], no=[8], _no=[8], YES=[2, 3])
    assert yes_no_tokens(pieces) == ((5, 6, 7), (8,))
    assert yes_no_tokens(Pieces(yes=[5])) is None


def test_recorder_survives_infinities() -> None:
    import torch

    recorder = generate.StepRecorder([2], YesNo((0,), (1,)))
    scores = torch.tensor([[1.0, 0.5, -torch.inf], [torch.nan, 0.0, 0.0]])
    assert recorder(torch.zeros(2, 1), scores) is scores
    assert recorder.scores() == [0.5, None]
    assert recorder.gaps() == [[generate.LARGEST_GAP], [generate.LARGEST_GAP]]


def test_what_a_method_reads_from_a_file_is_part_of_it(tmp_path: Path) -> None:
    """A file that was measured anew under the same name must not be answered for by old answers."""
    path = tmp_path / "statistics.json"

    def planned() -> dict[str, Any]:
        options = config.EvalOptions(methods=("adaiat",), settings=(f"statistics={path}",))
        return dict(config.plan_methods(options)[1].params)

    found = []
    for value in (0.1, 0.2):
        table = {"real": [[value]], "hallucinated": [[0.1]], "num_real": 3, "num_hallucinated": 3}
        path.write_text(json.dumps(table))
        found.append(planned())
    assert [params["statistics"]["real"] for params in found] == [[[0.1]], [[0.2]]]
    path.unlink()
    with pytest.raises(DataError, match=r"statistics\.json: type: vlmfix calibrate adaiat"):
        planned()


def test_settings_reach_methods() -> None:
    options = config.EvalOptions(methods=("vhr", "var"), settings=("alpha=1.5", "var.recycle=0.25", "layers=[1]"))
    specs = {spec.label: spec for spec in config.plan_methods(options)}
    assert list(specs) == ["none", "vhr", "vhr/all", "vhr/unselected", "var"]
    assert {specs[label].params["alpha"] for label in specs if "vhr" in label} == {1.5}
    assert specs["vhr/all"].params["select"] == "all" and specs["vhr/all"].parent == "vhr"
    assert specs["var"].params["recycle"] == 0.25 and specs["var"].params["layers"] == [1]
    assert specs["vhr"].build().alpha == 1.5
    assert specs["vhr"].describe() == "vhr layers=[1] alpha=1.5"


def test_recipe_gives_strengths_and_settings_override_them() -> None:
    recipe = {"vhr": {"method": "vhr", "alpha": 1.25}}
    assert config.plan_methods(config.EvalOptions(), recipe)[1].params["alpha"] == 1.25
    changed = config.EvalOptions(settings=("vhr.alpha=1.75",), controls=False)
    assert [spec.params.get("alpha") for spec in config.plan_methods(changed, recipe)] == [None, 1.75, None]
    with pytest.raises(MethodError, match="no parameter 'beta'"):
        config.plan_methods(config.EvalOptions(), {"var": {"method": "var", "beta": 1}})


def test_one_method_at_many_strengths(home: Path, tmp_path: Path) -> None:
    import vlmfix

    options = config.EvalOptions(
        model=str(home / "m"), data=home / "c", benchmarks=("chair",), max_new_tokens=TOKENS, out=tmp_path / "run"
    )
    specs = config.method_specs({f"vhr {alpha}": vlmfix.VHR(alpha=alpha) for alpha in (1.0, 2.0)})
    rows = runner.evaluate(options, methods=specs)["methods"]
    assert [row["label"] for row in rows] == ["none", "vhr 1.0", "vhr 2.0"]
    assert [row["describe"] for row in rows] == ["none", "vhr alpha=1", "vhr"]
    assert rows[1]["chair"]["changed"] == 0 < rows[2]["chair"]["changed"], "strength one is the stock model"


def test_key_depends_on_everything_that_decides_an_answer(home: Path, tmp_path: Path) -> None:
    def key(**changed: Any) -> str:
        fixed: dict[str, Any] = {
            "model": str(home / "m"),
            "data": home / "c",
            "benchmarks": ("chair",),
            "out": tmp_path,
        }
        run = planning.plan_run(config.EvalOptions(**{**fixed, **changed}))
        sample = next(s for s in run.tasks.samples() if s.image_id == 10)
        return answer_plan.AnswerPlan(run).key(run.methods[1], sample)

    stock = key()
    assert key(batch_size=1, limit=1, seed=3, ids=_ids(tmp_path), methods=("vhr",)) == stock
    others = [
        key(prompt="What is this?"),
        key(max_new_tokens=7),
        key(settings=("alpha=3",)),
        key(dtype="bfloat16"),
        key(attn_implementation="eager"),
        key(model=str(build_tiny_llava(tmp_path / "other", seed=1))),
        key(data=build_coco_folder(tmp_path / "images", seed=1)),
    ]
    assert len({stock, *others}) == len(others) + 1


def _ids(folder: Path) -> Path:
    (folder / "ids.txt").write_text("10")
    return folder / "ids.txt"


def test_official_pope_files(words: Any, home: Path, tmp_path: Path) -> None:
    text = "Is there a dog in the image?"
    rows = [
        {"question_id": i, "image": f"COCO_val2014_{10 * i:012d}.jpg", "text": text, "label": label}
        for i, label in ((1, "yes"), (2, "no"))
    ]
    path = write_lines(tmp_path / "coco_pope_popular.json", rows)
    out = tmp_path / "run"
    assert main(words(out, "--benchmark", "pope", "--method", "none", "--pope-questions", path)) == 0
    pope = read(out)["methods"][0]["pope"]
    assert pope["splits"] == ["popular"] and pope["all"]["counts"]["n"] == 2 and pope["asked"] == 2
    assert main(words(tmp_path / "one", "--benchmark", "pope", "--pope-questions", path, "--ids", _ids(tmp_path))) == 0
    assert read(tmp_path / "one")["settings"]["pope"]["image_ids"] == [10]


# Scores


def pope_table(scores: list[float], labels: list[bool], images: list[int]) -> Any:
    return pope.score_labels(labels, ["yes"] * len(labels), image_ids=images, scores=scores)


def test_paired_auc_against_counting_pairs() -> None:
    rng = np.random.default_rng(0)
    n, images = 60, np.repeat(np.arange(12), 5)
    labels = rng.random(n) < 0.5
    a, b = (np.round(labels + rng.normal(0, 1, n), 1) for _ in range(2))

    def naive(scores: Any, rows: Any) -> float:
        s, y = scores[rows], labels[rows]
        pairs = s[y][:, None] - s[~y][None]
        return float((pairs > 0).mean() + (pairs == 0).mean() / 2)

    interval = Auc().difference(*(pope_table(s.tolist(), labels.tolist(), images.tolist()) for s in (a, b)), seed=5)
    rows = np.arange(n)
    assert interval.estimate == pytest.approx(naive(a, rows) - naive(b, rows), abs=1e-12)
    draws = []
    weights = np.random.default_rng(5).multinomial(12, np.full(12, 1 / 12), size=250)
    for weight in weights[:50]:
        chosen = np.concatenate([np.flatnonzero(images == i) for i in np.repeat(np.arange(12), weight)])
        draws.append(naive(a, chosen) - naive(b, chosen))
    scored = [pope_table(s.tolist(), labels.tolist(), images.tolist()) for s in (a, b)]
    fast = np.subtract(*(Auc().weighted(table, weights[:50].astype(float)) for table in scored))
    assert fast == pytest.approx(np.array(draws), abs=1e-12)
    assert interval.low < interval.estimate < interval.high and interval.n == 12


def test_missing_score_leaves_no_auc(finished: Path) -> None:
    question = PopeQuestion("1", 1, "x.jpg", "dog", "?", True, "random")
    task = Pope((question,), (), "{question}", 4)
    answer = samples.Answer("yes", (), False, (), None, 0.0)
    table = task.score({("pope", 1, "?"): answer})
    assert "score" not in table.columns and "auc" not in table.summary()


def test_controls_have_a_verdict_each(finished: Path) -> None:
    controls = read(finished)["controls"]
    named = {(c["method"], c["control"], c["metric"]) for c in controls}
    assert {("vhr", "early stop", "chair.chair_i"), ("vhr", "yes bias", "pope.accuracy")} <= named
    assert {("vhr", "every head", "chair.f1"), ("vhr", "other heads", "chair.f1")} <= named
    assert {("var", "early stop", "chair.chair_i"), ("var", "yes bias", "pope.accuracy")} <= named
    for control in controls:
        expected = "unchanged" if control["method"] == "var" else verdict_of(control)
        assert control["verdict"] == expected


def verdict_of(control: dict[str, Any]) -> str:
    better = columns.figure_of(control["metric"]).better
    low, high = sorted(better * control["difference"][end] for end in ("low", "high"))
    return "better" if low > 0 else "worse" if high < 0 else "same"


@pytest.mark.parametrize(("shift", "expected"), [(1.0, "better"), (0.0, "same"), (-1.0, "worse")])
def test_verdict_follows_the_interval(shift: float, expected: str) -> None:
    labels = [True, False] * 20
    images = [i // 2 for i in range(40)]
    sharp = [1.0 if label else -1.0 for label in labels]
    blunt = [0.0] * 40
    a, b = {1.0: (sharp, blunt), 0.0: (sharp, sharp), -1.0: (blunt, sharp)}[shift]
    pair = [pope_table(scores, labels, images) for scores in (a, b)]
    figure = columns.figure_of("pope.auc")
    row = control_lines.line("m", "c", figure, *pair, figure.statistic.difference(*pair))
    assert row["verdict"] == expected and row["difference"]["estimate"] == shift / 2


# The report


def small_results() -> dict[str, Any]:
    """Results with round figures, in the schema of ``results.json``."""

    def chair(s: int, i: int, changed: int, seconds: float) -> dict[str, Any]:
        counts = {"captions": 100, "hallucinated_captions": s, "mentions": 200, "hallucinated_mentions": i}
        more = {"gt_objects": 250, "recalled_gt_objects": 180, "generated_distinct": 190, "words": 1234}
        summary = {"chair_s": s / 100, "chair_i": i / 200, "recall": 0.72, "f1": 0.818, "length_words": 12.34}
        about = {"about": "CHAIR original mode, 100 captions of at most 128 new tokens"}
        return about | {
            "counts": counts | more,
            "summary": summary,
            "truncated": 1,
            "changed": changed,
            "seconds": seconds,
        }

    def pope(accuracy: float, changed: int) -> dict[str, Any]:
        summary = {"accuracy": accuracy, "precision": 0.9, "recall": 0.8, "f1": 0.847, "yes_ratio": 0.46, "auc": 0.95}
        part = {"counts": {"n": 600, "TP": 1, "FP": 2, "TN": 3, "FN": 4, "unparsed": 5}, "summary": summary}
        head = {
            "about": "POPE official parser, 600 questions (random 600) on 2 images",
            "parser": "official",
            "splits": ["random"],
            "asked": 500,
            "changed": changed,
            "seconds": 2.0,
        }
        return {**head, "random": part, "all": part, "mean_f1_of_splits": 0.847}

    def interval(estimate: float, low: float, high: float) -> dict[str, Any]:
        return {"estimate": estimate, "low": low, "high": high, "n": 100, "undefined": 0}

    zero = interval(0.0, 0.0, 0.0)
    differences = {key: zero for key in (m.key for m in METRICS)} | {
        "chair.chair_s": interval(-0.1, -0.153, -0.047),
        "chair.chair_i": interval(-0.031, -0.062, 0.004),
        "chair.length_words": interval(0.5, 0.2, 0.8),
        "pope.accuracy": interval(0.012, 0.004, 0.02),
    }
    methods = [
        {"label": "none", "describe": "none", "role": "baseline", "chair": chair(50, 40, 0, 3.0), "pope": pope(0.8, 0)},
        {"label": "vhr", "describe": "vhr alpha=1.3", "role": "method", "chair": chair(40, 34, 60, 3.5)}
        | {"pope": pope(0.812, 9), "differences": differences},
        {"label": "var", "describe": "var", "role": "method", "chair": chair(50, 40, 0, 3.1), "pope": pope(0.8, 0)}
        | {"differences": dict.fromkeys((m.key for m in METRICS), zero)},
    ]
    control = {"method": "vhr", "control": "early stop", "matched": "recall 72.0, 72.1", "metric": "chair.chair_i"}
    control |= {"method_value": 0.17, "control_value": 0.19, "difference": interval(-0.02, -0.03, -0.01)}
    return {
        "command": "vlmfix eval",
        "model": "testbed",
        "data": "testbed scenes, split heldout",
        "batch_size": 64,
        "notes": ["strengths are the testbed's recipe"],
        "settings": {
            "seed": 0,
            "model": {"weights": "sha256 0123456789abcdef", "dtype": "float32"},
            "versions": {"vlmfix": "0.1.0", "vlmfix_source": "abcdef0123", "torch": "2.13.0", "transformers": "5.23.0"},
            "chair": {"mode": "original", "max_new_tokens": 128, "prompt": "Describe."},
            "pope": {"image_ids": [1, 2], "prompt": "{question}\nYes or no?"},
        },
        "intervals": {"resamples": 2000},
        "methods": methods,
        "controls": [{**control, "verdict": "better"}],
    }


TABLE = """\
model testbed (sha256 0123456789ab), float32, greedy, batch 64
data testbed scenes, split heldout, seed 0; vlmfix 0.1.0 (abcdef01), torch 2.13.0, transformers 5.23.0
CHAIR original mode, 100 captions of at most 128 new tokens; prompt 'Describe.'
POPE official parser, 600 questions (random 600) on 2 images; prompt '{question}\\nYes or no?'
NOTE strengths are the testbed's recipe

               CHAIR                                                 POPE
method     CHAIR_s ↓  CHAIR_i ↓  recall ↑     F1 ↑      words  accuracy ↑     F1 ↑      yes    AUC ↑  seconds  verdict
none            50.0       20.0      72.0     81.8       12.3        80.0     84.7     46.0     95.0      5.0
vhr             40.0       17.0      72.0     81.8       12.3        81.2     84.7     46.0     95.0      5.5   better
  - none      -10.0*       -3.1       0.0      0.0      +0.5*       +1.2*      0.0      0.0      0.0
  95 %    -15.3,-4.7  -6.2,+0.4   0.0,0.0  0.0,0.0  +0.2,+0.8   +0.4,+2.0  0.0,0.0  0.0,0.0  0.0,0.0
var             50.0       20.0      72.0     81.8       12.3        80.0     84.7     46.0     95.0      5.1
  = none

- none: paired difference in points; 95 %: its interval over 2000 resamples of the images
*: the interval excludes 0; = none: no answer changed
verdict: better: beats a plain control (early stop, yes bias, self-verification) and loses to none; all that decides a
  word is one family (Holm), so that at most 5 % of runs say better, worse, mixed or loops of methods that equal their
  controls; trade-off is corrected over methods and over the headline figures, so that at most 5 % of methods that equal
  none get it
vhr is vhr alpha=1.3

method  control     matched            metric     method  control  difference       95 %  verdict
vhr     early stop  recall 72.0, 72.1  CHAIR_i ↓    17.0     19.0       -2.0*  -3.0,-1.0  beats its control

early stop: none's own captions, ended as soon as the end token comes within a fixed margin, chosen so that recall is
  the method's. self-verification: none's own captions, without the objects that it denies when asked for them, up to a
  probability of yes chosen so that recall is the method's. yes bias: a constant added to none's yes-minus-no logit,
  chosen so that the share of yes is the method's. every head and other heads: the same factor on all heads, and on
  those the method leaves alone. A method that does not beat its control only moves along the trade-off. The first three
  are matched again in every resample, so that the intervals cover that choice.

front  method  CHAIR_i ↓  - none       95 %  recall ↑  - none     95 %  seconds ↓  quartiles  dominated by
*      vhr          17.0    -3.1  -6.2,+0.4      72.0     0.0  0.0,0.0     x 1.17
*      none         20.0                         72.0                      x 1.00

front: no other row is at least as good in hallucination, recall and seconds and better in one. Seconds: times none's in
  the same batch, median and quartiles over batches; they differ where quartiles do not overlap and medians by more than
  5 %. early stop: none's captions, ended earlier; self-verification: without what none denies when asked. It goes by
  point estimates: mind the intervals.

vhr: 1.2 points higher POPE accuracy; ending captions earlier does worse on CHAIR_i.
var: no answer changed."""


BRIEF = """\
              CHAIR                           POPE
method    CHAIR_i ↓  recall ↑     F1 ↑  accuracy ↑  seconds  verdict
none           20.0      72.0     81.8        80.0      5.0
vhr            17.0      72.0     81.8        81.2      5.5   better
  - none       -3.1       0.0      0.0       +1.2*
  95 %    -6.2,+0.4   0.0,0.0  0.0,0.0   +0.4,+2.0
var            20.0      72.0     81.8        80.0      5.1
  = none

- none: paired difference in points; 95 %: its interval over 2000 resamples of the images
*: the interval excludes 0; = none: no answer changed

vhr: 1.2 points higher POPE accuracy; ending captions earlier does worse on CHAIR_i.
var: no answer changed."""


def test_table_snapshot() -> None:
    text = report.text_report(small_results())
    assert text == TABLE
    assert max(map(len, text.splitlines())) <= report.TERMINAL_WIDTH
    assert report.brief_report(small_results()) == BRIEF


def test_tables_of_a_run_fit_a_terminal(finished: Path) -> None:
    assert max(map(len, report.text_report(read(finished)).splitlines())) <= report.TERMINAL_WIDTH
    assert max(map(len, report.brief_report(read(finished)).splitlines())) <= 100


def test_a_run_ends_with_sentences_and_names_its_report(
    words: Any, finished: Path, tmp_path: Path, capsys: Any
) -> None:
    out = shutil.copytree(finished, tmp_path / "run")
    assert main(words(out, "--rescore")) == 0
    brief = " ".join(capsys.readouterr().out.split())
    said = sentences(read(finished))
    assert len(said) == 4 and said[-1] == "var: no answer changed."
    assert all(sentence in brief for sentence in said) and str(out / "report.html") in brief
    assert "rep-4" not in brief and "McNemar" not in brief
    assert main(words(out, "--rescore", "--verbose")) == 0
    full = " ".join(capsys.readouterr().out.split())
    assert "rep-4" in full and "McNemar" in full and all(sentence in full for sentence in said)
    for name in ("report.md", "report.html"):
        text = html.unescape((out / name).read_text())
        assert all(sentence in text for sentence in said)


def test_markdown_report_says_how_it_was_made() -> None:
    text = report.markdown_report(small_results())
    for part in ("100 captions", "original mode", "'Describe.'", "torch 2.13.0", "vlmfix eval", "recipe", "| `none` |"):
        assert part in text
    assert "40.0<br>-10.0* [-15.3, -4.7]" in text, "a difference never stands without its interval"
    assert "beats its control" in text


def test_numbers() -> None:
    assert [tables.number(v) for v in (0.5, math.nan, None)] == ["50.0", "-", "-"]
    assert [tables.signed(v) for v in (0.5, -0.5, 0.0, -0.0001, None)] == ["+50.0", "-50.0", "0.0", "0.0", "-"]


# Real photographs


@needs_data("coco_sample/images")
def test_real_photographs(tmp_path: Path) -> None:
    model = build_tiny_llava(tmp_path / "m", image_size=56, patch_size=14)
    sample = DATA / "coco_sample"
    out = tmp_path / "run"
    words = ["eval", "--model", model, "--data", sample, "--limit", 3, "--max-new-tokens", 8, "--out", out]
    assert main([str(word) for word in words]) == 0
    results = read(out)
    assert results["methods"][0]["chair"]["counts"]["captions"] == 3
    assert results["methods"][0]["pope"]["all"]["counts"]["n"] == 3 * 3 * 6
    assert any("only 57 of 268 annotated images" in note for note in results["notes"])


@pytest.fixture(autouse=True)
def _stay_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing may be written into the folder the tests are started from."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    yield


def test_recipe_files_are_rows_of_the_table(tmp_path: Path) -> None:
    path = tmp_path / "few_heads.json"
    vlmfix.save_recipe(path, vlmfix.ADHH(heads=[(0, 1), (2, 3)]))
    options = config.EvalOptions(
        out=tmp_path, methods=(str(path), "cmai"), settings=("few_heads.tau=0.2", "experimental=true")
    )
    _, recipe, cmai = config.plan_methods(options)
    assert (recipe.label, recipe.describe()) == ("few_heads", "adhh tau=0.2 heads=[[0,1],[2,3]]")
    assert recipe.build() == vlmfix.ADHH(heads=[(0, 1), (2, 3)], tau=0.2)
    assert cmai.describe() == "cmai experimental=True"
    vlmfix.save_recipe(path, [vlmfix.PAI(), vlmfix.VHR()])
    with pytest.raises(MethodError, match="holds 2"):
        config.plan_methods(config.EvalOptions(out=tmp_path, methods=(str(path),)))
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        vlmfix.save_recipe(tmp_path / folder / "same.json", vlmfix.PAI())
    both = tuple(str(tmp_path / folder / "same.json") for folder in ("a", "b"))
    with pytest.raises(MethodError, match="two of them"):
        config.plan_methods(config.EvalOptions(out=tmp_path, methods=both))
