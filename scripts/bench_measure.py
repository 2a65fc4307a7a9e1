"""What ``scripts/bench.py`` measures: prefill, decode step and whole answer, memory, and the bandwidth bound."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

PARTS = ("prefill", "decode", "end_to_end")


class Timing(NamedTuple):
    """Seconds of one answer, by the clock on the wall and by the processor's (this process alone)."""

    wall: dict[str, float]
    cpu: dict[str, float]


class _Clock(BaseStreamer):
    """Notes when ``generate`` delivers the prompt, then every token: by then the device is done with it."""

    def __init__(self) -> None:
        self.times: list[tuple[float, float]] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(_now())

    def end(self) -> None:
        """Nothing follows."""


def _now() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def measure(model: PreTrainedModel, inputs: dict[str, torch.Tensor], new_tokens: int, compiled: bool) -> Timing:
    """Time one greedy answer.

    Args:
        model: The model.
        inputs: The prompts.
        new_tokens: Length of the answer, at least 3.
        compiled: With a static cache, for which ``generate`` compiles decode steps into CUDA graphs on a GPU.
    """
    clock = _Clock()
    options = {"cache_implementation": "static"} if compiled else {}
    synchronize(model.device)
    start = _now()
    model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False, streamer=clock, **options)
    synchronize(model.device)
    end = _now()
    both = []
    for which in (0, 1):
        at = [each[which] for each in clock.times]
        steps = [after - before for before, after in pairwise(at[1:])]
        values = (at[1] - at[0], statistics.median(steps), end[which] - start[which])
        both.append(dict(zip(PARTS, values, strict=True)))
    return Timing(*both)


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def rounds(
    variants: Mapping[str, Callable[[], Timing]],
    number: int,
    progress: Callable[[str], None],
    *,
    warm_up: bool = True,
) -> dict[str, list[Timing]]:
    """Measure every variant once per round, in turn and in changing direction, after one round to warm up.

    A slow moment of the machine then hits all of them alike, and no variant always follows the same other.
    """
    found: dict[str, list[Timing]] = {name: [] for name in variants}
    for turn in range(0 if warm_up else 1, number + 1):
        progress(f"round {turn}/{number}")
        for name in list(variants)[:: 1 if turn % 2 else -1]:
            timing = variants[name]()
            if turn:
                found[name].append(timing)
    return found


@torch.no_grad()
def peak_memory(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> int:
    """Peak bytes allocated by one prefill and one decode step, weights included."""

    def run() -> None:
        cache = DynamicCache(config=model.config.get_text_config())
        model(**inputs, past_key_values=cache, logits_to_keep=1)
        ids = torch.full_like(inputs["input_ids"][:, :1], 9)
        model(input_ids=ids, past_key_values=cache)

    if model.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    live = peak = 0
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak + weight_bytes(model)


def weight_bytes(model: PreTrainedModel) -> int:
    """Bytes of all weights."""
    return sum(parameter.nbytes for parameter in model.parameters())


def step_bytes(model: PreTrainedModel, tokens: int, batch: int) -> int:
    """Bytes a decode step must read at least: the language model's weights once, and the keys and values so far."""
    text = model.config.get_text_config()
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    per_token = 2 * text.num_hidden_layers * text.num_key_value_heads * head_dim * model.dtype.itemsize
    read = sum(p.nbytes for p in model.model.language_model.layers.parameters())
    head = model.get_output_embeddings()
    read += 0 if head is None else head.weight.nbytes
    return read + batch * tokens * per_token


def bandwidth(device: torch.device, num_bytes: int = 2**30) -> float:
    """Bytes per second that copying a large buffer moves, read and written."""
    source = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(6):
        synchronize(device)
        start = time.perf_counter()
        target.copy_(source)
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * num_bytes / best


def ratios(mine: Sequence[Timing], stock: Sequence[Timing], part: str, clock: str) -> tuple[float, float, float]:
    """Quartiles (low, median, high) of the ratios of paired rounds."""
    values = [getattr(a, clock)[part] / getattr(b, clock)[part] for a, b in zip(mine, stock, strict=True)]
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def summary(found: Mapping[str, Sequence[Timing]], stock: str) -> dict[str, dict[str, Any]]:
    """Per variant and part: median seconds, and the quartiles of the ratio to ``stock`` by both clocks."""
    result: dict[str, dict[str, Any]] = {}
    for name, timings in found.items():
        result[name] = {}
        for part in PARTS:
            result[name][part] = {
                "wall_seconds": statistics.median(each.wall[part] for each in timings),
                "cpu_seconds": statistics.median(each.cpu[part] for each in timings),
                "wall_ratio": ratios(timings, found[stock], part, "wall"),
                "cpu_ratio": ratios(timings, found[stock], part, "cpu"),
                "all_wall_seconds": [each.wall[part] for each in timings],
                "all_cpu_seconds": [each.cpu[part] for each in timings],
            }
    return result
