#!/usr/bin/env python
"""Prefill, decode and memory of patched models, as ratios to the unpatched model of the same run.

    python scripts/bench.py                 # random LLaVA of 150 M language parameters on the CPU, fp32
    python scripts/bench.py --device cuda   # LLaVA-1.5-7B's shape, bf16, on a GPU

Weights are random and nothing is downloaded. VAR needs sinks to have anything to do: a synthetic one is put into the
residual stream of one image token, so that its rows are really edited (the line "edited" proves it). Every variant is
measured once per round, in turn, so that a slow moment of the machine hits all of them; ratios are medians of the
per-round ratios, with their quartiles.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import CLIPVisionConfig, DynamicCache, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import vlmfix

IMAGE_ID = 3
SINK_DIM = 7


def build(device: str, image_tokens: int) -> LlavaForConditionalGeneration:
    """Build a random LLaVA: 150 M language parameters on the CPU, LLaVA-1.5-7B's shape on a GPU."""
    grid = round(image_tokens**0.5)
    if grid * grid != image_tokens:
        raise SystemExit(f"--image-tokens must be a square, such as 576; got {image_tokens}.")
    if device == "cpu":
        text = LlamaConfig(
            vocab_size=8192, hidden_size=1024, intermediate_size=2816, num_hidden_layers=12, num_attention_heads=16,
            num_key_value_heads=16, max_position_embeddings=8192,
        )  # fmt: skip
    else:
        text = LlamaConfig(
            vocab_size=32064, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
            num_key_value_heads=32, max_position_embeddings=8192,
        )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=14 * grid,
        patch_size=14,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE_ID, image_seq_length=image_tokens,
        vision_feature_layer=-1,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        model = LlavaForConditionalGeneration(config).to(dtype).eval()
    plant_sink(model)
    return model


def plant_sink(model: LlavaForConditionalGeneration) -> None:
    """Give the first image token of every sample a huge value in one dimension: a synthetic visual sink."""

    def plant(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        embeds = kwargs["inputs_embeds"]
        if embeds.shape[1] > 16:
            embeds = embeds.clone()
            embeds[:, SINK_START, SINK_DIM] = 100 * embeds.abs().amax()
            kwargs = {**kwargs, "inputs_embeds": embeds}
        return args, kwargs

    model.model.language_model.register_forward_pre_hook(plant, with_kwargs=True)


SINK_START = 4


OTHERS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("act", {}),
    ("mma", {}),
    ("pai", {}),
    ("hgai", {}),
    ("vaf", {}),
    ("adaptvis", {}),
    ("iat", {}),
    ("spin", {}),
    ("eah", {}),
)
"""Methods that need neither a list of heads nor planted sinks, as they come."""


def variants(model: LlavaForConditionalGeneration) -> dict[str, Callable[[], Any]]:
    """Name every variant and the context it runs in."""
    var = vlmfix.VAR(sink_dims=[SINK_DIM], image_mass=0.0)
    return {
        "unpatched": nullcontext,
        "none": lambda: vlmfix.patched(model, "none"),
        "vhr": lambda: vlmfix.patched(model, "vhr", alpha=1.3),
        "vhr reinforce_noimg": lambda: vlmfix.patched(model, "vhr", alpha=1.3, reinforce_noimg=True),
        "var": lambda: vlmfix.patched(model, var),
        "var + vhr": lambda: vlmfix.patched(model, [var, vlmfix.VHR(alpha=1.3)]),
        **{name: lambda name=name, options=options: vlmfix.patched(model, name, **options) for name, options in OTHERS},
    }


def synchronize(device: str) -> None:
    """Wait for the device."""
    if device != "cpu":
        torch.cuda.synchronize()


@torch.no_grad()
def measure(
    model: LlavaForConditionalGeneration, inputs: dict[str, torch.Tensor], steps: int, device: str
) -> dict[str, float]:
    """Time one prefill and some decode steps; seconds, and seconds per decoded token."""
    cache = DynamicCache(config=model.config.text_config)
    synchronize(device)
    start = time.perf_counter()
    logits = model(**inputs, past_key_values=cache, logits_to_keep=1).logits
    synchronize(device)
    prefill = time.perf_counter() - start
    ids = logits[:, -1:].argmax(-1).clamp_min(IMAGE_ID + 1)
    per_token = []
    for _ in range(steps):
        start = time.perf_counter()
        logits = model(input_ids=ids, past_key_values=cache).logits
        synchronize(device)
        per_token.append(time.perf_counter() - start)
        ids = logits[:, -1:].argmax(-1).clamp_min(IMAGE_ID + 1)
    return {"prefill": prefill, "decode": statistics.median(per_token)}


