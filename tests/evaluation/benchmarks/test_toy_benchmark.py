"""A benchmark of another package: one file and an entry point, and every verb knows it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import benchmark_data
import pytest
from run_folders import read

from vlmfix.cli import main
from vlmfix.errors import VlmfixError
from vlmfix.evals.benchmarks.registry import benchmark_class, benchmark_names

TOY = '''"""Toy: does the model see the things that a file asks about?"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vlmfix.errors import DataError
from vlmfix.evals.benchmarks.base import Benchmark, distinct, texts, write_lines
from vlmfix.evals.benchmarks.yes_no import ACCURACY, YES_RATIO, parse_answer, yes_no_columns
from vlmfix.evals.data.records import read_rows, text_of
from vlmfix.evals.data.samples import Answer, Sample
from vlmfix.evals.data.source import image_number
from vlmfix.evals.data.write import digest
from vlmfix.evals.stats.figures import Figure, share
from vlmfix.evals.stats.table import Table


@dataclass(frozen=True)
class Toy(Benchmark):
    name = "toy"
    title = "Toy"
    summary = "things in pictures, from a file"
    figures = (
        Figure("right", "right", 1, ACCURACY, control="yes bias", head_control=True, headline=True),
        Figure("yes", "yes", 0, YES_RATIO),
        Figure("whole", "whole", 1, share("whole_right", "whole"), help="images with every answer right"),
        Figure("letters", "letters", 0, share("letters"), percent=False, column=False),
    )
    matched_on = {"yes bias": "yes"}

    rows: tuple
    samples: tuple
    prompt: str

    @classmethod
    def make(cls, options, data):
        return cls.of(Path(data.own(cls.name)), options.limit, options.prompt_of.get(cls.name, "{question}"))

    @classmethod
    def of(cls, path, limit=None, prompt="{question}"):
        rows = tuple(row for _, row in read_rows(path))[:limit]
        samples = [
            Sample(cls.name, image_number(cls.name, image), path.parent / image, prompt.replace("{question}", question))
            for image, question in ((row["image"], row["question"]) for row in rows)
        ]
        return cls(rows, distinct(samples), prompt)

    def settings(self):
        return {"prompt": self.prompt, "questions": digest([dict(row) for row in self.rows])}

    def score(self, answers):
        said = texts(self.samples, answers)
        scores = [answers[sample.key].score for sample in self.samples]
        labels = [row["answer"] == "yes" for row in self.rows]
        columns = yes_no_columns(labels, [parse_answer(text, "vlmeval") for text in said], scores)
        ids = np.asarray([sample.image_id for sample in self.samples])
        first = np.asarray([i not in ids[:row] for row, i in enumerate(ids)])
        whole = np.asarray([columns["correct"][ids == i].all() for i in ids])
        columns |= {"whole": first, "whole_right": first & whole, "letters": np.asarray([len(t) for t in said])}
        return Table(ids, columns, items=tuple(r["question"] for r in self.rows))

    def counts(self, table):
        return {"n": len(table), "right": int(table.correct.sum()), "unparsed": int(table.unparsed.sum())}

    def export(self, folder, answers):
        said = texts(self.samples, answers)
        write_lines(folder / "toy.jsonl", [{"n": i, "said": text} for i, text in enumerate(said)])

    @classmethod
    def add_score_arguments(cls, parser):
        parser.add_argument("--questions", type=Path, required=True, help="the file of questions")

    @classmethod
    def from_files(cls, path, options):
        task = cls.of(options.questions)
        said = [text_of(row, where, ("said",)) for where, row in read_rows(path)]
        if len(said) != len(task.samples):
            raise DataError(f"{path} has {len(said)} answers to {len(task.samples)} questions")
        return task, {s.key: Answer(t, (), False, (), None, 0.0) for s, t in zip(task.samples, said)}
