"""Made-up copies of the benchmarks' folders in their real layouts, each of a few questions on scenes of the testbed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from families.saved_llava import write_lines

from vlmfix.evals.benchmarks.mme.figures import TASKS as MME_TASKS
from vlmfix.evals.benchmarks.mmhal.figures import TYPES
from vlmfix.evals.data.coco import CocoData
from vlmfix.evals.testbed import prepare

#: Objects that are both COCO's and AMBER's.
WORDS = ("dog", "cat", "person", "car", "bottle", "cup", "bird", "horse")


def scenes(number: int) -> list[tuple[Path, frozenset[str]]]:
    """Pictures of the testbed with what is in them."""
    data = CocoData.load(prepare("calibration", number))
    return [(data.image(i).path, data.objects(i)) for i in data.image_ids]


def ask(name: str) -> str:
    return f"Is there a {name} in the image?"


def amber(folder: Path, number: int = 3, *, described: bool = True) -> Path:
    """AMBER's repository with its images beside it."""
    (folder / "data" / "query").mkdir(parents=True)
    (folder / "image").mkdir()
    items: list[dict[str, Any]] = []
    queries: list[dict[str, Any]] = []

    def add(image: str, text: str, **item: Any) -> None:
        items.append({"id": len(items) + 1, **item})
        queries.append({"id": len(items), "image": image, "query": text})

    found = scenes(number)
    for index, (path, _) in enumerate(found, 1):
        shutil.copy(path, folder / "image" / f"AMBER_{index}.jpg")
    if described:
        for index, (_, objects) in enumerate(found, 1):
            truth = [word for word in WORDS if word in objects]
            invented = [word for word in WORDS if word not in objects][:2]
            add(f"AMBER_{index}.jpg", "Describe this image.", type="generative", truth=truth, hallu=invented)
    kinds = ("discriminative-hallucination", "discriminative-attribute-state", "discriminative-relation")
    for kind in (*kinds, "discriminative-attribute-number", "discriminative-attribute-action"):
        for index, (_, objects) in enumerate(found, 1):
            word = WORDS[index]
            truth = "yes" if word in objects and "hallucination" not in kind else "no"
            add(f"AMBER_{index}.jpg", f"{ask(word)} Look at its {kind.rpartition('-')[2]}.", type=kind, truth=truth)
    (folder / "data" / "annotations.json").write_text(json.dumps(items))
    (folder / "data" / "query" / "query_all.json").write_text(json.dumps(queries))
    (folder / "data" / "relation.json").write_text(json.dumps({word: [] for word in WORDS}))
    (folder / "data" / "safe_words.txt").write_text("picture\n")
    return folder


def mme(folder: Path, number: int = 3) -> Path:
    """MME's release: two tasks with everything in one folder, two with a folder of texts and one of images."""
    for place, task in enumerate(MME_TASKS):
        texts = folder / task / ("questions_answers_YN" if place % 2 else "")
        images = folder / task / ("images" if place % 2 else "")
        texts.mkdir(parents=True, exist_ok=True)
        images.mkdir(parents=True, exist_ok=True)
        for index, (path, objects) in enumerate(scenes(number)):
            shutil.copy(path, images / f"{index:04d}.png")
            pair = (sorted(objects)[place % len(objects)], next(w for w in WORDS if w not in objects))
            lines = [f"{ask(w)} Please answer yes or no.\t{'Yes' if w in objects else 'No'}" for w in pair]
            (texts / f"{index:04d}.txt").write_text("\n".join(lines) + "\n")
    (folder / "OCR").mkdir()
    return folder


def hallusionbench(folder: Path, number: int = 3) -> Path:
    """HallusionBench: per set an original and an edited figure; the sets of category VS have no original figure."""
    rows = []
    found = scenes(2 * number)
    for set_id in range(number):
        category = "VS" if set_id % 2 else "VD"
        for figure in (0, 1):
            path, objects = found[2 * set_id + figure]
            name = None if category == "VS" and figure == 0 else f"./{category}/map/{set_id}_{figure}.png"
            if name is not None:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, folder / name)
            for question in (0, 1):
                word = WORDS[question + set_id]
                rows.append(
                    {
                        "category": category,
                        "subcategory": "map",
                        "visual_input": "0" if name is None else str(1 + figure),
                        "set_id": str(set_id),
                        "figure_id": str(figure),
                        "sample_note": "",
                        "question_id": str(question),
                        "question": f"{ask(word)} Set {set_id}. Please answer yes or no.",
                        "gt_answer_details": f"There is {'a' if word in objects else 'no'} {word}.",
                        "gt_answer": str(int(word in objects)),
                        "filename": name,
                    }
                )
    (folder / "HallusionBench.json").write_text(json.dumps(rows))
    return folder


def mmhal(folder: Path, number: int = 3) -> Path:
    """MMHal-Bench's template with images under the names in their addresses."""
    folder.mkdir(parents=True)
    rows = []
    for index, (path, objects) in enumerate(scenes(number)):
        shutil.copy(path, folder / f"{index}_o.jpg")
        rows.append(
            {
                "question_type": TYPES[index % len(TYPES)],
                "question_topic": "outdoor",
                "image_id": f"{index:016x}",
                "image_src": f"https://example.org/{index}_o.jpg",
                "image_content": sorted(objects),
                "question": "What is in the image?",
                "gt_answer": f"There are {', '.join(sorted(objects))}.",
                "model_answer": "",
            }
        )
    (folder / "response_template.json").write_text(json.dumps(rows))
    return folder


def custom(folder: Path, number: int = 3, *, more: Sequence[dict[str, Any]] = ()) -> Path:
    """A file of questions of one's own, yes/no, free, and without an image."""
    folder.mkdir(parents=True)
    rows: list[dict[str, Any]] = []
    for index, (path, objects) in enumerate(scenes(number)):
        shutil.copy(path, folder / f"{index}.png")
        for word in (sorted(objects)[0], next(w for w in WORDS if w not in objects)):
            rows.append({"image": f"{index}.png", "question": ask(word), "answer": "yes" if word in objects else "No."})
        rows.append(
            {"image": f"{index}.png", "question": "What is in the image?", "answer": sorted(objects), "id": index}
        )
    rows.append({"question": "Is there a dog in the image?", "answer": "no"})
    return write_lines(folder / "questions.jsonl", [*rows, *more])
