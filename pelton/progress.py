"""A progress bar for long batches: one line on stderr, drawn only where stderr is a terminal."""

from __future__ import annotations

import sys
import time
from types import TracebackType

WIDTH = 24
PATIENCE_S = 0.5  # what takes less needs no bar
REDRAW_S = 0.1


class ProgressBar:
    """`label: 40% |##########              | 4/10 (1.2/s)`, from half a second on; gone when the block ends."""

    def __init__(self, label: str, total: int, enabled: bool = True) -> None:
        self._label = label
        self._total = total
        self._done = 0
        self._started = time.monotonic()
        self._next_draw = self._started + PATIENCE_S
        self._enabled = enabled and sys.stderr is not None and sys.stderr.isatty()
        self._width = 0  # of what is on the screen

    def advance(self, count: int = 1) -> None:
        """`count` more are done."""
        self._done += count
        now = time.monotonic()
        if self._enabled and now >= self._next_draw:
            self._next_draw = now + REDRAW_S
            share = self._done / self._total
            rate = self._done / (now - self._started)
            bar = "#" * int(WIDTH * share)
            self._draw(f"{self._label}: {share:4.0%} |{bar:{WIDTH}}| {self._done}/{self._total} ({rate:.1f}/s)")

    def _draw(self, line: str) -> None:
        sys.stderr.write("\r" + line.ljust(self._width))
        sys.stderr.flush()
        self._width = len(line)

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._width:
            self._draw("")
            sys.stderr.write("\r")
            sys.stderr.flush()