'''


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package with the benchmark as it lies when it is installed."""
    folder = tmp_path / "site"
    (folder / "toy-1.0.dist-info").mkdir(parents=True)
    (folder / "toy_benchmark.py").write_text(TOY)
    (folder / "toy-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n")
    (folder / "toy-1.0.dist-info" / "entry_points.txt").write_text("[vlmfix.benchmarks]\ntoy = toy_benchmark:Toy\n")
    monkeypatch.syspath_prepend(str(folder))
    benchmark_class.cache_clear()
    yield folder
    benchmark_class.cache_clear()


def questions(folder: Path) -> Path:
    """Two questions about each of six scenes."""
    scenes = benchmark_data.scenes(6)
    rows: list[dict[str, Any]] = []
    for path, objects in scenes:
        (folder / path.name).write_bytes(path.read_bytes())
        asked = {sorted(objects)[0]: "yes", next(n for n in ("dog", "car", "cat", "boat") if n not in objects): "no"}
        rows += [
            {"image": path.name, "question": f"Is there a {n} in the image?", "answer": a} for n, a in asked.items()
        ]
    file = folder / "toy_questions.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_one_file_is_a_benchmark(package: Path, tmp_path: Path, capsys: Any) -> None:
    assert TOY.count("\n") < 120 and "toy" in benchmark_names()
    file, out = questions(tmp_path), tmp_path / "run"
    words = ["eval", "--benchmark", "toy", "--benchmark-data", f"toy={file}", "--method", "vhr", "--set", "alpha=3"]
    assert main([*words, "--out", str(out), "--verbose"]) == 0
    told = capsys.readouterr().out
    assert "TOY" in told and "right ↑" in told and "whole ↑" in told
    results = read(out)
    none, vhr, *_ = results["methods"]
    assert none["toy"]["counts"]["n"] == 12 and none["toy"]["summary"]["right"] == none["toy"]["counts"]["right"] / 12
    assert set(vhr["differences"]) == {"toy.right", "toy.yes", "toy.whole"} and none["toy"]["summary"]["letters"] > 0
    lines = {(line["control"], line["metric"]) for line in results["controls"] if line["method"] == "vhr"}
    assert lines == {(control, "toy.right") for control in ("yes bias", "every head", "other heads")}
    assert "TOY right ↑" in (out / "report.md").read_text() and "TOY" in (out / "report.html").read_text()

    scored = tmp_path / "scored.json"
    exported = [str(out / "official" / label / "toy.jsonl") for label in ("vhr", "none")]
    words = ["score", "toy", exported[0], "--questions", str(file), "--baseline", exported[1], "--out", str(scored)]
    assert main(words) == 0
    told, found = capsys.readouterr().out, json.loads(scored.read_text())
    assert "right ↑" in told and found["counts"] == vhr["toy"]["counts"]
    assert found["baseline"]["differences"]["toy.right"]["low"] == vhr["differences"]["toy.right"]["low"]

    assert main(["compare", str(out), "--out", str(tmp_path / "c.json")]) == 0
    assert "TOY on 12 questions about 6 images" in capsys.readouterr().out
    compared = json.loads((tmp_path / "c.json").read_text())
    assert compared["methods"][1]["differences"]["toy.right"]["high"] == vhr["differences"]["toy.right"]["high"]
    assert [line["verdict"] for line in compared["controls"]] == [line["verdict"] for line in results["controls"]]


def test_a_package_that_is_no_benchmark_is_named(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    folder = tmp_path / "other"
    shutil.copytree(package / "toy-1.0.dist-info", folder / "other-1.0.dist-info")
    named = "[vlmfix.benchmarks]\nbroken = broken_benchmark:Toy\nmine = json:JSONDecoder\n"
    (folder / "other-1.0.dist-info" / "entry_points.txt").write_text(named)
    (folder / "other-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 1.0\n")
    (folder / "broken_benchmark.py").write_text("import nothing_of_this_name\n")
    monkeypatch.syspath_prepend(str(folder))
    assert {"toy", "broken", "mine", "chair"} <= {*benchmark_names()}
    with pytest.raises(VlmfixError, match=r"broken \(broken_benchmark:Toy\) cannot be imported: ModuleNotFoundError"):
        benchmark_class("broken")
    with pytest.raises(VlmfixError, match="json:JSONDecoder, which is no Benchmark with name = 'mine'"):
        benchmark_class("mine")
    assert main(["score", "broken", "x.jsonl"]) == 2 and "cannot be imported" in capsys.readouterr().err
    assert main(["eval", "--benchmark", "mine"]) == 2 and "no Benchmark" in capsys.readouterr().err
