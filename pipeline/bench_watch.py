"""Says what a rank of a benchmark is at, and ends it where it stays there too long."""

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import TextIO

STUCK = 3
"""Exit status of a rank that was ended."""


class Watch:
    """Lines like `[  31.4 s] rank 1: sharded, 4 sequences: capture`, and a deadline for each of them."""

    def __init__(self, rank: int, limit_s: float, *, out: TextIO = sys.stderr, end: Callable[[int], None] = os._exit):
        """`limit_s`: how long the rank may be at one thing. `end` is given `STUCK`, out of a thread of its own."""
        self._rank, self._limit_s, self._out, self._end = rank, limit_s, out, end
        self.doing: Callable[[], str] = lambda: ""
        """Asked for more when the rank is stuck."""
        self._start = time.monotonic()
        self._place, self._since = "start", self._start
        self._unlimited = False
        self._done = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def at(self, place: str, *, unlimited: bool = False) -> None:
        """Say that the rank is at this now. Unlimited: it waits for others, who are watched themselves."""
        now = time.monotonic()
        self._place, self._since, self._unlimited = place, now, unlimited
        # In one piece: other ranks write there as well.
        self._out.write(f"[{now - self._start:6.1f} s] rank {self._rank}: {place}\n")
        self._out.flush()

    def close(self) -> None:
        """End the watch."""
        self._done.set()

    def _watch(self) -> None:
        while not self._done.wait(min(1.0, self._limit_s / 4)):
            spent = time.monotonic() - self._since
            if self._unlimited or spent < self._limit_s:
                continue
            more = self.doing()
            print(
                f"rank {self._rank} has been at '{self._place}' for {spent:.0f} s, which is more than the "
                f"{self._limit_s:g} s of --timeout{f'; {more}' if more else ''}; its threads:",
                file=self._out,
                flush=True,
            )
            faulthandler.dump_traceback(self._out)
            self._end(STUCK)
            return
