"""The unpatched model is asked for the objects of its captions, once per run, and what it says is kept."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import vlmfix
from vlmfix.cli import main
from vlmfix.errors import UnsupportedFeatureError
from vlmfix.evals import testbed
from vlmfix.evals.run import mentions, models
from vlmfix.evals.run.generate import Generator
from vlmfix.evals.run.mentions import Mentions
from vlmfix.verification.ask import Questioner

WORDS = "eval --limit 4 --benchmark chair --method pai --set alpha=0.5 --max-new-tokens 24 --batch-size 2 --out"
CAPTIONS = ["A dog sits on a bench. There is a cup.", "Nothing.", "A cat."]


def run(folder: Path, *more: str) -> dict[str, Any]:
    assert main([*WORDS.split(), str(folder), *more]) == 0
    found: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return found


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]


def controls(results: dict[str, Any]) -> set[str]:
    return {line["control"] for line in results["controls"]}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    run(folder)
    return folder


@pytest.fixture(scope="module")
def model() -> Any:
    return models.load_model(models.find_model(testbed.MODEL_DIR), dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def processor() -> Any:
    return models.find_model(testbed.MODEL_DIR).processor


@pytest.fixture(scope="module")
def images() -> list[Any]:
    rng = torch.Generator().manual_seed(0)
    return [Image.fromarray(torch.randint(0, 255, (64, 64, 3), generator=rng).byte().numpy()) for _ in CAPTIONS]


def test_a_run_asks_for_what_its_captions_name_and_compares_with_it(finished: Path) -> None:
    rows, results = records(finished), json.loads((finished / "results.json").read_text())
    told = {row["image_id"]: row for row in rows if "asked" in row}
    texts = {row["image_id"]: row["text"] for row in rows if row["method"] == "none"}
    assert len(texts) == 4 and {image_id: row["text"] for image_id, row in told.items()} == texts
    for image_id, row in told.items():
        assert row["asked"] and all(name.split()[-1].rstrip("s") in texts[image_id].lower() for name in row["asked"])
    assert controls(results) == {"early stop", "self-verification"}
    cost = results["self_verification"]
    assert cost["captions"] == 4 and cost["questions"] == sum(len(row["asked"]) for row in told.values())
    assert results["self_verification_curve"][0]["recall"] == results["methods"][0]["chair"]["summary"]["recall"]
    assert f"{cost['questions']} questions about 4 captions of none" in (finished / "report.md").read_text()


def test_an_older_run_is_scored_without_it_and_asked_when_it_goes_on(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = [row for row in records(finished) if "asked" not in row]
    (tmp_path / "config.json").write_bytes((finished / "config.json").read_bytes())
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(row, separators=(",", ":")) + "\n" for row in kept))
    scored = run(tmp_path, "--rescore")
    assert controls(scored) == {"early stop"} and scored["self_verification"] is None
    assert any("without --rescore asks it" in note for note in scored["notes"])
    assert records(tmp_path) == kept
    monkeypatch.setattr(Generator, "generate", lambda *_: pytest.fail("no answer is missing"))
    again = run(tmp_path)
    whole = json.loads((finished / "results.json").read_text())
    assert again["self_verification_curve"] == whole["self_verification_curve"] and not again["notes"][1:]
    rescored = run(tmp_path, "--rescore")
    assert rescored["self_verification_curve"] == whole["self_verification_curve"]


def test_nothing_is_asked_unless_it_is_wanted(tmp_path: Path) -> None:
    for words in ("--no-self-verification", "--no-controls"):
        results = run(tmp_path / words, words)
        assert not any("asked" in row for row in records(tmp_path / words)), words
        assert results["self_verification"] is None and not any("verification" in note for note in results["notes"])


def test_why_a_model_cannot_be_asked_stands_in_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise UnsupportedFeatureError("it has no word for yes")

    monkeypatch.setattr(mentions, "Questioner", refuse)
    results = run(tmp_path)
    assert "no self-verification control: it has no word for yes" in results["notes"]
    assert controls(results) == {"early stop"}


def test_answers_are_those_of_verify_and_the_same_in_halves(
    model: Any, processor: Any, images: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Mentions(model, processor, 8).ask(images, CAPTIONS)
    assert [list(each["asked"]) for each in whole] == [["dog", "bench", "cup"], [], ["cat"]]
    for image, text, each in zip(images, CAPTIONS, whole, strict=True):
        for word in vlmfix.verify(model, processor, image, text).words:
            assert 1 / (1 + math.exp(-each["asked"][word.name])) == pytest.approx(word.asked, abs=1e-4)
    real = Questioner.look_at

    def small(self: Questioner, images: Any, prompt: str) -> Any:
        if len(images) > 1:
            raise torch.OutOfMemoryError
        return real(self, images, prompt)

    monkeypatch.setattr(Questioner, "look_at", small)
    halves = Mentions(model, processor, 8).ask(images, CAPTIONS)
    for one, other in zip(halves, whole, strict=True):
        assert one["asked"] == pytest.approx(other["asked"], abs=1e-4)
    monkeypatch.setattr(Questioner, "look_at", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError()))
    assert Mentions(model, processor, 8).ask(images, CAPTIONS)[0]["reason"] == "out of memory with a single question"
