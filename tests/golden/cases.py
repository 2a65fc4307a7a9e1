"""The commands whose outputs are on file, and what is kept of each. Only the command line and public names are used."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import vlmfix
from golden import data
from golden.bench import CALIBRATED, HERE, SHARED, Bench, digest, digested, done, once, read
from golden.compare import figures, lasting_figures, visible_text
from golden.scores import nltk_data, score_files, score_shared
from golden.surface import help_texts, info, methods, public_names


def evaluation(bench: Bench, folder: Path, printed: str) -> dict[str, Any]:
    """What a run wrote: figures, settings, answers and the files for official scripts."""
    results, config = read(folder / "results.json"), read(folder / "config.json")
    texts, page = (folder / "report.md").read_text(), visible_text((folder / "report.html").read_text())
    reported = lasting_figures(texts)
    summary = re.sub(r"^## .* by .*\n(?:(?!## ).*\n)*", "", texts, flags=re.MULTILINE)
    assert not (lacking := set(lasting_figures(summary)) - set(figures(printed))), f"the terminal lacks {lacking}"
    assert not (lacking := set(reported) - set(figures(page))), f"the page lacks {lacking}"
    exported = sorted(path for path in (folder / "official").rglob("*") if path.is_file())
    for part in ("settings", "resolved"):  # In config.json as well.
        assert results.pop(part) == config[part]
    return bench.tidy(
        {
            "results": digested(results),
            "config": {key: config[key] for key in ("model", "data", "notes", "settings", "resolved")},
            "shown": once(reported),
            "official": {
                path.relative_to(folder / "official").as_posix(): digest(
                    path.read_text().replace(str(bench.folder), "")
                )
                for path in exported
            },
            "answers": answers(folder),
        }
    )


def answers(folder: Path) -> dict[str, Any]:
    """The captions by method, and per benchmark the texts' digest and the sum of the yes/no logits."""
    found: dict[str, Any] = {}
    for row in read(folder / "answers.jsonl"):
        if row["benchmark"] == "chair":
            found.setdefault(row["method"], {}).setdefault("captions", []).append([row["image_id"], row["text"]])
        part = found.setdefault(row["method"], {}).setdefault(row["benchmark"], {"texts": [], "scores": 0.0})
        part["texts"].append([row["image_id"], row["question"], row.get("second"), row["text"]])
        part["scores"] += row.get("score") or 0.0
    for parts in found.values():
        parts["captions"] = [text for _, text in sorted(parts.get("captions", []))]
        for part in parts.values():
            if isinstance(part, dict):
                part["texts"] = digest(json.dumps(sorted(part["texts"], key=str)))
    return found


def eval_default(bench: Bench) -> Any:
    """CHAIR and POPE with every kind of control."""
    return evaluation(bench, bench.run, (bench.folder / "run.txt").read_text())


def eval_counts(bench: Bench) -> Any:
    """Integer counts per image, from which a comparison is made."""
    counts = read(bench.other_run / "counts.json")
    return bench.tidy(digested(counts))


def eval_methods(bench: Bench) -> Any:
    """Every method that needs no calibration, on three images."""
    folder = bench.folder / "all"
    done("eval", "--method", "all", "--limit", 3, "--no-controls", "--out", folder)
    return method_rows(folder)


def eval_recipes(bench: Bench) -> Any:
    """Methods from recipes, as calibration wrote them."""
    folder = bench.folder / "recipes"
    recipes = [bench.calibrated(name) for name in CALIBRATED]
    done("eval", "--method", *recipes, "--limit", 3, "--no-controls", "--out", folder)
    return method_rows(folder)


def method_rows(folder: Path) -> dict[str, Any]:
    """Per method its answers and its integer counts."""
    rows, notes = answers(folder), read(folder / "results.json")["resolved"]
    return {
        row["label"]: {
            "counts": {"chair": row["chair"]["counts"], "pope": row["pope"]["all"]["counts"]},
            "layers": notes[row["label"]]["layers"],
            **rows[row["label"]],
        }
        for row in read(folder / "results.json")["methods"]
    }


