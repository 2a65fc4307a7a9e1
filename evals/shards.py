"""One run on several processes: each answers its share of the batches into a file of its own, the first one merges.

Started by ``accelerate launch -m vlmfix.evals ...`` or ``torchrun``, which say in the environment who is who.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from .cache import AnswerLog

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
        """Read the place from the environment; without one, the only process."""
        world = int(os.environ.get("WORLD_SIZE", "1"))
        if world == 1:
            return cls()
        return cls(int(os.environ["RANK"]), world, int(os.environ.get("LOCAL_RANK", "0")))

    @property
    def is_main(self) -> bool:
        """Whether this process reports."""
        return self.rank == 0

    def device(self, device: str) -> str:
        """The device of this process: with several GPUs on a machine, its own."""
        return f"cuda:{self.local_rank}" if self.world > 1 and device == "cuda" else device

    def owns(self, batch: int) -> bool:
        """Whether this process answers a batch, by its number."""
        return batch % self.world == self.rank

    def part(self, folder: Path) -> Path:
        """The file this process writes to while others write to theirs."""
        return folder / f"answers.part-{self.rank}.jsonl"

    def wait(self) -> None:
        """Wait until every process has come here."""
        if self.world > 1:
            from accelerate import PartialState

            PartialState().wait_for_everyone()


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
