"""Trains the embedded tiny vision-language model from scratch: one command, two CPU cores, about an hour.

    python scripts/train_testbed.py

Made in the order in which real ones are made: (a) the language model alone on text, which gives it its priors, and at
the same time (b) the vision tower alone; (c) the projector between the two, both frozen; (d) joint tuning. Every stage
has a fixed number of steps and a finished cosine schedule. Work files go to ``--work`` (scenes 2.7 GB, checkpoints
every 250 steps, one ``.jsonl`` of losses per stage); a finished stage is not repeated, an interrupted one resumes. The
weights are written to ``evals/testbed/model``. Measure them with ``python scripts/testbed_measure.py``.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from testbed_data import TrainingData, generate, load
from testbed_learner import Learner, language_loss
from testbed_packing import collate, pack_image, pack_text
from torch import Tensor, nn

from vlmfix.evals.testbed import MODEL_DIR
from vlmfix.evals.testbed.scenes import BACKGROUND, IMAGE_SIZE
from vlmfix.evals.testbed.tiny import BOS, EOS, PAD, build_processor

STEPS = {"text": 1400, "vision": 1800, "align": 250, "joint": 4900}
BATCH = {"text": 24, "vision": 128, "align": 64, "joint": 64}
PEAK = {"text": 2e-3, "vision": 1.5e-3, "align": 2e-3, "joint": 1.5e-3}
WARMUP = {"text": 100, "vision": 200, "align": 30, "joint": 150}
LANGUAGE_RATE, VISION_RATE = 0.6, 0.4  # of the peak, in the joint stage
LENGTH = {"text": 160, "align": 176, "joint": 176}
NUM_IMAGES, BLIND_RATE, PATCH_WEIGHT = 96_000, 0.15, 0.3
ECONOMY_START, ECONOMY_WEIGHT = 1750, 2.0  # joint stage: the penalty on attending to the image, see the model card
_JEMALLOC = Path("/usr/lib/x86_64-linux-gnu/libjemalloc.so.2")


def batches(data: TrainingData, size: int, seed: int, rank: int, world: int) -> Iterator[np.ndarray]:
    """Endless epochs of shuffled rows; every process gets its share of each batch of ``size``."""
    shuffle = np.random.default_rng(seed)
    while True:
        order = shuffle.permutation(len(data.kinds))
        for start in range(0, len(order) - size + 1, size):
            yield np.sort(order[start + rank : start + size : world])


def images(data: TrainingData, rows: np.ndarray, noise: np.random.Generator, grain: Tensor) -> tuple[Tensor, Tensor]:
    """Normalised pixels ``[B, 3, 96, 96]`` and patch labels ``[B, 8, 8]``; half of the batches are mirrored.

    ``grain`` is a bank of normal noise ``[K, 3, 96, 96]``, K >= B, drawn once: new noise would cost as much as a
    forward pass.
    """
    pixels = torch.from_numpy(np.ascontiguousarray(data.images[rows])).permute(0, 3, 1, 2).float()
    pixels, patches = (pixels - 127.5) * (4 / 255), torch.from_numpy(data.patches[rows]).long()
    if noise.random() < 0.5:
        pixels, patches = pixels.flip(3), patches.flip(2)
    first = int(noise.integers(len(grain) - len(rows) + 1))
    return pixels.add_(grain[first : first + len(rows)], alpha=0.1 * noise.random()), patches


Loss = Callable[[np.ndarray], tuple[Tensor, dict[str, Tensor]]]


def make_loss(stage: str, learner: Learner, data: TrainingData, seed: int) -> Loss:
    """The loss of one stage as a function of the rows of a batch."""
    rng, noise = random.Random(seed), np.random.default_rng(seed)
    grain = torch.from_numpy(noise.standard_normal((512, 3, IMAGE_SIZE, IMAGE_SIZE), dtype=np.float32))

    def text(rows: np.ndarray) -> tuple[Tensor, dict[str, Tensor]]:
        packed = []
        for row in rows:
            others = [int(row), *(rng.randrange(len(data.kinds)) for _ in range(3))]
            packed.append(pack_text([(int(data.kinds[r]), data.objects(r)) for r in others], rng, LENGTH["text"]))
        parts = learner.read(collate(packed, LENGTH["text"]), None)
        return language_loss(parts), parts

    def vision(rows: np.ndarray) -> tuple[Tensor, dict[str, Tensor]]:
        pixels, patches = images(data, rows, noise, grain)
        features = learner.see(pixels)
        dense = learner.patch_loss(features, patches)
        present = torch.from_numpy((data.counts[rows] > 0).astype(np.float32))
        whole = F.binary_cross_entropy_with_logits(learner.image_head(features[:, 0]).float(), present)
        with torch.no_grad():
            hit = learner.patch_head(features[:, 1:]).argmax(-1).reshape(-1) == patches.reshape(-1)
            accuracy = hit[patches.reshape(-1) < BACKGROUND].float().mean()
        return dense + 2 * whole, {"patch": dense, "image": whole, "object_patch_accuracy": accuracy}

    def joint(rows: np.ndarray) -> tuple[Tensor, dict[str, Tensor]]:
        pixels, patches = images(data, rows, noise, grain)
        packed = [pack_image(int(data.kinds[r]), data.objects(r), rng, LENGTH[stage], BLIND_RATE) for r in rows]
        with torch.set_grad_enabled(stage == "joint"):
            features = learner.see(pixels)
        parts = learner.read(collate(packed, LENGTH[stage]), features)
        loss = language_loss(parts)
        if stage == "joint":
            parts["patch"] = learner.patch_loss(features, patches)
            loss = loss + PATCH_WEIGHT * parts["patch"]
            if learner.economical:
                parts["excess"] = learner.excess()
                loss = loss + ECONOMY_WEIGHT * parts["excess"]
        return loss, parts

    return {"text": text, "vision": vision, "align": joint, "joint": joint}[stage]


def parameter_groups(stage: str, learner: Learner) -> list[dict[str, Any]]:
    """What a stage trains, with the rate relative to the peak; norms and biases are not decayed."""
    core = learner.model.model
    language: list[nn.Module] = [core.language_model, learner.model.lm_head]
    heads: list[nn.Module] = [learner.patch_head, learner.image_head]
    chosen: list[tuple[list[nn.Module], float]] = {
        "text": [(language, 1.0)],
        "vision": [([core.vision_tower, *heads], 1.0)],
        "align": [([core.multi_modal_projector], 1.0)],
        "joint": [
            ([core.multi_modal_projector], 1.0),
            (language, LANGUAGE_RATE),
            ([core.vision_tower, learner.patch_head], VISION_RATE),
        ],
    }[stage]
    groups = []
    for modules, rate in chosen:
        parameters = [p for module in modules for p in module.parameters()]
        for decayed in (True, False):
            members = [p for p in parameters if (p.dim() > 1) == decayed]
            groups.append({"params": members, "rate": rate, "weight_decay": 0.05 if decayed else 0.0})
    kept = {id(p) for group in groups for p in group["params"]}
    for parameter in learner.parameters():
        parameter.requires_grad_(id(parameter) in kept)
    return groups


def average_gradients(parameters: list[nn.Parameter], world: int) -> None:
    """One all-reduce over all gradients together."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.reshape(-1) for g in gradients])
    dist.all_reduce(flat)
    flat /= world
    for gradient, piece in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(piece.view_as(gradient))


