"""Memory that is too small for a batch: halves, the same answers under the same keys, and nothing left behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families.saved_llava import build_coco_folder, build_tiny_llava, write_lines

import vlmfix
from vlmfix.cli import main
from vlmfix.evals.data.coco import load_image
from vlmfix.evals.run import generate, models
from vlmfix.observe.prompts import PromptBuilder

TOKENS = 20  # captions become longer than the questions
METHODS = ("none", "vhr", "pai")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    build_tiny_llava(folder / "m")
    build_coco_folder(folder / "c", num_images=6)
    ids = [10 * (i // 3 + 1) for i in range(9)]
    asked = [
        {"question_id": i, "image": f"COCO_val2014_{image:012d}.jpg", "text": f"Is there a {name} in the image?"}
        | {"label": "yes" if i % 2 else "no"}
        for i, (image, name) in enumerate(zip(ids, ("dog", "cat", "tv") * 3, strict=True))
    ]
    write_lines(folder / "coco_pope_random.json", asked)
    return folder


@pytest.fixture(scope="module")
def expected(home: Path) -> dict[str, dict[str, Any]]:
    """The answers of a run whose batches fit."""
    found = run(home, home / "stock")
    assert results(home / "stock")["halved_batches"] == []
    return found


class Memory:
    """Makes the language model's forward fail with more rows than fit, from some forward of an answer on.

    Attributes:
        failures: (rows, forward of the answer, name of the method that was on) of every failure.
    """

    def __init__(self, model: Any, rows: int, *, step: int = 0, only: Callable[[Any], bool] = lambda model: True):
        self.model, self.rows, self.step, self.only = model, rows, step, only
        self.forwards = 0
        self.failures: list[tuple[int, int, str | None]] = []
        model.register_forward_pre_hook(self.before, with_kwargs=True)

    def before(self, module: Any, args: Any, kwargs: Any) -> None:
        rows, tokens = kwargs["input_ids"].shape
        self.forwards = 0 if tokens > 1 else self.forwards + 1
        if rows > self.rows and self.forwards >= self.step and self.only(self.model):
            status = vlmfix.status(self.model)
            self.failures.append((rows, self.forwards, None if status is None else status.methods[0].name))
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")


@pytest.fixture
def small_memory(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Memory]]:
    """Gives every model that the evaluation loads a small memory."""

    def make(rows: int, **more: Any) -> list[Memory]:
        made: list[Memory] = []
        load = models.load_model

        def loading(*args: Any, **kwargs: Any) -> Any:
            model = load(*args, **kwargs)
            made.append(Memory(model, rows, **more))
            return model

        monkeypatch.setattr("vlmfix.evals.run.answering.load_model", loading)
        return made

    return make


def run(home: Path, out: Path, *more: object) -> dict[str, dict[str, Any]]:
    words = ["eval", "--model", home / "m", "--data", home / "c", "--out", out, "--max-new-tokens", TOKENS]
    words += [
        "--pope-questions",
        home / "coco_pope_random.json",
        "--pope-max-new-tokens",
        2,
        "--batch-size",
        6,
        "--method",
        *METHODS[1:],
        "--no-controls",
        *more,
    ]
    assert main([str(word) for word in words]) == 0
    lines = (out / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    return {record["key"]: record for record in map(json.loads, lines)}


def results(out: Path) -> Any:
    return json.loads((out / "results.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("step", [0, 3])
def test_half_the_rows_give_the_same_answers(
    step: int, home: Path, expected: dict[str, dict[str, Any]], tmp_path: Path, small_memory: Any
) -> None:
    """In the prompt, and in the middle of decoding a caption, with and without a patch."""
    made = small_memory(2, step=step)
    found = run(home, tmp_path / "small")
    (memory,) = made
    assert {forward for _, forward, _ in memory.failures} == {step}
    assert {method for *_, method in memory.failures} >= {"vhr", "pai"}
    assert list(found) == list(expected), "the same keys in the same order"
    for key, record in found.items():
        assert record["text"] == expected[key]["text"]
        assert record.get("tokens") == expected[key].get("tokens")
        assert record.get("score") == pytest.approx(expected[key].get("score"), abs=1e-4)
        halved = step == 0 or record["benchmark"] == "chair"
        assert (record["rows"] <= 2) if halved else ("rows" not in record), "6 = 3 + 3 = (2 + 1) + (2 + 1)"
    assert vlmfix.status(memory.model) is None
    reported = results(tmp_path / "small")["halved_batches"]
    assert {"method": "vhr", "benchmark": "chair", "answers": 6, "rows": 1} in reported
    assert len(reported) == len(METHODS) * (2 if step == 0 else 1)
    note = "memory was too small for batches of 6: 6 answers of vhr to chair came in smaller ones, down to 1"
    assert note in results(tmp_path / "small")["notes"] and note in (tmp_path / "small" / "report.md").read_text()


def test_what_did_not_fit_is_not_tried_again(home: Path, tmp_path: Path, small_memory: Any) -> None:
    """Once per method for the shortest batch, not once per batch; a method that fits is left alone."""
    made = small_memory(3, only=lambda model: "vhr" in str(vlmfix.status(model)))
    found = run(home, tmp_path / "run", "--benchmark", "pope", "--batch-size", 4)
    assert len(found) == 9 * len(METHODS), "three batches of each"
    assert [rows for rows, *_ in made[0].failures] == [4], made[0].failures
    assert {record["method"] for record in found.values() if "rows" in record} == {"vhr"}


def test_halves_after_a_resume_are_those_of_the_whole_run(home: Path, tmp_path: Path, small_memory: Any) -> None:
    small_memory(4)
    expected = run(home, tmp_path / "whole")
    for cut in (0.2, 0.5, 0.9):
        out = tmp_path / str(cut)
        out.mkdir()
        (out / "config.json").write_bytes((tmp_path / "whole" / "config.json").read_bytes())
        data = (tmp_path / "whole" / "answers.jsonl").read_bytes()
        (out / "answers.jsonl").write_bytes(data[: int(cut * len(data))])
        found = run(home, out)
        timeless = [{k: {**r, "seconds": 0} for k, r in records.items()} for records in (found, expected)]
        assert timeless[0] == timeless[1], "to the last digit"


def test_one_row_that_does_not_fit_is_an_error(home: Path, tmp_path: Path, small_memory: Any, refused: Any) -> None:
    small_memory(0)
    words = ["eval", "--model", home / "m", "--data", home / "c", "--out", tmp_path / "run"]
    message = refused([str(word) for word in words])
    assert "out of memory with a single sample (none, " in message and "--dtype float16" in message
    assert "Traceback" not in message


def test_a_failed_batch_leaves_the_model_bitwise_stock(home: Path) -> None:
    source = models.find_model(home / "m")
    model = models.load_model(source, dtype="float32", device="cpu")
    generator = generate.Generator(model, source.processor)
    image = load_image(next((home / "c" / "val2014").iterdir()))
    prompt = PromptBuilder(source.processor)("Please describe this image.")
    batch = generate.EncodedBatch(generator, [prompt] * 4, [image] * 4)
    inputs = batch.inputs(0, 4)
    with torch.no_grad():
        before = model(**inputs).logits
    memory = Memory(model, 1, step=2)
    answerer = generate.Answerer(generator)
    for method in (vlmfix.VHR(), vlmfix.ACT(heads=[(0, 0)]), None):
        found = answerer.answer(batch, str(method), method, "gaps", TOKENS)
        assert [answer.rows for answer in found] == [1] * 4
        assert len({answer.text for answer in found}) == 1
    assert [rows for rows, *_ in memory.failures] == [4, 2] * 3
    memory.rows = 4
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, before)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
            True,
        ),
        (RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"), True),
        (RuntimeError("shapes cannot be multiplied"), False),
        (MemoryError(), False),
    ],
)
def test_what_counts_as_out_of_memory(error: BaseException, expected: bool) -> None:
    assert generate.is_out_of_memory(error) is expected


def test_other_errors_are_not_swallowed(home: Path) -> None:
    source = models.find_model(home / "m")
    generator = generate.Generator(models.load_model(source, dtype="float32", device="cpu"), source.processor)
    generator.model.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("something else")))
    image = load_image(next((home / "c" / "val2014").iterdir()))
    batch = generate.EncodedBatch(generator, ["USER: <image>\nyes ASSISTANT:"] * 2, [image] * 2)
    with pytest.raises(RuntimeError, match="something else"):
        generate.Answerer(generator).answer(batch, "none", None, "score", 2)
