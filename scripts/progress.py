"""How far long work has come, on standard error: a bar on a terminal, now and then a plain line elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType

_BAR_WIDTH = 30
_REDRAW_S = 0.1
_PLAIN_LINE_S = 10.0  # a log of an hour's work stays readable; work of a few seconds leaves no line at all


class Progress:
    """Counts ``done`` up to ``total``; a context manager, which leaves no bar behind."""

    def __init__(self, what: str, total: int):
        self._what = what
        self._total = max(total, 1)
        self._on_terminal = sys.stderr.isatty()
        self._interval = _REDRAW_S if self._on_terminal else _PLAIN_LINE_S
        self._shown_at = time.monotonic()
        self._drawn = False

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._drawn:
            print("\r\033[K", end="", file=sys.stderr, flush=True)

    def show(self, done: int, detail: str = "") -> None:
        """Cheap enough to call for every item: what was shown a moment ago is not shown again.

        ``detail`` is said after the numbers.
        """
        now = time.monotonic()
        if now - self._shown_at < self._interval:
            return
        self._shown_at = now
        share = done / self._total
        if not self._on_terminal:
            print(f"{self._what}: {done} of {self._total} ({share:.0%}) {detail}".rstrip(), file=sys.stderr, flush=True)
            return
        bar = "#" * int(_BAR_WIDTH * share)
        line = f"{self._what} [{bar:<{_BAR_WIDTH}}] {done}/{self._total} {detail}"
        print(f"\r{line}\033[K", end="", file=sys.stderr, flush=True)
        self._drawn = True
