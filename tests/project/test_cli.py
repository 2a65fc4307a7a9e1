"""The command line: immediate help, clear errors, and the verbs that need no generation."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from families.saved_llava import build_coco_folder, build_tiny_llava, write_lines
from scoring import Scorer

import vlmfix
from vlmfix.cli import main

HEAVY = ("torch", "transformers", "numpy", "PIL", "pycocotools", "tqdm")


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *words], capture_output=True, text=True)


@pytest.mark.parametrize("words", [["--help"], ["eval", "--help"], ["methods", "--help"], ["score", "chair", "--help"]])
def test_help_is_immediate(words: list[str]) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = run("-m", "vlmfix", *words)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0 and "usage: vlmfix" in done.stdout
    # Processor time, which does not depend on what else the machine does.
    assert (after.ru_utime - before.ru_utime) + (after.ru_stime - before.ru_stime) < 0.5


def test_help_imports_nothing_heavy() -> None:
    code = f"""
import sys
from vlmfix.cli import main
try:
    main(["eval", "--help"])
except SystemExit:
    pass
import vlmfix.evals
print([name for name in {HEAVY!r} if name in sys.modules])
"""
    assert run("-c", code).stdout.splitlines()[-1] == "[]"


def test_public_names_are_listed_before_they_are_loaded() -> None:
    code = f"""
import sys
import vlmfix
print(sorted({{*vlmfix.__all__}} - {{*dir(vlmfix)}}))
print([name for name in {HEAVY!r} if name in sys.modules])
"""
    assert run("-c", code).stdout.splitlines() == ["[]", "[]"]


def test_every_public_name_exists_and_is_explained() -> None:
    for module in (vlmfix, vlmfix.probes):
        for name in set(module.__all__) - {"__version__"}:
            public = getattr(module, name)
            # A dataclass without one gets its signature as docstring.
            assert (public.__doc__ or "").strip() and not public.__doc__.startswith(f"{name}("), name


def test_module_of_the_evaluation_is_vlmfix_eval() -> None:
    assert run("-m", "vlmfix.evals", "--help").stdout == run("-m", "vlmfix", "eval", "--help").stdout


def test_version_and_no_verb(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["--version"])
    assert exit_.value.code == 0 and vlmfix.__version__ in capsys.readouterr().out
    assert main([]) == 2 and "verbs:" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["evaluate"], ["eval", "--limt", "3"], ["eval", "--split", "train"], ["score"]])
def test_typing_errors_are_errors(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(words)
    assert exit_.value.code == 2 and "error:" in capsys.readouterr().err


def test_log_level_is_checked(monkeypatch: pytest.MonkeyPatch, refused: Any) -> None:
    monkeypatch.setenv("VLMFIX_LOG_LEVEL", "loud")
    assert "VLMFIX_LOG_LEVEL" in refused(["methods"])


def test_abbreviations_are_refused() -> None:
    with pytest.raises(SystemExit):
        main(["eval", "--batch", "3"])


def test_info_of_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    for location in (tmp_path, tmp_path / "missing"):
        assert main(["info", str(location)]) == 2
        assert capsys.readouterr().err.startswith("vlmfix: error: no vision-language model in")


def test_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import importlib.util

    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pycocotools" else find_spec(name))
    assert main(["eval"]) == 2
    assert "pycocotools" in (message := capsys.readouterr().err) and "vlmfix[eval]" in message


# score


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    return build_coco_folder(tmp_path / "c", num_images=3)


@pytest.mark.parametrize(("name", "text"), [("image_id", "caption"), ("image", "answer"), ("image_id", "text")])
def test_score_chair(name: str, text: str, coco: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ids = {"image_id": [10, "COCO_val2014_000000000020.jpg", "000000000030.jpg"], "image": [10, 20, "30"]}[name]
    objects = json.loads((coco / "instances_val2014.json").read_text())
    names = {category["id"]: category["name"] for category in objects["categories"]}
    first = next(names[a["category_id"]] for a in objects["annotations"] if a["image_id"] == 10)
    captions = [f"A {first} and an elephant.", "Nothing.", "A giraffe, a giraffe."]
    path = write_lines(tmp_path / "x.jsonl", [{name: i, text: t} for i, t in zip(ids, captions, strict=True)])
    words = ["score", "chair", "--captions", str(path), "--ground-truth", str(coco), "--mode", "original"]
    assert main([*words, "--out", str(tmp_path / "o.json")]) == 0
    assert capsys.readouterr().out.splitlines()[3].split()[:3] == ["3", "66.7", "75.0"]
    counts = json.loads((tmp_path / "o.json").read_text())["counts"]
    expected = {"captions": 3, "hallucinated_captions": 2, "mentions": 4, "hallucinated_mentions": 3}
    assert counts.items() >= {**expected, "recalled_gt_objects": 1, "generated_distinct": 3}.items()


def test_score_equals_the_evaluation(tmp_path: Path) -> None:
    """Captions and answers of a run, written to files and scored again, give the run's own counts."""
    model, data = build_tiny_llava(tmp_path / "m"), build_coco_folder(tmp_path / "c", num_images=5)
    out = tmp_path / "run"
    words = ["eval", "--model", model, "--data", data, "--method", "none", "--out", out, "--max-new-tokens", 10]
    assert main([str(word) for word in (*words, "--pope-max-new-tokens", 2, "--batch-size", 8)]) == 0
    row = json.loads((out / "results.json").read_text())["methods"][0]
    answers = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    captions = [{"image_id": a["image_id"], "caption": a["text"]} for a in answers if a["benchmark"] == "chair"]
    path = write_lines(tmp_path / "captions.jsonl", captions)
    assert main(["score", "chair", str(path), "--data", str(data), "--out", str(tmp_path / "chair.json")]) == 0
    again = json.loads((tmp_path / "chair.json").read_text())
    # Tokens are counted from a file wherever nltk has its data; an evaluation in mode original never asks for them.
    again["counts"].pop("tokens_after_double_words", None)
    assert again["counts"].items() <= row["chair"]["counts"].items()
    lengths = [summary.pop("length_tokens") for summary in (again["summary"], row["chair"]["summary"])]
    assert lengths[1] is None and again["summary"] == row["chair"]["summary"]

    from vlmfix.evals.benchmarks.pope.task import Pope
    from vlmfix.evals.benchmarks.registry import make_tasks
    from vlmfix.evals.options import EvalOptions

    task = make_tasks(EvalOptions(model=str(model), data=data)).find(Pope)
    assert task is not None
    texts = {(a["image_id"], a["question"]): a["text"] for a in answers if a["benchmark"] == "pope"}
    files, given = [], []
    for split in ("random", "popular", "adversarial"):
        questions = [q for q in task.asked if q.split == split]
        rows = [
            {"question_id": q.question_id, "image": q.image, "text": q.text, "label": "yes" if q.label else "no"}
            for q in questions
        ]
        files.append(str(write_lines(tmp_path / f"coco_pope_{split}.json", rows)))
        given += [
            {"split": split, "question_id": q.question_id, "answer": texts[q.image_id, task.prompt_text(q)]}
            for q in questions
        ]
    path = write_lines(tmp_path / "answers.jsonl", given)
    garbled = ("--text-key", "answer")  # The model has random weights, and says neither yes nor no.
    assert (
        main(["score", "pope", str(path), "--questions", *files, "--out", str(tmp_path / "pope.json"), *garbled]) == 0
    )
    again = json.loads((tmp_path / "pope.json").read_text())
    for split in ("random", "popular", "adversarial"):
        assert again["splits"][split]["counts"] == row["pope"][split]["counts"]
        own = out / "official" / "none" / f"pope_{split}.jsonl"
        assert main(["score", "pope", str(own), "--out", str(tmp_path / "own.json"), *garbled]) == 0
        assert (
            json.loads((tmp_path / "own.json").read_text())["splits"]["all"]["counts"] == row["pope"][split]["counts"]
        )


