"""Small benchmarks with answers whose meaning is known, and what happens to files of answers on their way to us."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from families.saved_llava import write_lines

Rows = list[dict[str, Any]]

YES = ("Yes", "yes", "Yes.", "Yes, there is one.")
NO = ("No", "no", "No.", "No, there is nothing of that kind.")


@dataclass(frozen=True)
class World:
    """A benchmark of a few questions.

    Attributes:
        verb: Its name.
        words: What is typed behind the file of answers.
        ids: What names each question in a file of answers.
        asked: What may stand beside an answer as well: the question, its image.
        truth: The right answer of each question, under the name that the benchmark gives it.
        said: What a model may say to each question -> what it means.
        figures: What the result says; compared with what ``expected`` makes of the meanings.
        expected: From the meaning of the answer to each question, by its place.
        labels: Whether the truth comes from the rows alone.
    """

    verb: str
    words: Sequence[str]
    ids: Rows
    asked: Rows
    truth: Rows
    said: Sequence[Mapping[str, Any]]
    figures: Callable[[Any], Any]
    expected: Callable[[Mapping[int, Any]], Any]
    labels: bool = False


def _binary(number: int) -> list[dict[str, bool]]:
    return [{**dict.fromkeys(YES, True), **dict.fromkeys(NO, False)} for _ in range(number)]


def _cells(labels: Sequence[bool]) -> Callable[[Mapping[int, bool]], dict[str, int]]:
    """The confusion matrix, counted one by one."""

    def count(meant: Mapping[int, bool]) -> dict[str, int]:
        cells = Counter("FT"[said == labels[i]] + "NP"[said] for i, said in meant.items())
        return {name: cells[name] for name in ("TP", "FP", "TN", "FN")}

    return count


def _read_cells(counts: Mapping[str, Any]) -> dict[str, int]:
    return {name: counts[name] for name in ("TP", "FP", "TN", "FN")}


THINGS = ("person", "kite", "dog", "sink", "chair", "car", "cat", "boat", "bus", "cake", "clock", "bear")


def pope(folder: Path, *, labels: bool = False, splits: Sequence[str] = ("random",)) -> World:
    """POPE with question files of one or two splits, or with labels in the rows."""
    made = []
    for place, split in enumerate(splits):
        rows = [
            {"question_id": i + 1, "image": f"COCO_val2014_{900001 + i // 3:012}.jpg"}
            | {"text": f"Is there a {thing} in the image?", "label": ("yes", "no")[(i + i // 3) % 2]}
            for i, thing in enumerate(THINGS[place:] + THINGS[:place])
        ]
        write_lines(folder / f"coco_pope_{split}.json", rows)
        made += [(split, row) for row in rows]
    truth = [row["label"] == "yes" for _, row in made]
    ids = [{"question_id": row["question_id"]} | ({"split": s} if len(splits) > 1 else {}) for s, row in made]
    asked = [{"question": row["text"], "image": row["image"]} for _, row in made]
    files = [str(folder / f"coco_pope_{split}.json") for split in splits]

    def figures(result: Any) -> dict[str, int]:
        return dict(sum((Counter(_read_cells(part["counts"])) for part in result["splits"].values()), Counter(_ZERO)))

    if labels:
        ids = [{**row, **more} for row, more in zip(ids, asked, strict=True)]
    return World(
        "pope",
        [] if labels else ["--questions", *files],
        ids,
        asked,
        [{"label": row["label"]} for _, row in made],
        _binary(len(made)),
        lambda result: {**dict.fromkeys(_ZERO, 0), **figures(result)},
        _cells(truth),
        labels,
    )


_ZERO = {"TP": 0, "FP": 0, "TN": 0, "FN": 0}


def chair(folder: Path) -> World:
    """CHAIR of eight images; the meaning of a caption is which objects it names."""
    there = [["dog"], ["cat", "chair"], [], ["car"], ["dog", "cat"], ["boat"], ["cake"], ["chair"]]
    truth = {str(11 + i): objects for i, objects in enumerate(there)}
    (folder / "truth.json").write_text(json.dumps({"mode": "original", "objects": truth}))
    said = {
        "A dog on the grass.": ["dog"],
        "A cat and a chair.": ["cat", "chair"],
        "Two boats near a car.": ["boat", "car"],
        "Nothing of note.": [],
        "A cake.": ["cake"],
    }

    def expected(meant: Mapping[int, Sequence[str]]) -> dict[int, tuple[list[str], list[str]]]:
        return {11 + i: (sorted(m), sorted(set(m) - set(there[i]))) for i, m in meant.items()}

    return World(
        "chair",
        ["--ground-truth", str(folder / "truth.json"), "--mode", "original"],
        [{"image_id": 11 + i} for i in range(len(there))],
        [{"prompt": "Please describe this image in detail."} for _ in there],
        [{} for _ in there],
        [said] * len(there),
        lambda result: {
            row["image_id"]: (sorted(row["mentions"]), sorted({_SINGULAR.get(w, w) for w in row["hallucinated"]}))
            for row in result["sentences"]
        },
        expected,
    )


_SINGULAR = {"boats": "boat"}


def amber(folder: Path) -> World:
    """The questions of AMBER."""
    kinds = ("discriminative-hallucination", "discriminative-attribute-state", "discriminative-relation")
    labels = [i % 3 != 1 for i in range(9)]
    annotations = [
        {"id": i + 1, "type": kinds[i // 3], "truth": "yes" if label else "no"} for i, label in enumerate(labels)
    ]
    queries = [
        {"id": i + 1, "image": f"AMBER_{i + 1}.jpg", "query": f"Is the {THINGS[i]} there?"} for i in range(len(labels))
    ]
    (folder / "annotations.json").write_text(json.dumps(annotations))
    (folder / "relation.json").write_text(json.dumps({"sky": []}))
    (folder / "safe_words.txt").write_text("lamp")
    (folder / "query").mkdir()
    (folder / "query" / "query_all.json").write_text(json.dumps(queries))
    return World(
        "amber",
        ["--data", str(folder)],
        [{"id": i + 1} for i in range(len(labels))],
        [{"query": row["query"], "image": row["image"]} for row in queries],
        [{"truth": "yes" if label else "no"} for label in labels],
        [{"Yes": True, "No": False}] * len(labels),  # The official rule reads nothing else.
        lambda result: result["counts"]["qa_correct_score"],
        lambda meant: sum(said == labels[i] for i, said in meant.items()),
    )


def mme(folder: Path) -> World:
    """Two tasks of MME, whose rows bring their questions and labels."""
    ids, truth = [], []
    for i in range(12):
        task = ("existence", "color")[i // 6]
        ids.append({"task": task, "image": f"{i // 2}.jpg", "question": f"Is it {THINGS[i]}? Please answer yes or no."})
        truth.append({"label": ("Yes", "No")[i % 2]})

    def expected(meant: Mapping[int, bool]) -> dict[str, tuple[int, int]]:
        good = [i in meant and meant[i] == (i % 2 == 0) for i in range(12)]
        return {
            task: (sum(good[start : start + 6]), sum(good[i] and good[i + 1] for i in range(start, start + 6, 2)))
            for task, start in (("existence", 0), ("color", 6))
            if any(start <= i < start + 6 for i in meant)
        }

    return World(
        "mme",
        ["--subset"],
        ids,
        [{"image": row["image"]} for row in ids],
        truth,
        _binary(len(ids)),
        lambda result: {
            task: (part["counts"]["correct"], part["counts"]["both_correct"]) for task, part in result["tasks"].items()
        },
        expected,
        labels=True,
    )


def hallusionbench(folder: Path) -> World:
    """Two figures of HallusionBench with four questions each."""
    rows = [
        {"category": "VD", "subcategory": "chart", "set_id": "0", "figure_id": str(i // 4), "question_id": str(i % 4)}
        | {"visual_input": "1" if i < 4 else "2", "question": f"Is the {THINGS[i]} there?", "gt_answer_details": "-"}
        | {"gt_answer": str((i + i // 4) % 2), "filename": f"./VD/chart/0_{i // 4}.png"}
        for i in range(8)
    ]
    (folder / "HallusionBench.json").write_text(json.dumps(rows))
    names = ("category", "subcategory", "set_id", "figure_id", "question_id")
    return World(
        "hallusionbench",
        ["--questions", str(folder / "HallusionBench.json")],
        [{name: row[name] for name in names} for row in rows],
        [{"question": row["question"], "filename": row["filename"]} for row in rows],
        [{"gt_answer": row["gt_answer"]} for row in rows],
        _binary(len(rows)),
        lambda result: round(result["figures"]["aAcc"], 6),
        lambda meant: round(100 * sum(said == bool((i + i // 4) % 2) for i, said in meant.items()) / len(meant), 6),
    )


def dashb(folder: Path) -> World:
    """Four images with the object and four without."""
    things = ("kettle", "boat")
    lists = {side: {"coco": {thing: [f"{i}.jpg" for i in range(2)] for thing in things}} for side in ("neg", "pos")}
    for side, value in lists.items():
        (folder / f"dash_benchmark_{side}.json").write_text(json.dumps(value))
    keys = [(side, thing, i) for side in lists for thing in things for i in range(2)]
    return World(
        "dashb",
        ["--questions", *(str(folder / f"dash_benchmark_{side}.json") for side in lists)],
        [
            {"dataset": "coco", "object_name": thing, "img_id": f"{i}.jpg", "gt": "yes" if side == "pos" else "no"}
            for side, thing, i in keys
        ],
        [{"question": f"Can you see a {thing} in this image?"} for _, thing, _ in keys],
        [{} for _ in keys],
        _binary(len(keys)),
        lambda result: _read_cells(result["counts"]),
        _cells([side == "pos" for side, _, _ in keys]),
    )


def mmvp(folder: Path) -> World:
    """Four pairs of MMVP."""
    options = [f"(a) {THINGS[i // 2]} (b) {THINGS[i // 2 + 4]}" for i in range(8)]
    right = [i % 4 in (0, 3) for i in range(8)]
    lines = [f"{i + 1},Which is it {i // 2}?,{options[i]},{'(a)' if right[i] else '(b)'}" for i in range(8)]
    (folder / "Questions.csv").write_text("\n".join(["Index,Question,Options,Correct Answer", *lines]) + "\n")

    def expected(meant: Mapping[int, bool]) -> tuple[int, int]:
        good = [i in meant and meant[i] == right[i] for i in range(8)]
        return sum(good), sum(good[i] and good[i + 1] for i in range(0, 8, 2))

    return World(
        "mmvp",
        ["--questions", str(folder / "Questions.csv"), "--parser", "lmms"],
        [{"question_id": i + 1} for i in range(8)],
        [{"prompt": f"Which is it {i // 2}? {options[i]}"} for i in range(8)],
        [{"answer": "(a)" if label else "(b)"} for label in right],
        [{"(a)": True, "(b)": False, "a": True, "b": False, "A": True, "B": False}] * 8,
        lambda result: (result["counts"]["correct"], result["counts"]["pairs_correct"]),
        expected,
    )


def naturalbench(folder: Path) -> World:
    """Three groups of NaturalBench, one with options."""
    rows = []
    for i in range(12):
        kind = "multiple_choice" if i // 4 == 2 else "yes_no"
        right = (("Yes", "No") if kind == "yes_no" else ("A", "B"))[(i % 4) in (1, 2)]
        rows.append({"Index": i, "Question": f"Which {i // 4} {i % 2}?", "Answer": right, "Question_Type": kind})
    path = write_lines(folder / "questions.jsonl", rows)
    said = [
        {"A": True, "B": False, "A.": True, "B.": False} if row["Question_Type"] != "yes_no" else _binary(1)[0]
        for row in rows
    ]

    def expected(meant: Mapping[int, bool]) -> tuple[int, int]:
        good = [i in meant and meant[i] == ((i % 4) not in (1, 2)) for i in range(12)]
        return sum(good), sum(all(good[i : i + 4]) for i in range(0, 12, 4))

    return World(
        "naturalbench",
        ["--questions", str(path)],
        [{"Index": row["Index"]} for row in rows],
        [{"Question": row["Question"]} for row in rows],
        [{"Answer": row["Answer"]} for row in rows],
        said,
        lambda result: (
            round(result["summary"]["acc"] * result["counts"]["n"]),
            round(result["summary"]["g_acc"] * result["counts"]["groups"]),
        ),
        expected,
    )


def mmstar(folder: Path) -> World:
    """Six questions of MMStar, which a file of answers brings."""
    rows = [
        {"index": i, "question": f"Which one {i}?", "answer": "ABCD"[i % 4], "category": "math"}
        | {"l2_category": "geometry"}
        for i in range(6)
    ]
    return World(
        "mmstar",
        ["--subset"],
        rows,
        [{} for _ in rows],
        [{} for _ in rows],
        [{**{x: x for x in "ABCD"}, **{f"{x}.": x for x in "ABCD"}}] * 6,
        lambda result: (result["counts"]["n"], result["counts"]["correct"]),
        lambda meant: (len(meant), sum(said == "ABCD"[i % 4] for i, said in meant.items())),
        labels=True,
    )


def scienceqa(folder: Path) -> World:
    """Eight problems of ScienceQA with LLaVA's rows."""
    problems = {
        str(100 + i): {"question": f"Which, {THINGS[i]}?", "choices": ["one", "two", "three"], "answer": i % 3}
        | {"hint": "", "image": None, "split": "test"}
        for i in range(8)
    }
    (folder / "problems.json").write_text(json.dumps(problems))
    return World(
        "scienceqa",
        ["--questions", str(folder / "problems.json")],
        [{"question_id": number} for number in problems],
        [{"prompt": f"{row['question']}\nA. one\nB. two\nC. three"} for row in problems.values()],
        [{} for _ in problems],
        [{**{x: x for x in "ABC"}, **{f"{x}. one": x for x in "ABC"}}] * 8,
        lambda result: (result["counts"]["n"], result["counts"]["correct"]),
        lambda meant: (len(meant), sum(said == "ABC"[i % 3] for i, said in meant.items())),
    )


def worlds(folder: Path) -> dict[str, World]:
    """Every benchmark that reads files of answers without a judge."""
    made: dict[str, Callable[[Path], World]] = {
        "pope": pope,
        "pope, two splits": lambda path: pope(path, splits=("random", "popular")),
        "pope, labels": lambda path: pope(path, labels=True),
        **{f.__name__: f for f in (chair, amber, mme, hallusionbench, dashb, mmvp, naturalbench, mmstar, scienceqa)},
    }
    found = {}
    for name, make in made.items():
        own = folder / name.replace(", ", "_").replace(" ", "_")
        own.mkdir()
        found[name] = make(own)
    return found
