#!/usr/bin/env python
"""Speed and memory of patched models, as ratios to the unpatched model of the same run.

    python scripts/bench.py --readme        # the README's tables, on a CPU: some six minutes
    python scripts/bench.py                 # everything on this machine's best device
    python scripts/bench.py --quick         # one setting, few rounds
    python scripts/bench.py --only var vhr --image-tokens 576 --batch 1

On a CPU: a LLaVA with 163 M language parameters, fp32. On a GPU: the shapes of LLaVA-1.5-7B and Qwen2.5-VL-7B, bf16,
once as they come and once with a static cache, for which generate compiles decode steps into CUDA graphs. Weights are
random and nothing is downloaded. A synthetic sink gives VAR something to do (the column "edited" proves it).

Every variant lives on a copy of the model that shares its weights, and answers once per round, in turn; ratios are
medians over the rounds of the ratio to the unpatched model of the same round, with their quartiles. "cpu" is the same
by the process's own time on the processor, which other processes disturb less (``--clock cpu`` for markdown).

"released" variants make the same edits as the methods' released code does: eager attention, the whole map, one head at
a time (``bench_released.py``).
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from bench_measure import Timing, bandwidth, measure, peak_memory, rounds, step_bytes, summary
from bench_models import SHAPES, build, make_inputs
from bench_report import curve_markdown, curve_table, markdown, table
from bench_variants import CORE, EAGER, STOCK, dtype_of, edited, everywhere, make, names
from transformers import PreTrainedModel

import vlmfix
from vlmfix.evals.run.models import keep_freed_memory

README_AT_2880 = ("vhr", "var", "released var")
CURVE = ((576, 60), (1152, 60), (2880, 60), (2880, 1000))
"""Image and text tokens of the memory curve."""
CURVE_VARIANTS = ("vhr", "var", "pai", "act, all heads", "mma", EAGER)


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def run_setting(
    model: PreTrainedModel,
    *,
    label: str,
    image_tokens: int,
    text_tokens: int,
    batch: int,
    chosen: list[str],
    number: int,
    new_tokens: int,
    compiled: bool = False,
    warm_up: bool = True,
    memory: bool = True,
) -> dict[str, Any]:
    """Measure all variants in one setting."""
    inputs = make_inputs(model, image_tokens, text_tokens, batch)
    models = {name: make(model, name, image_tokens) for name in chosen}  # patching drops compiled code: first of all
    answers = {
        name: lambda each=each: measure(each, inputs, new_tokens, compiled)  # type: ignore[misc]
        for name, each in models.items()
    }
    found: dict[str, list[Timing]] = rounds(answers, number, _progress(label), warm_up=warm_up)
    variants = summary(found, STOCK)
    for name, row in variants.items():
        row["edited"] = edited(models[name])
        if memory and not name.startswith("released"):
            row["peak_bytes"] = peak_memory(models[name], inputs)
            row["memory_ratio"] = row["peak_bytes"] / variants[STOCK]["peak_bytes"]
    step = variants[STOCK]["decode"]["wall_seconds"]
    speed = bandwidth(model.device, 2**30 if model.device.type == "cuda" else 2**28)
    tokens = image_tokens + text_tokens
    dtype = str(model.dtype).removeprefix("torch.")
    title = f"{label}, {image_tokens} image + {text_tokens} text tokens, batch {batch}, {dtype}"
    return {
        "title": f"{title}, compiled" if compiled else title,
        "image_tokens": image_tokens,
        "text_tokens": text_tokens,
        "batch": batch,
        "compiled": compiled,
        "rounds": number,
        "new_tokens": new_tokens,
        "variants": variants,
        "bound": {
            "bandwidth": speed,
            "tokens_per_second": batch / step,
            "bound_tokens_per_second": batch * speed / step_bytes(model, tokens, batch),
            "variants": {name: batch / row["decode"]["wall_seconds"] for name, row in variants.items()},
        },
    }


def memory_curve(
    device: str, dtype: torch.dtype, shape: str, points: tuple[tuple[int, int], ...], only: list[str]
) -> dict[str, Any]:
    """Measure peak memory beyond the stock model's at growing numbers of tokens, with every layer edited."""
    model = build(shape, device, dtype)
    extra: dict[str, list[int]] = {name: [] for name in only}
    for image_tokens, text_tokens in points:
        _progress("memory")(f"{image_tokens} + {text_tokens} tokens")
        inputs = make_inputs(model, image_tokens, text_tokens, 1)
        stock = peak_memory(make(model, STOCK, image_tokens), inputs)
        for name in only:
            variant = make(model, name if name == EAGER else STOCK, image_tokens)
            if name != EAGER:
                vlmfix.patch(variant, everywhere(variant, name))
            extra[name].append(peak_memory(variant, inputs) - stock)
    layers = SHAPES[shape].layers
    return {
        "title": f"Peak memory beyond the unpatched model's, {shape} with {layers} layers, all of them edited",
        "tokens": [sum(point) for point in points],
        "extra_bytes": extra,
    }


