"""Every block of code in every README runs as it stands there, on the embedded model, in a folder with what it names.

Names in the documents (``MODEL``, ``COCO_DIR``, ``act.json``, ...) are files and folders of that one. Only sizes are
changed: a few images, a few tokens.
"""

from __future__ import annotations

import contextlib
import glob
import io
import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("nltk")
pytest.importorskip("matplotlib")
pytest.importorskip("optuna")
pytest.importorskip("datasets")

from golden.bench import SHARED, Bench, say
from golden.data import lines, pictures

import vlmfix
from vlmfix.evals import testbed
from vlmfix.observe.prompts import PromptBuilder, encode

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", ".github/CONTRIBUTING.md", "scripts/README.md")),
    *(path for package in ("vlmfix", "evals", "tests") for path in sorted((ROOT / package).rglob("README.md"))),
]
SMALLER = {
    "eval": ("--limit", 4, "--no-controls", "--max-new-tokens", 16),
    "calibrate": ("--limit", 4),
    "tune": ("--limit", 3, "--budget", 2, "--confirm", 1, "--margin", 100),
    "inspect": ("--max-new-tokens", 6),
}
"""What is appended to the commands of a verb: the last of an option's values counts."""
SHELL = {
    "scripts/demo": "test_packaging.py",
    "scripts/test": "test_packaging.py",
    "scripts/check_layers": "run by .ci/run",
    "scripts/test_versions": "run by .ci/run",
    "scripts/test_clients": "run by .ci/run",
    "scripts/test_upstream": "downloads the tests of transformers",
    ".ci/run": "itself",
    "ruff": "run by .ci/run",
    "mypy": "run by .ci/run",
    "python scripts/new_method.py": "test_new_method.py",
    "python scripts/capabilities.py": "run by .ci/run",
    "python scripts/bench.py": "test_bench.py",
    "chromium": "a browser",
    "vlmfix run": "plugin/clients/test_run.py and test_evaluators.py",
    "vlmfix serve": "plugin/clients/test_serve.py",
    "python -m lmms_eval": "plugin/clients/test_evaluators.py",
    "python scripts/app.py": "test_app.py",
    "pip install 'vlmfix[app,eval]'": "extras are tested by what needs them",
}
"""Commands that are not typed here, and where they are."""


