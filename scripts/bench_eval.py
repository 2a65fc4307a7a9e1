"""How many answers per second an evaluation gives: against a loop over ``generate``, and with images encoded once.

    OMP_NUM_THREADS=1 python scripts/bench_eval.py            # the embedded model
    OMP_NUM_THREADS=1 python scripts/bench_eval.py --tower    # a random LLaVA with a tower of 24 layers, 336 pixels

Prints answers per second of three ways to give the same answers, and in how many they differ: the evaluation as it is,
without the reuse of image features, and a plain loop, one sample at a time, which encodes and decodes each by itself.
Loading and scoring are not counted. On a machine that does other things too, compare the seconds of processor time.
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
from vlmfix.evals.run.plan import EvalRun, plan_run

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
                    inputs = encode(
                        run.source.processor, [str(plan.prompt(spec, sample, {}))], [load_image(sample.path)]
                    )
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
        f"{name:<32} {len(texts) / seconds:7.2f} answers/s  ({len(texts)} in {seconds:.1f} s, "
        f"{busy:.1f} s of processor time{differing})",
        flush=True,
    )
    return texts


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, default=20, help="images per benchmark (default: 20)")
    parser.add_argument("--benchmark", nargs="+", default=["chair", "pope"], help="default: chair pope")
    parser.add_argument("--method", nargs="+", default=["vhr", "pai"], help="beside none (default: vhr pai)")
    parser.add_argument("--batch-size", type=int, help="default: the evaluation's")
    parser.add_argument("--tower", action="store_true", help="a random LLaVA: 24 layers of width 256, 576 image tokens")
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
        if options.tower:
            from families.saved_llava import build_coco_folder, build_tiny_llava

            tower = {"hidden_size": 256, "layers": 4, "image_size": 336, "patch_size": 14, "vision_layers": 24}
            build_tiny_llava(folder / "model", **tower)
            build_coco_folder(folder / "data", num_images=options.limit)
            given = {"model": str(folder / "model"), "data": folder / "data", "max_new_tokens": 32}
            wanted = dataclasses.replace(wanted, **given, pope_max_new_tokens=4)
        run = plan_run(wanted)
        plain = dataclasses.replace(run, options=dataclasses.replace(wanted, reuse_images=False))
        model = load_model(run.source, dtype="float32", device=run.device)
        print(f"{run.source.name}: {run.total} answers, batches of {run.batch_size}, {torch.get_num_threads()} threads")
        texts = measure("vlmfix eval", lambda: evaluated(run, model, folder / "reused"), None)
        measure("vlmfix eval --no-reuse-images", lambda: evaluated(plain, model, folder / "plain"), texts)
        if not options.no_loop:
            measure("a loop over generate, batch 1", lambda: looped(run, model), texts)


if __name__ == "__main__":
    main()
