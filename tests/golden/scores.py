"""What ``vlmfix score`` says about files: those that runs wrote, and real ones."""

from __future__ import annotations

import contextlib
import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from golden import data
from golden.bench import SHARED, Bench, digest, done, read


@contextlib.contextmanager
def nltk_data(*folders: Path) -> Iterator[None]:
    """Let nltk find its data in these folders only."""
    import nltk

    before, nltk.data.path = nltk.data.path, [str(folder) for folder in folders]
    try:
        yield
    finally:
        nltk.data.path = before


@nltk_data()
def score_files(bench: Bench) -> Any:
    """``vlmfix score`` on the files that runs wrote for the official scripts, without nltk's data."""
    official, own = bench.benchmarks / "official" / "pai", bench.benchmark_data
    captions = [{"image_id": i, "caption": text} for i, text in captions_of(bench, "vhr")]
    baseline = [{"image_id": i, "caption": text} for i, text in captions_of(bench, "none")]
    truth = {i: ["person", "dog", "cup", "pizza"][: 1 + i % 4] for i, _ in captions_of(bench, "none")}
    files = bench.folder / "files"
    files.mkdir()
    (files / "truth.json").write_text(json.dumps(truth))
    chair = [data.lines(files / "vhr.jsonl", captions), "--ground-truth", files / "truth.json"]
    rated = [{"rating": i % 7} for i in range(4)]
    asked = [
        {"question_id": i, "image": f"{i % 3}.jpg", "text": f"Is there a {w} in the image?", "label": label}
        for i, (w, label) in enumerate((w, label) for w in data.WORDS for label in ("yes", "no"))
    ]
    said = [{"question_id": i, "text": ("Yes, it is", "no", "Maybe")[zlib.crc32(b"%d" % i) % 3]} for i in range(16)]
    sure = [{"question_id": i, "answer": "yes" if i % 3 else "No.", "logit": i % 5 - 2} for i in range(16)]
    pope = ["--questions", data.lines(files / "coco_pope_random.json", asked)]
    said_file, sure_file = data.lines(files / "said.jsonl", said), data.lines(files / "sure.jsonl", sure)
    amber, figures_file = official / "amber.json", official / "HallusionBench_result.json"
    questions = own["hallusionbench"] / "HallusionBench.json"
    template = own["mmhal"] / "response_template.json"
    requests = files / "requests.jsonl"
    asked_of_a_judge = ("mmhal", official / "mmhal.json", "--questions", template, "--subset", "--requests", requests)
    done("score", *asked_of_a_judge)
    return {
        "mmhal, unjudged": [digest(row["prompt"]) for row in read(requests)],
        "chair": bench.scores("chair", *chair),
        "chair, compared": bench.scores("chair", *chair, "--baseline", data.lines(files / "none.jsonl", baseline)),
        "pope": bench.scores("pope", said_file, *pope),
        "pope, compared": bench.scores("pope", sure_file, *pope, "--baseline", said_file),
        "pope, with scores": bench.scores("pope", sure_file, *pope, "--scores", "logit"),
        "pope, by order": bench.scores("pope", said_file, *pope, "--by-order", "--parser", "vcd"),
        "pope, exported": bench.scores("pope", bench.run / "official" / "vcd" / "pope_popular.jsonl"),
        "amber": bench.scores("amber", amber, "--data", own["amber"] / "data", "--subset"),
        "hallusionbench": bench.scores("hallusionbench", figures_file, "--questions", questions, "--subset"),
        "mme": bench.scores("mme", official / "mme", "--subset"),
        "mmhal": bench.scores("mmhal", data.lines(files / "rated.jsonl", rated), "--by-order", "--questions", template),
    }


def captions_of(bench: Bench, method: str) -> list[tuple[int, str]]:
    """Image ids and captions of a method in the run with controls."""
    rows = read(bench.run / "answers.jsonl")
    return [(r["image_id"], r["text"]) for r in rows if r["benchmark"] == "chair" and r["method"] == method]


@nltk_data(SHARED / "nltk_data")
def score_shared(bench: Bench) -> Any:
    """``vlmfix score`` on real captions and answers."""
    chair, pope, truth = SHARED / "chair_captions", SHARED / "pope", SHARED / "chair_gt"
    pattern, tagged = (truth / f"chair_gt_{kind}_trainval2014.json.gz" for kind in ("pattern", "nltk"))
    greedy, ours = chair / "opera/llava-1.5_greedy.jsonl", chair / "opera/llava-1.5_ours.jsonl"
    released = json.loads(gzip.decompress((SHARED / "amber" / "responses_synthetic.json.gz").read_bytes()))
    rows = (
        released if isinstance(released, list) else [{"id": int(i), "response": text} for i, text in released.items()]
    )
    responses = data.lines(bench.folder / "amber.jsonl", rows)
    questions = SHARED / "hallusionbench" / "HallusionBench.json"
    judged = [{"judge": zlib.crc32(b"%d" % i) % 3} for i in range(len(read(questions)))]
    rated = [{"rating": zlib.crc32(b"%d" % i) % 7} for i in range(96)]
    template = SHARED / "mmhal_bench" / "response_template.json"
    by_id = SHARED / "new" / "pope" / "answers_by_id"
    answered = pope / "answers" / "paint_llava15_random_910.jsonl"
    asked = [pope / "questions_3000" / f"coco_pope_{split}.json" for split in ("random", "popular")]
    found = {
        "chair, original": bench.scores("chair", ours, "--ground-truth", pattern, "--baseline", greedy),
        "chair, nltk": bench.scores("chair", ours, "--ground-truth", tagged, "--mode", "nltk"),
        "chair, mixed": bench.scores("chair", greedy, "--ground-truth", pattern, "--mode", "mixed"),
        "amber": bench.scores("amber", responses, "--data", SHARED / "amber"),
        "hallusionbench": bench.scores(
            "hallusionbench", data.lines(bench.folder / "judged.jsonl", judged), "--by-order", "--questions", questions
        ),
        "mmhal": bench.scores(
            "mmhal", data.lines(bench.folder / "rated.jsonl", rated), "--by-order", "--questions", template
        ),
    }
    for name in ("r1-llava1.5-7b", "r2-vcd", "r3-opera"):
        found[f"chair, {name}"] = bench.scores("chair", chair / f"less_is_more/{name}.jsonl", "--ground-truth", pattern)
    for parser in ("official", "official_raw", "opera", "vcd", "lmms", "vlmeval"):
        found[f"pope, {parser}"] = bench.scores("pope", answered, "--parser", parser)
    for path in asked:
        split = path.stem.rpartition("_")[2]
        answers_file = by_id / f"llava-1.5-7b_greedy_{split}.jsonl"
        found[f"pope, {split}"] = bench.scores("pope", answers_file, "--questions", path)
    return found