def blocks(document: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", document.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def commands(document: Path) -> list[str]:
    text = "\n".join(blocks(document, "bash")).replace("\\\n", " ")
    return [line for line in text.splitlines() if not re.match(r"\s*(#|$)", line)]


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that the documents name."""
    bench = Bench(tmp_path_factory.mktemp("documents"))
    desk = bench.folder / "desk"
    (desk / "llava-hf").mkdir(parents=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLMFIX_CACHE", str(bench.folder / "cache"))
        model = testbed.model_folder("tiny")
        for name in ("MODEL", "llava-hf/llava-1.5-7b-hf"):
            (desk / name).symlink_to(model)
        (desk / "COCO_DIR").symlink_to(bench.coco)
        for name, folder in (("amber", "AMBER"), ("mme", "MME"), ("hallusionbench", "HB"), ("mmhal", "MMHAL")):
            (desk / f"{folder}_DIR").symlink_to(bench.benchmark_data[name])
        shutil.copytree(bench.benchmark_data["custom"].parent, desk, dirs_exist_ok=True)
        shutil.copy(bench.calibrated("act"), desk / "act.json")
    found = pictures(desk / "COCO_DIR")
    shutil.copy(found[0][0], desk / "1.jpg")
    shutil.copy(found[0][0], desk / "kitchen.jpg")
    ids = [image["id"] for image in json.loads((desk / "COCO_DIR/instances_val2014.json").read_text())["images"]]
    (desk / "evaluation_ids.txt").write_text(f"{max(ids) + 1}\n")
    for name, text in (("captions", "a dog and a cat"), ("greedy", "a dog and a car")):
        lines(desk / f"{name}.jsonl", [{"image_id": i, "caption": text} for i in ids])
    asked = [
        {"question_id": i, "image": f"{i}.jpg", "text": "Is there a dog in the image?", "label": label}
        for i, label in enumerate(("yes", "no"))
    ]
    lines(desk / "coco_pope_random.json", asked)
    lines(desk / "answers.jsonl", [{"question_id": row["question_id"], "answer": "yes"} for row in asked])
    parquet(mme_rows(desk / "MME_DIR"), desk / "mme.parquet")
    return desk


def mme_rows(folder: Path) -> list[dict[str, Any]]:
    """MME as evaluation tools keep it: one row per question."""
    rows = []
    for text in sorted(folder.rglob("*.txt")):
        task = next(
            part
            for part in (text.parent.name, text.parent.parent.name)
            if (folder / part).is_dir() and part != "questions_answers_YN"
        )
        image = next(folder.joinpath(task).rglob(f"{text.stem}.png"))
        for line in text.read_text().splitlines():
            question, answer = line.split("\t")
            rows.append(
                {
                    "question_id": f"{task}/{text.stem}.png",
                    "question": question,
                    "answer": answer,
                    "category": task,
                    "image": {"bytes": image.read_bytes(), "path": None},
                }
            )
    return rows


def parquet(rows: list[dict[str, Any]], path: Path) -> None:
    import datasets

    features = datasets.Features({key: datasets.Value("string") for key in rows[0]} | {"image": datasets.Image()})
    datasets.Dataset.from_list(rows, features=features).to_parquet(path)


def typed(command: str) -> tuple[list[str], list[str]]:
    """The words of a command without variables and comments, and what is typed: small, with patterns expanded."""
    words = [word for word in shlex.split(command, comments=True) if not re.fullmatch(r"[A-Z_]+=\S*", word)]
    small = [str(word) for word in SMALLER.get(words[1], ())] if words[0] == "vlmfix" else []
    return words, [each for word in words[1:] for each in (sorted(glob.glob(word)) or [word])] + small


CASES = [
    pytest.param(line, id=f"{named(path)}: {line.split('#')[0].strip()}")
    for path in DOCUMENTS
    for line in commands(path)
]


@pytest.mark.parametrize("command", CASES)
def test_commands(command: str, desk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(desk)
    monkeypatch.setenv("VLMFIX_CACHE", str(desk.parent / "cache"))
    words, arguments = typed(command)
    if any(" ".join(words).startswith(start.replace("'", "")) for start in SHELL):
        return
    assert words[0] == "vlmfix", f"nothing runs {command}"
    if "nltk" in words:
        if not (SHARED / "nltk_data").exists():
            pytest.skip("nltk's data are not beside the repository")
        import nltk

        monkeypatch.setattr(nltk.data, "path", [str(SHARED / "nltk_data")])
    if words[1] == "eval" and "--out" not in words:
        arguments += ["--out", str(tmp_path / "run")]
    said = say(*[word.replace("/tmp/run", str(tmp_path / "run")) for word in arguments])
    # So small a search may find nothing that helps.
    assert said.status == 0 or (words[1] == "tune" and "none of 2 settings lowers CHAIR_i" in said.err), said.err


IN_PYTHON = [path for path in DOCUMENTS if blocks(path, "python") and path.parent.name != "clients"]
"""Those of clients run in plugin/clients/test_clients_readme.py, with stand-ins for what is not installed."""


@pytest.mark.parametrize("document", IN_PYTHON, ids=named)
def test_python(document: Path, desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of a document, one after the other."""
    monkeypatch.chdir(desk)
    names = given(desk)
    model = names["model"]
    for block in blocks(document, "python"):
        with contextlib.redirect_stdout(io.StringIO()):
            exec(compile(block, named(document), "exec"), names)
    vlmfix.unpatch(model)


def given(desk: Path) -> dict[str, Any]:
    """What a reader has before the first line: a model, its processor, a picture and prompts about it."""
    from PIL import Image

    model, processor = testbed.load("tiny")
    image = Image.open(desk / "1.jpg")
    asked = ("Is there a dog in the image?", "Describe the image.")
    prompts = [PromptBuilder(processor)(text) for text in asked]
    inputs = encode(processor, prompts[:1], [image], model)
    yes_ids = processor.tokenizer.convert_tokens_to_ids(["yes"])
    return {
        "vlmfix": vlmfix,
        "model": model,
        "processor": processor,
        "image": image,
        "prompts": prompts,
        "inputs": inputs,
        "yes_ids": yes_ids,
    }
