"""When a command must stop: at a time, or at a signal."""

from __future__ import annotations

import math
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class OutOfTime(Exception):
    """The deadline has passed inside an acquisition or an evaluation, of which the text names the place."""


class Deadline(float):
    """A time of time.monotonic() that `stop` brings forward. It compares as a float; once stopped, it has passed."""

    stopped: bool

    def __new__(cls, at: float = math.inf) -> Deadline:
        """`at`: see time.monotonic()."""
        self = super().__new__(cls, at)
        self.stopped = False
        return self

    def stop(self) -> None:
        """It has passed from now on."""
        self.stopped = True

    @property
    def passed(self) -> bool:
        return self.stopped or time.monotonic() > float(self)

    def __lt__(self, now: float) -> bool:
        return self.stopped or float(self) < now

    def __gt__(self, now: float) -> bool:
        return not self.stopped and float(self) > now

    def __ge__(self, now: float) -> bool:
        return not self < now

    def __le__(self, now: float) -> bool:
        return not self > now

    __hash__ = float.__hash__

    def __eq__(self, other: object) -> bool:
        return float(self) == other


@contextmanager
def stopping(deadline: Deadline) -> Iterator[None]:
    """In this block SIGTERM and SIGINT stop `deadline`, so that the command saves and ends; a second SIGINT interrupts.

    Schedulers send SIGTERM before they kill. Outside the main thread, where Python allows no handlers, nothing happens.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, _frame: FrameType | None) -> None:
        if deadline.stopped and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not deadline.stopped:
            print("\nstopping at the next checkpoint; press Ctrl-C again to stop at once.", file=sys.stderr)
        deadline.stop()

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
