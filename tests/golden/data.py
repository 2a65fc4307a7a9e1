"""Small made-up copies of the benchmarks' folders, in their real layouts, about pictures whose objects are known."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

#: Objects that are both COCO's and AMBER's.
WORDS = ("dog", "cat", "person", "car", "bottle", "cup", "bird", "horse")
MME_TASKS = ("existence", "count", "position", "color")
MMHAL_TYPES = ("attribute", "adversarial", "comparison", "counting")


Pictures = Sequence[tuple[Path, Sequence[str]]]
"""Each with the names of its objects, sorted."""


def pictures(coco: Path) -> Pictures:
    """Those of a COCO folder, in the order of the ids."""
    found = json.loads((coco / "instances_val2014.json").read_text())
    names = {category["id"]: category["name"] for category in found["categories"]}
    objects: dict[int, set[str]] = {image["id"]: set() for image in found["images"]}
    for note in found["annotations"]:
        objects[note["image_id"]].add(names[note["category_id"]])
    files = {image["id"]: coco / "val2014" / image["file_name"] for image in found["images"]}
    return [(files[i], sorted(objects[i])) for i in sorted(files)]


def ask(name: str) -> str:
    return f"Is there a {name} in the image?"


def _absent(objects: Sequence[str]) -> str:
    return next(word for word in WORDS if word not in objects)


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(source, target)


def _write(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
    return path


def lines(path: Path, rows: Sequence[Any]) -> Path:
    """Write JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def amber(folder: Path, found: Pictures, *, described: bool) -> Path:
    """AMBER's repository with its images; ``described`` adds descriptions, which need nltk's data."""
    items: list[dict[str, Any]] = []
    queries: list[dict[str, Any]] = []

    def add(image: str, query: str, **item: Any) -> None:
        items.append({"id": len(items) + 1, **item})
        queries.append({"id": len(items), "image": image, "query": query})

    for index, (path, objects) in enumerate(found):
        name = f"AMBER_{index + 1}.jpg"
        _copy(path, folder / "image" / name)
        if described:
            invented = [word for word in WORDS if word not in objects][:2]
            truth = [word for word in WORDS if word in objects]
            add(name, "Describe this image.", type="generative", truth=truth, hallu=invented)
    for kind in ("hallucination", "attribute-state", "relation", "attribute-number", "attribute-action"):
        for index, (_, objects) in enumerate(found):
            word = objects[0] if index % 2 and kind != "hallucination" else _absent(objects)
            query = f"{ask(word)} Look at its {kind.rpartition('-')[2]}."
            truth = "yes" if word in objects else "no"
            add(f"AMBER_{index + 1}.jpg", query, type=f"discriminative-{kind}", truth=truth)
    _write(folder / "data" / "annotations.json", items)
    _write(folder / "data" / "query" / "query_all.json", queries)
    _write(folder / "data" / "relation.json", {word: [] for word in WORDS})
    (folder / "data" / "safe_words.txt").write_text("picture\n")
    return folder


def mme(folder: Path, found: Pictures) -> Path:
    """MME's release: two tasks with everything in one folder, two with texts and images apart."""
    for place, task in enumerate(MME_TASKS):
        texts = folder / task / ("questions_answers_YN" if place % 2 else "")
        images = folder / task / ("images" if place % 2 else "")
        texts.mkdir(parents=True, exist_ok=True)
        for index, (path, objects) in enumerate(found):
            _copy(path, images / f"{index:04d}.png")
            pair = (objects[place % len(objects)], _absent(objects))
            rows = [f"{ask(w)} Please answer yes or no.\t{'Yes' if w in objects else 'No'}\n" for w in pair]
            (texts / f"{index:04d}.txt").write_text("".join(rows))
    (folder / "OCR").mkdir()
    return folder


def hallusionbench(folder: Path, found: Pictures) -> Path:
    """HallusionBench: sets of an original and an edited figure; sets of category VS have no original figure."""
    rows = []
    for place, (path, objects) in enumerate(found):
        set_id, figure = divmod(place, 2)
        category = "VS" if set_id % 2 else "VD"
        name = None if category == "VS" and figure == 0 else f"./{category}/map/{set_id}_{figure}.png"
        if name is not None:
            _copy(path, folder / name)
        for question, word in enumerate((found[2 * set_id][1][0], _absent(objects))):
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
                    "gt_answer_details": "",
                    "gt_answer": str(int(word in objects)),
                    "filename": name,
                }
            )
    _write(folder / "HallusionBench.json", rows)
    return folder


def mmhal(folder: Path, found: Pictures) -> Path:
    """MMHal-Bench's template with images under the names in their addresses."""
    rows = []
    for index, (path, objects) in enumerate(found):
        _copy(path, folder / f"{index}_o.jpg")
        rows.append(
            {
                "question_type": MMHAL_TYPES[index % len(MMHAL_TYPES)],
                "question_topic": "outdoor",
                "image_id": f"{index:016x}",
                "image_src": f"https://example.org/{index}_o.jpg",
                "image_content": list(objects),
                "question": "What is in the image?",
                "gt_answer": f"There are {', '.join(objects)}.",
                "model_answer": "",
            }
        )
    _write(folder / "response_template.json", rows)
    return folder


def custom(folder: Path, found: Pictures, *, more: Sequence[dict[str, Any]] = ()) -> Path:
    """A file of the user's own questions: yes/no, free, and without an image."""
    rows: list[dict[str, Any]] = [{"question": "Is there a dog in the image?", "answer": "no"}]
    for index, (path, objects) in enumerate(found):
        _copy(path, folder / f"{index}.png")
        for word in (objects[0], _absent(objects)):
            rows.append({"image": f"{index}.png", "question": ask(word), "answer": "yes" if word in objects else "No."})
        rows.append(
            {"image": f"{index}.png", "question": "What is in the image?", "answer": list(objects), "id": index}
        )
    return lines(folder / "questions.jsonl", [*rows, *more])