IMAGE = "COCO_val2014_000000000010.jpg"
QUESTIONS = [
    {"question_id": i, "image": IMAGE, "text": f"Is there a {name} in the image?", "label": label}
    for i, (name, label) in enumerate([("dog", "yes"), ("cat", "no"), ("car", "yes")], 1)
]


def test_scoring_needs_no_torch(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"label": 1, "ans": "Yes"}])
    code = "import sys; from vlmfix.cli import main; main(sys.argv[1:]); print('torch' in sys.modules)"
    assert run("-c", code, "score", "pope", str(path)).stdout.splitlines()[-1] == "False"


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ([{"text": "Yes"}], "1 answers without question_id, the question files 3 questions"),
        ([{"question_id": 1, "text": "Yes"}], "answers 1 of 3 questions"),
        ([{"question_id": 1, "split": "popular", "text": "Yes"}], "the line says 'popular'"),
        ([{"words": "Yes"}] * 3, "line 1: expected one of caption, text, answer"),
        ([5], "line 1: expected a JSON object"),
        ([], "is empty"),
    ],
)
def test_score_pope_mismatch(answers: list[Any], expected: str, tmp_path: Path, score: Scorer) -> None:
    questions = write_lines(tmp_path / "coco_pope_random.json", QUESTIONS)
    assert expected in score.error("pope", answers, "--questions", questions)


def test_broken_pipe_is_no_error(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"label": 1, "ans": "Yes"}])
    words = [sys.executable, "-m", "vlmfix", "score", "pope", str(path)]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(words, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert done.returncode == 0 and "Traceback" not in done.stderr
