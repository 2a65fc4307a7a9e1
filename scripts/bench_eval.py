"""How many answers per second an evaluation gives, method by method, and what each way of sharing work is worth.

    OMP_NUM_THREADS=1 python scripts/bench_eval.py                                  # the embedded model
    OMP_NUM_THREADS=1 python scripts/bench_eval.py --random --benchmark pope        # 576 image tokens
    OMP_NUM_THREADS=1 python scripts/bench_eval.py --random --text-layers 4 --tower-layers 24

Prints answers per second of every method, and in how many answers the ways differ: the evaluation as it is, without
shared prefixes, without the reuse of image features either, and a plain loop, one sample at a time, which encodes and
decodes each by itself. Loading and scoring are not counted. On a machine that does other things too, compare the
seconds of processor time.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vlmfix.observe.prompts import encode

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import torch

import vlmfix
from vlmfix.evals.data.coco import load_image
from vlmfix.evals.options import EvalOptions
from vlmfix.evals.run.answer_log import AnswerLog
from vlmfix.evals.run.answering import generate_answers
from vlmfix.evals.run.batches import AnswerPlan
from vlmfix.evals.run.generate import Generator
from vlmfix.evals.run.models import fitting_threads, load_model
from vlmfix.evals.run.plan import EvalRun, plan_run, with_methods

Texts = dict[str, str]


def evaluated(run: EvalRun, model: Any, folder: Path) -> Texts:
    """Answers by key, as ``vlmfix eval`` gives them."""
    run = dataclasses.replace(run, folder=folder)
    plan = AnswerPlan(run)
    with AnswerLog(folder / "answers.jsonl") as log:
        generate_answers(plan, log, run.total, model=model)
        return {key: record["text"] for key, record in log.records.items()}


def looped(run: EvalRun, model: Any) -> Texts:
    """The same one sample at a time: what a script around ``generate`` does."""
    plan, generator = AnswerPlan(run), Generator(model, run.source.processor)
    texts: Texts = {}
    with fitting_threads(model):
        for spec in run.methods:
            with vlmfix.patched(model, spec.build()):
                for sample in run.tasks.samples():
                    image = load_image(sample.path)
                    inputs = encode(run.source.processor, [str(plan.prompt(spec, sample, {}))], [image])
                    answer = generator.generate(inputs, sample.records, sample.max_new_tokens)[0]
                    texts[str(plan.key(spec, sample))] = answer.text
    return texts


def measure(name: str, give: Callable[[], Texts], expected: Texts | None) -> Texts:
    """Run one way, print a line, and return its answers."""
    start, busy = time.perf_counter(), time.process_time()
    texts = give()
    seconds, busy = time.perf_counter() - start, time.process_time() - busy
    differing = "" if expected is None else f"; {sum(texts[key] != expected[key] for key in expected)} differ"
    print(
        f"{name:<40} {len(texts) / seconds:7.2f} answers/s  ({len(texts)} in {seconds:.1f} s, "
        f"{busy:.1f} s of processor time{differing})",
        flush=True,
    )
    return texts


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, default=20, help="images per benchmark (default: 20)")
    parser.add_argument("--benchmark", nargs="+", default=["chair", "pope"], help="default: chair pope")
    parser.add_argument("--method", nargs="+", default=["vhr", "pai", "var"], help="beside none (default: vhr pai var)")
    parser.add_argument("--batch-size", type=int, help="default: the evaluation's")
    parser.add_argument("--random", action="store_true", help="a random LLaVA of width 256 with 576 image tokens")
    parser.add_argument("--text-layers", type=int, default=8, help="of the random LLaVA (default: 8)")
    parser.add_argument("--tower-layers", type=int, default=4, help="of the random LLaVA (default: 4)")
    parser.add_argument("--no-loop", action="store_true", help="leave the plain loop out")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        wanted = EvalOptions(
            methods=tuple(options.method),
            benchmarks=tuple(options.benchmark),
            limit=options.limit,
            batch_size=options.batch_size,
            controls=False,
            out=folder / "run",
        )
        if options.random:
            from families.saved_llava import build_coco_folder, build_tiny_llava

            sizes = {"hidden_size": 256, "image_size": 336, "patch_size": 14}
            layers = {"layers": options.text_layers, "vision_layers": options.tower_layers}
            build_tiny_llava(folder / "model", **sizes, **layers)
            build_coco_folder(folder / "data", num_images=options.limit)
            given = {"model": str(folder / "model"), "data": folder / "data", "max_new_tokens": 32}
            wanted = dataclasses.replace(wanted, **given, pope_max_new_tokens=4)
        run = plan_run(wanted)
        model = load_model(run.source, dtype="float32", device=run.device)
        print(f"{run.source.name}: {run.total} answers, batches of {run.batch_size}, {torch.get_num_threads()} threads")
        whole = dataclasses.replace(wanted, share_prefixes=False)
        ways = {
            "": wanted,
            "--no-share-prefixes": whole,
            "--no-share-prefixes --no-reuse-images": dataclasses.replace(whole, reuse_images=False),
        }
        for spec in run.methods:
            texts = None
            for number, (way, chosen) in enumerate(ways.items()):
                alone = dataclasses.replace(with_methods(run, [spec]), options=chosen)
                out = folder / f"{spec.label}-{number}"
                found = measure(f"{spec.label} {way}", lambda run=alone, out=out: evaluated(run, model, out), texts)  # type: ignore[misc]
                texts = texts or found
            if not options.no_loop:
                measure(f"{spec.label} in a loop, batch 1", lambda run=alone: looped(run, model), texts)  # type: ignore[misc]


if __name__ == "__main__":
    main()
