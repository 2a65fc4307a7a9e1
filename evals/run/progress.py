"""How far a run is: a bar where somebody watches, now and then a line where nobody does."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from tqdm import tqdm

BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} answers [{elapsed}<{remaining}, {rate_noinv_fmt}]"


LINE = "{percentage:.0f} %: {n_fmt} of {total_fmt} answers, {rate_noinv_fmt}, {remaining} to go ({desc})"


SECONDS_BETWEEN_LINES = 30.0


class Progress(tqdm):  # type: ignore[misc]
    """Counts answers as they come.

    On a terminal it draws a bar. Elsewhere it says a line every 30 seconds, so that a short run stays quiet.

    Args:
        total: Answers to come, also those of other processes.
        say: Takes the lines; None (not the main process) shows nothing anywhere.
        elsewhere: How many answers other processes have given.
        **more: Of tqdm.
    """

    monitor_interval = 0  # No thread of its own: answers come often enough.

    def __init__(
        self, total: int, *, say: Callable[[str], None] | None, elsewhere: Callable[[], int] = lambda: 0, **more: Any
    ) -> None:
        self._own, self._elsewhere = 0, elsewhere
        where: dict[str, Any] = {"file": sys.stderr, "bar_format": BAR, "dynamic_ncols": True}
        if say is not None and not sys.stderr.isatty():
            where = {"file": _Lines(say), "bar_format": LINE, "ncols": 1000, "leave": False}
            where |= {"mininterval": SECONDS_BETWEEN_LINES, "delay": SECONDS_BETWEEN_LINES}
        super().__init__(total=total, disable=say is None, unit="", smoothing=0.1, miniters=1, **{**where, **more})

    def begin(self, what: str) -> None:
        """Name what is being answered."""
        self.set_description_str(what, refresh=False)

    def add(self, answers: int) -> None:
        """Count this process's answers, and what the others have given meanwhile."""
        self._own += answers
        if not self.disable:
            self.update(min(self._own + self._elsewhere(), self.total) - self.n)


class _Lines:
    """A file for tqdm that hands on what would be drawn, line by line."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say

    def write(self, text: str) -> None:
        if line := text.strip():
            self._say(line)

    def flush(self) -> None:
        """Nothing is held back."""