def eval_benchmarks(bench: Bench) -> Any:
    """Sycophancy, own questions and the benchmarks of others, judged."""
    return evaluation(bench, bench.benchmarks, (bench.folder / "benchmarks.txt").read_text())


@nltk_data(SHARED / "nltk_data")
def eval_described(bench: Bench) -> Any:
    """AMBER with descriptions, whose nouns nltk tags, and captions matched by CHAIR's nltk mode."""
    amber = data.amber(bench.folder / "described", data.pictures(bench.coco), described=True)
    words = [
        "--limit",
        3,
        "--method",
        "vhr",
        "--set",
        "alpha=2.0",
        "--benchmark",
        "chair",
        "amber",
        "--no-controls",
        "--verbose",
    ]
    words += ["--chair-mode", "nltk", "--benchmark-data", f"amber={amber}", "--out", bench.folder / "nouns"]
    text = done("eval", *words)
    found = evaluation(bench, bench.folder / "nouns", text)
    official = bench.folder / "nouns" / "official" / "vhr" / "amber.json"
    kept = {"methods": found["results"]["methods"], "official": found["official"], "answers": found["answers"]}
    return {**kept, "score": bench.scores("amber", official, "--data", amber / "data", "--subset")}


def eval_coco(bench: Bench) -> Any:
    """A COCO folder, ids from a file, own prompts without the chat template."""
    ids = bench.folder / "ids.txt"
    known = [image["id"] for image in read(bench.coco / "instances_val2014.json")["images"]]
    ids.write_text("\n".join(map(str, known[1:])))
    words = ["--data", bench.coco, "--ids", ids, "--method", "vhr", "--set", "vhr.alpha=1.5", "select=all"]
    words += ["--no-chat-template", "--prompt", "USER: <image>\nPlease describe this image in detail. ASSISTANT:"]
    words += ["--pope-prompt", "USER: <image>\n{question} ASSISTANT:", "--max-new-tokens", 20, "--seed", 3]
    done("eval", *words, "--no-controls", "--out", bench.folder / "coco")
    return method_rows(bench.folder / "coco")


def compare(bench: Bench) -> Any:
    """Two runs, on what they share."""
    out = bench.folder / "compared"
    text = done("compare", bench.run, bench.other_run, "--out", out)
    markdown = lasting_figures((out / "compare.md").read_text())
    assert not (lacking := set(markdown) - set(figures(text))), f"the terminal lacks {lacking}"
    chosen = done("compare", bench.run, bench.other_run, "--against", "B:pai", "--method", "vhr", "pai")
    others = done("compare", bench.benchmarks)
    shown = {"shown": once(figures(text)), "chosen": once(figures(chosen)), "benchmarks": once(figures(others))}
    return bench.tidy({**shown, "file": read(out / "compare.json")})


def power(bench: Bench) -> Any:
    """With the default's assumed rates, and from a pilot."""
    pilot = done("power", bench.run, "--images", 50, 500, "--methods", 2, "--power", 0.9)
    return {"assumed": once(figures(done("power"))), "pilot": once(figures(pilot))}


def calibrate(bench: Bench) -> Any:
    """What every search finds on three scenes."""
    found = {name: read(bench.calibrated(name)) for name in CALIBRATED}
    for name in CALIBRATED:
        found[f"{name}, printed"] = re.findall(r"[a-z_]+ \d+", (bench.folder / f"{name}.txt").read_text())
    return bench.tidy(found)


def tune(bench: Bench) -> Any:
    """Three settings, one of which is good enough."""
    recipe = bench.folder / "tuned.json"
    words = ["--method", "vhr", "--budget", 3, "--limit", 10, "--confirm", 6, "--margin", 40]
    words += ["--range", "alpha=1.5:2.5", "--out", recipe, "--folder", bench.folder / "tune"]
    text = done("tune", *words)
    return bench.tidy({"shown": once(figures(text)), "recipe": read(recipe)})