def _progress(label: str) -> Any:
    def show(text: str) -> None:
        if sys.stderr.isatty():
            print(f"\r\033[K{label}: {text}", end="", file=sys.stderr, flush=True)

    return show


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", choices=list(DTYPES), help="of the weights (default: fp32 on a CPU, bf16 on a GPU)")
    parser.add_argument("--model", nargs="+", choices=list(SHAPES), help="shapes (default: those of the device)")
    parser.add_argument("--image-tokens", type=int, nargs="+", default=[576, 2880])
    parser.add_argument("--text-tokens", type=int, default=60)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--new-tokens", type=int, default=16, help="length of an answer (default: 16)")
    parser.add_argument("--only", nargs="+", metavar="VARIANT", help="variants to measure beside the unpatched model")
    parser.add_argument("--compiled", choices=["no", "yes", "both"], help="static cache (default: both on a GPU)")
    parser.add_argument("--threads", type=int, help="threads of the CPU (default: torch's)")
    parser.add_argument("--no-memory", action="store_true", help="measure no peak memory, and no curve")
    parser.add_argument("--quick", action="store_true", help="576 image tokens, batch 1, 3 rounds, no curve")
    parser.add_argument("--readme", action="store_true", help="the settings of the README's tables, as markdown")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="of the ratios in markdown")
    parser.add_argument("--markdown", action="store_true", help="print markdown")
    parser.add_argument("--out", type=Path, help="also write every figure here, as JSON")
    args = parser.parse_args(argv)
    if args.new_tokens < 4 or args.rounds < 1:
        parser.error("--new-tokens must be at least 4 and --rounds at least 1")
    args.model = args.model or (["163m"] if args.device == "cpu" else ["llava-1.5-7b", "qwen2.5-vl-7b"])
    args.compiled = args.compiled or ("no" if args.device == "cpu" else "both")
    if args.quick:
        args.image_tokens, args.batch, args.rounds = args.image_tokens[:1], [1], min(args.rounds, 3)
    return args


def plan(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the settings to measure: arguments of ``run_setting``, and the shape."""
    common = {"text_tokens": args.text_tokens, "number": args.rounds, "new_tokens": args.new_tokens}
    if args.readme:
        few = {**common, "shape": args.model[0], "batch": 1}
        first = {**few, "image_tokens": args.image_tokens[0], "only": args.only or [EAGER, *CORE]}
        long = {"number": 2, "new_tokens": 5, "warm_up": False, "memory": False}
        return [first, {**few, **long, "image_tokens": args.image_tokens[-1], "only": args.only or README_AT_2880}]
    return [
        {**common, "shape": shape, "image_tokens": tokens, "batch": batch, "compiled": compiled, "only": args.only}
        for shape in args.model
        for tokens in args.image_tokens
        for batch in args.batch
        for compiled in {"no": [False], "yes": [True], "both": [False, True]}[args.compiled]
    ]


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark and print its tables."""
    args = parse(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    keep_freed_memory()
    is_markdown = args.readme or args.markdown
    machine = {
        "device": torch.cuda.get_device_name() if args.device == "cuda" else processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "command": "python scripts/bench.py " + shlex.join(sys.argv[1:] if argv is None else argv),
    }
    report: dict[str, Any] = {"machine": machine, "settings": [], "memory_curve": None}
    print(
        "{device}, {threads} CPU thread(s), torch {torch}, transformers {transformers} (`{command}`)\n".format(
            **machine
        )
    )

    def add(text: str) -> None:
        """Print and keep what is known so far: a run may be cut short."""
        print(f"\n{text}" if sys.stderr.isatty() else text, end="\n\n", flush=True)
        if args.out:
            args.out.write_text(json.dumps(report, indent=2))

    dtype = DTYPES.get(args.dtype) or dtype_of(args.device)
    shape, model = None, None
    for setting in plan(args):
        if setting["shape"] != shape:
            model = None  # two models may not fit
            shape = setting["shape"]
            model = build(shape, args.device, dtype)
        assert model is not None
        parameters = sum(p.numel() for p in model.model.language_model.parameters()) / 1e6
        label = f"{shape} ({parameters:.0f} M language parameters)"
        chosen = names(model, setting.pop("only"))
        del setting["shape"]
        setting["memory"] = setting.get("memory", True) and not args.no_memory
        done = run_setting(model, label=label, chosen=chosen, **setting)
        report["settings"].append(done)
        add(markdown(done, args.clock) if is_markdown else table(done))
    model = None
    if not args.no_memory and not args.quick:
        shape = "163m-2-layers" if args.device == "cpu" else "llava-1.5-7b"
        is_tiny = all(name.startswith("tiny") for name in args.model)
        shape, points = ("tiny", ((16, 20), (64, 40))) if is_tiny else (shape, CURVE)
        report["memory_curve"] = memory_curve(args.device, dtype, shape, points, list(CURVE_VARIANTS))
        add((curve_markdown if is_markdown else curve_table)(report["memory_curve"]))
    return 0


def processor() -> str:
    """Return the name of the CPU."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


if __name__ == "__main__":
    raise SystemExit(main())
