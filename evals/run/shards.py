"""One run on several processes: each answers its share of the batches into a file of its own, the first one merges.

Started by ``accelerate launch -m vlmfix.evals ...``, ``torchrun`` or ``mpirun``, which say in the environment who is
who. On processors, ``accelerate launch --multi_gpu --num_processes N`` starts N processes; with ``--cpu`` it starts one
(accelerate leaves several to MPI).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from vlmfix.errors import VlmfixError

from .answer_log import AnswerLog

PARTS = "answers.part-*.jsonl"


@dataclass(frozen=True)
class Shard:
    """This process's place among those of a run.

    Attributes:
        rank: Its number; 0 checks, merges, scores and reports.
        world: How many there are.
        local_rank: Its number on its machine, which is that of its GPU.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0

    @classmethod
    def here(cls) -> Shard:
        """Read the place from the environment; without one, this is the only process."""
        world = _from_environment("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", default=1)
        if world == 1:
            return cls()
        rank = _from_environment("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK")
        local = _from_environment("LOCAL_RANK", "MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK", default=0)
        return cls(rank, world, local)

    @property
    def is_main(self) -> bool:
        """Whether this is the process that reports."""
        return self.rank == 0

    def device(self, device: str) -> str:
        """Return the device of this process; on a machine with several GPUs, its own one.

        Raises:
            VlmfixError: Every process would take all devices.
        """
        if self.world > 1 and device == "auto":
            raise VlmfixError(
                "--device auto spreads one model over all devices, and there are several processes: start one, or "
                "leave --device out to give every process a GPU"
            )
        return f"cuda:{self.local_rank}" if self.world > 1 and device == "cuda" else device

    def owns(self, batch: int) -> bool:
        """Return whether this process answers the batch of a number."""
        return batch % self.world == self.rank

    def part(self, folder: Path) -> Path:
        """Return the file this process writes to while others write to theirs."""
        return folder / f"answers.part-{self.rank}.jsonl"

    def others(self, folder: Path) -> list[Path]:
        """Return the files of the other processes."""
        return [folder / f"answers.part-{rank}.jsonl" for rank in range(self.world) if rank != self.rank]

    def wait(self) -> None:
        """Wait for every process to arrive here, for days if need be, because shares take different times."""
        if self.world > 1:
            from accelerate import PartialState

            # Nothing but this wait goes between the processes, so the CPU's way serves them on GPUs too; without a GPU,
            # accelerate takes processes for single ones, which wait for nobody, unless told of the CPU.
            state = PartialState(cpu=True, timeout=timedelta(days=7))
            if state.num_processes != self.world:
                raise VlmfixError(
                    f"accelerate sees {state.num_processes} of {self.world} processes; start them with torchrun"
                )
            state.wait_for_everyone()


def _from_environment(*names: str, default: int | None = None) -> int:
    """Return the first of these variables that is set (torch's name, then those of MPI's implementations).

    Raises:
        VlmfixError: None is, and there is no default.
    """
    for name in names:
        if name in os.environ:
            return int(os.environ[name])
    if default is None:
        raise VlmfixError(f"several processes, but none of {', '.join(names)} says which this is; start with torchrun")
    return default


class Elsewhere:
    """Counts the answers that other processes of the run have written so far."""

    def __init__(self, folder: Path, shard: Shard) -> None:
        self._files = {} if shard.world == 1 else {path: (0, 0) for path in shard.others(folder)}

    def __call__(self) -> int:
        """Read what is new in their files, and return the number of answers in all."""
        for path, (offset, lines) in self._files.items():
            if path.is_file():
                with path.open("rb") as file:
                    file.seek(offset)
                    new = file.read()
                self._files[path] = (offset + len(new), lines + new.count(b"\n"))
        return sum(lines for _, lines in self._files.values())


def merge_parts(folder: Path, log: AnswerLog, *, keep: bool = True) -> None:
    """Append what processes left in files of their own, also those of an interrupted run, and remove the files.

    Args:
        folder: The run's folder.
        log: Its answers.
        keep: Otherwise what the files hold is thrown away.
    """
    for path in sorted(folder.glob(PARTS)):
        with AnswerLog(path) as part:
            if keep:
                log.append(part.records.values())
        path.unlink()