def inspect_scene(bench: Bench) -> Any:
    """The words of a caption, the invented one, and the numbers of the page."""
    out = bench.folder / "page.html"
    text = done("inspect", "--scene", 356, "--method", "vhr", "--set", "alpha=2.0", "--out", out)
    page = out.read_text()
    said = re.findall(r"^\S.*?: (The image.*)$", text, re.MULTILINE)
    flagged = re.findall(r"(\d+) of (\d+) object words flagged(?: \(([^)]*)\))?", text)
    words = {word.strip(".") for caption in said for word in caption.split()}
    shown = visible_text(page)
    assert words <= set(re.findall(r"\w+", shown)), "every word of the captions is on the page"
    assert not re.search(r"(?:src|href)=.http", page), "the page refers to no other"
    return {"captions": said, "flagged": flagged, "shown": once(figures(shown))}


def trace_scene(bench: Bench) -> Any:
    """What a trace says, and the numbers of its page."""
    out = bench.folder / "trace.html"
    text = done("trace", "--scene", 356, "--object", "kite", "--out", out)
    page = out.read_text()
    assert not re.search(r"(?:src|href)=.http", page), "the page refers to no other"
    return {"said": text.splitlines()[:3], "cells": re.findall(r"<td[^>]*>([^<]*)</td>", page)}


def plot(bench: Bench) -> Any:
    """Which plots are drawn, and that each is a picture of some size."""
    from PIL import Image

    out = bench.folder / "plots"
    done("plot", bench.run, "--out", out)
    for path in out.iterdir():
        with Image.open(path) as image:
            assert image.format == "PNG" and min(image.size) >= 200, path
            assert len(image.convert("L").getcolors()) > 3, f"{path} is blank"
    return sorted(path.name for path in out.iterdir())


def patched(bench: Bench) -> Any:
    """What the embedded model says about a scene, stock, with every old recipe, and stock again."""
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from vlmfix.evals import testbed

    folder = Path(str(testbed.__file__)).parent / "model"
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype="float32")
    processor = AutoProcessor.from_pretrained(folder)
    prompt = "USER: <image>\nPlease describe this image in detail. ASSISTANT:"
    pictures = [Image.open(path) for path in sorted((bench.coco / "val2014").iterdir())[:2]]
    questions = [processor(text=[prompt], images=[picture], return_tensors="pt") for picture in pictures]

    def say_it(**how: Any) -> dict[str, Any]:
        given = [model.generate(**question, max_new_tokens=60, do_sample=False, **how) for question in questions]
        ids = [each["sequences"][0] if how else each[0] for each in given]
        texts = [processor.decode(each, skip_special_tokens=True).partition("ASSISTANT: ")[2] for each in ids]
        logits = [float(sum(step.max() for step in each["logits"])) for each in given] if how else []
        return {"texts": texts, "scores": logits}

    logits = {"return_dict_in_generate": True, "output_logits": True}
    found = {"stock": say_it(**logits)}
    patches: dict[str, tuple[Any, dict[str, Any]]] = {
        "old_recipe": (HERE / "old_recipe.json", {}),
        "old_calibration": (HERE / "old_calibration.json", {}),
        "opera": ("opera", {}),
        "cmai": ("cmai", {"experimental": True}),
        "modality_balance": ("modality_balance", {"experimental": True}),
        "vhr and pai": ([vlmfix.VHR(alpha=1.8), vlmfix.PAI(alpha=0.5)], {}),
    }
    for name, (what, parameters) in patches.items():
        vlmfix.patch(model, str(what) if isinstance(what, Path) else what, **parameters)
        found[name] = say_it() if name == "opera" else say_it(**logits)
        assert vlmfix.status(model).methods
    vlmfix.unpatch(model)
    assert say_it(**logits) == found["stock"]
    return found


CASES: dict[str, Callable[[Bench], Any]] = {
    case.__name__: case
    for case in (
        eval_default,
        eval_counts,
        eval_methods,
        eval_recipes,
        eval_benchmarks,
        eval_coco,
        eval_described,
        score_files,
        score_shared,
        compare,
        power,
        calibrate,
        tune,
        inspect_scene,
        trace_scene,
        plot,
        methods,
        info,
        patched,
        help_texts,
        public_names,
    )
}
NEED_SHARED = ("score_shared", "eval_described")