def _vision_layers(vision: nn.Module) -> str:
    """The path of the tower's list of layers, which differs between transformers releases."""
    return next(name for name, module in vision.named_modules() if isinstance(module, nn.ModuleList))


def load_parents(stage: str, learner: Learner, work: Path) -> None:
    """Starts a stage from the stages before it."""
    if stage == "align":
        text = torch.load(work / "text.pt")["learner"]
        state = torch.load(work / "vision.pt")["learner"]
        state.update({k: v for k, v in text.items() if k.startswith(("model.model.language_model", "model.lm_head"))})
        learner.load_state_dict(state)
    elif stage == "joint":
        learner.load_state_dict(torch.load(work / "align.pt")["learner"])


def run_stage(stage: str, work: Path, seed: int) -> None:
    """Trains one stage in this process (of ``WORLD_SIZE``)."""
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    if world > 1:
        dist.init_process_group("gloo")
    learner, data = Learner(), load(work / "data")
    load_parents(stage, learner, work)
    groups = parameter_groups(stage, learner)
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98))
    trained = [p for group in groups for p in group["params"]]
    start, partial = 0, work / f"{stage}-partial.pt"
    if partial.exists():
        saved = torch.load(partial)
        learner.load_state_dict(saved["learner"])
        optimizer.load_state_dict(saved["optimizer"])
        start = saved["step"]
    stream = batches(data, BATCH[stage], seed + start, rank, world)
    loss_of = make_loss(stage, learner, data, seed + 1000 * rank + start)
    vision = learner.model.model.vision_tower
    for layer in [*learner.model.model.language_model.layers, *vision.get_submodule(_vision_layers(vision))]:
        layer.forward = torch.compile(layer.forward, dynamic=False)
    means: dict[str, float] = {}
    begin = time.time()
    for step in range(start, STEPS[stage]):
        if stage == "joint" and step >= ECONOMY_START and not learner.economical:
            learner.attend_economically()
        progress = step / STEPS[stage]
        rate = PEAK[stage] * min(1.0, (step + 1) / WARMUP[stage]) * (0.02 + 0.49 * (1 + math.cos(math.pi * progress)))
        for group in optimizer.param_groups:
            group["lr"] = rate * group["rate"]
        with torch.autocast("cpu", torch.bfloat16):
            loss, parts = loss_of(next(stream))
        loss.backward()
        if world > 1:
            average_gradients(trained, world)
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        for name, value in parts.items():
            number = value.detach().item()
            means[name] = means.get(name, number) * 0.97 + number * 0.03
        if rank:
            continue
        if (step + 1) % 50 == 0 or step + 1 == STEPS[stage]:
            entry = {"step": step + 1, "seconds": round(time.time() - begin, 1)}
            entry |= {name: round(value, 4) for name, value in means.items()}
            print(stage, json.dumps(entry), flush=True)
            with (work / f"{stage}.jsonl").open("a") as log:
                log.write(json.dumps(entry) + "\n")
        if (step + 1) % 250 == 0:
            state = {"learner": learner.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            torch.save(state, partial.with_suffix(".tmp"))
            partial.with_suffix(".tmp").replace(partial)
    if rank == 0:
        torch.save({"learner": learner.state_dict()}, work / f"{stage}.pt")
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


def _released_name(key: str) -> str:
    """A weight's name as in the released LLaVA-1.5 checkpoints, which every transformers release reads."""
    prefix, released = "vision_tower.", "vision_tower.vision_model."
    return released + key.removeprefix(prefix) if key.startswith(prefix) and not key.startswith(released) else key


def export(work: Path, checkpoint: str, out: Path) -> None:
    """Writes model (fp16) and processor in the standard format."""
    learner = Learner()
    learner.load_state_dict(torch.load(work / f"{checkpoint}.pt")["learner"])
    model = learner.model.half()
    model.set_attn_implementation("sdpa")
    model.generation_config.update(bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD, max_new_tokens=80)
    model.save_pretrained(out)
    path = out / "model.safetensors"
    save_file({_released_name(k): v for k, v in load_file(path).items()}, path, metadata={"format": "pt"})
    path.chmod(0o644)
    processor = build_processor()
    processor.save_pretrained(out)
    # What transformers 4.57 reads instead of the newer form beside it.
    processor.image_processor.save_pretrained(out)
    edit_json(out / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast", extra_special_tokens=None)
    names = ["input_ids", "attention_mask"]
    edit_json(out / "tokenizer_config.json", model_input_names=names, additional_special_tokens=["<image>"])
    edit_json(out / "generation_config.json", _from_model_config=None)


def edit_json(path: Path, **changes: Any) -> None:
    """Sets top-level keys of a JSON file; None removes a key."""
    content = json.loads(path.read_text()) | changes
    content = {key: value for key, value in content.items() if value is not None}
    path.write_text(json.dumps(content, indent=2) + "\n")


def launch(stage: str, work: Path, seed: int, world: int) -> list[subprocess.Popen[bytes]]:
    """Starts one stage in ``world`` one-thread processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(world)}
    if _JEMALLOC.exists():  # halves the time that glibc's malloc spends in the kernel
        shared |= {"LD_PRELOAD": str(_JEMALLOC), "MALLOC_CONF": "dirty_decay_ms:-1,muzzy_decay_ms:-1"}
    command = [sys.executable, __file__, "--stage", stage, "--work", str(work), "--seed", str(seed)]
    return [subprocess.Popen(command, env=os.environ | shared | {"RANK": str(rank)}) for rank in range(world)]


def wait(processes: list[subprocess.Popen[bytes]]) -> None:
    """Waits for all; the first failure stops the rest."""
    while any(process.poll() is None for process in processes):
        if any(process.poll() for process in processes):
            for process in processes:
                process.kill()
        time.sleep(1)
    if any(process.returncode for process in processes):
        raise SystemExit("a training process failed; see the messages above. Run the same command again to resume.")


def main() -> None:
    """Runs all stages, or one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "vlmfix-testbed-training")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2, help="one-thread processes for data, align and joint")
    parser.add_argument("--out", type=Path, default=MODEL_DIR)
    parser.add_argument("--stage", choices=tuple(STEPS), help="run this stage in this process (used by the launcher)")
    parser.add_argument("--export", metavar="CHECKPOINT", help="only write the weights of a checkpoint: joint-partial")
    args = parser.parse_args()
    if args.stage:
        run_stage(args.stage, args.work, args.seed)
        return
    if args.export:
        export(args.work, args.export, args.out)
        return
    begin = time.time()
    generate(args.work / "data", NUM_IMAGES, args.processes)
    print(f"scenes ready after {(time.time() - begin) / 60:.1f} minutes", flush=True)
    alone = [name for name in ("text", "vision") if not (args.work / f"{name}.pt").exists()]
    wait([process for name in alone for process in launch(name, args.work, args.seed, 1)])
    for stage in ("align", "joint"):
        if not (args.work / f"{stage}.pt").exists():
            wait(launch(stage, args.work, args.seed, args.processes))
        print(f"{stage} ready after {(time.time() - begin) / 60:.1f} minutes", flush=True)
    export(args.work, "joint", args.out)


if __name__ == "__main__":
    main()
