"""How far a run is: a bar where somebody watches, now and then a line where nobody does."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType

BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} answers [{elapsed}<{remaining}, {rate_noinv_fmt}]"


LINES = 10


SECONDS_BETWEEN_LINES = 30.0


class Progress:
    """Counts answers as they come.

    On a terminal it draws a bar with answers per second and the time to go. Elsewhere it says a line for every tenth of
    the run, but none sooner than 30 seconds after the last: a short run stays quiet.

    Args:
        total: Answers to come, also those of other processes.
        say: Takes the lines; None (not the main process) shows nothing anywhere.
        elsewhere: How many answers other processes have given.
        terminal: Whether somebody watches stderr; looked up by default.
        clock: Seconds.
    """

    def __init__(
        self,
        total: int,
        *,
        say: Callable[[str], None] | None,
        elsewhere: Callable[[], int] = lambda: 0,
        terminal: bool | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.done = 0
        self._total = total
        self._say = say
        self._elsewhere = elsewhere
        self._clock = clock
        self._start = self._last = clock()
        self._tenth = 0
        self._bar = None
        if say is not None and (sys.stderr.isatty() if terminal is None else terminal):
            from tqdm import tqdm

            self._bar = tqdm(total=total, unit="", bar_format=BAR, smoothing=0.1, dynamic_ncols=True)

    def begin(self, what: str) -> None:
        """Name what is being answered."""
        if self._bar is not None:
            self._bar.set_description_str(what, refresh=False)

    def add(self, answers: int, what: str) -> None:
        """Count this process's answers, and what the others have given meanwhile.

        Args:
            answers: How many came.
            what: What they were about, for a line.
        """
        self.done += answers
        if self._say is None:
            return
        done = min(self.done + self._elsewhere(), self._total)
        if self._bar is not None:
            self._bar.update(done - self._bar.n)
            return
        now = self._clock()
        tenth = LINES * done // max(self._total, 1)
        if tenth > self._tenth and now - self._last >= SECONDS_BETWEEN_LINES:
            self._tenth, self._last = tenth, now
            rate = done / (now - self._start)
            left = f"{span((self._total - done) / rate)} to go"
            self._say(f"{100 * done // self._total} %: {done} of {self._total} answers, {rate:.3g}/s, {left} ({what})")

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()


def span(seconds: float) -> str:
    """A time in the unit a reader would choose: ``"40 s"``, ``"12 min"``, ``"3 h 20 min"``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