@torch.no_grad()
def peak_memory(model: LlavaForConditionalGeneration, inputs: dict[str, torch.Tensor], device: str) -> float:
    """Peak bytes allocated by one prefill and one decode step, weights included."""
    weights = sum(parameter.nbytes for parameter in model.parameters())

    def run() -> None:
        cache = DynamicCache(config=model.config.text_config)
        model(**inputs, past_key_values=cache, logits_to_keep=1)
        model(input_ids=torch.full((inputs["input_ids"].shape[0], 1), 9, device=device), past_key_values=cache)

    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        run()
        return float(torch.cuda.max_memory_allocated())
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    live = peak = 0
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return float(weights + peak)


def make_inputs(
    model: LlavaForConditionalGeneration, image_tokens: int, text_tokens: int, batch: int, device: str
) -> dict[str, torch.Tensor]:
    """One image between four tokens and the rest of the text."""
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(IMAGE_ID + 1, 8000, (batch, text_tokens), generator=generator)
    image = torch.full((batch, image_tokens), IMAGE_ID)
    ids = torch.cat([text[:, :SINK_START], image, text[:, SINK_START:]], dim=1)
    size = model.config.vision_config.image_size
    pixels = torch.randn(batch, 3, size, size, generator=generator).to(model.dtype)
    # As generate does: images are encoded before the language model's prefill is timed.
    inputs = {"input_ids": ids.to(device), "attention_mask": torch.ones_like(ids).to(device)}
    return {**inputs, "pixel_values": pixels.to(device)}


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--image-tokens", type=int, default=576)
    parser.add_argument("--text-tokens", type=int, default=60)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=8, help="decode steps a round (default: 8)")
    parser.add_argument("--only", nargs="*", help="variants to measure beside unpatched")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--json", type=Path, help="also write every figure here")
    args = parser.parse_args(argv)
    model = build(args.device, args.image_tokens)
    inputs = make_inputs(model, args.image_tokens, args.text_tokens, args.batch, args.device)
    chosen = {name: on for name, on in variants(model).items() if not args.only or name in {"unpatched", *args.only}}
    times: dict[str, list[dict[str, float]]] = {name: [] for name in chosen}
    edited, memory = {}, {}
    for number in range(args.rounds + 1):
        for name, context in chosen.items():
            with context():
                result = measure(model, inputs, args.steps, args.device)
                if number:  # the first round warms up
                    times[name].append(result)
                elif not args.no_memory:
                    memory[name] = peak_memory(model, inputs, args.device)
                status = vlmfix.status(model)
                edited[name] = sum(status.edited) if status else 0
        if sys.stderr.isatty():
            print(f"\rround {number}/{args.rounds}", end="", file=sys.stderr, flush=True)
    parameters = sum(p.numel() for p in model.model.language_model.parameters()) / 1e6
    where = (
        torch.cuda.get_device_name()
        if args.device == "cuda"
        else f"{platform.machine()} CPU, {torch.get_num_threads()} thread(s)"
    )
    print(
        f"{parameters:.0f} M language parameters, {args.image_tokens} image + {args.text_tokens} text tokens, batch "
        f"{args.batch}, {str(model.dtype)[6:]}, {where}, torch {torch.__version__}, {args.rounds} rounds"
    )
    ratio = "ratio [quartiles]".rjust(22)
    print(f"{'':22}{'prefill ms':>11}{ratio}{'decode ms':>11}{ratio}{'peak MiB':>10}{'ratio':>7}{'edited':>10}")
    report: dict[str, Any] = {}
    for name in chosen:
        row = summarise(times[name], times["unpatched"])
        row["edited"] = edited[name]
        line = f"{name:22}"
        for part in ("prefill", "decode"):
            low, middle, high = row[f"{part}_ratio"]
            line += f"{1000 * row[part]:11.2f}" + f"{middle:.3f} [{low:.3f}, {high:.3f}]".rjust(22)
        if memory:
            row["peak_bytes"], row["memory_ratio"] = memory[name], memory[name] / memory["unpatched"]
            line += f"{memory[name] / 2**20:10.0f}{row['memory_ratio']:7.3f}"
        print(line + f"{edited[name]:10d}")
        report[name] = row
    if args.json:
        args.json.write_text(
            json.dumps({"arguments": {**vars(args), "json": str(args.json)}, "variants": report}, indent=2)
        )
    return 0


def summarise(times: list[dict[str, float]], stock: list[dict[str, float]]) -> dict[str, Any]:
    """Median seconds, and quartiles of the ratios to the unpatched model of the same round."""
    row: dict[str, Any] = {}
    for part in ("prefill", "decode"):
        ratios = [mine[part] / theirs[part] for mine, theirs in zip(times, stock, strict=True)]
        row[part] = statistics.median(result[part] for result in times)
        row[f"{part}_ratio"] = tuple(statistics.quantiles(ratios, n=4)) if len(ratios) > 1 else tuple(ratios * 3)
    return row


if __name__ == "__main__":
    raise SystemExit(main())
