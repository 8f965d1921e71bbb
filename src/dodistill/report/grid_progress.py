"""Live progress of a grid: a line for each running cell and one for the grid, from the files that the runs write.

In a terminal the lines are redrawn; when piped, they are printed once a minute. Both on stderr.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from .format import duration, number, percent

TAIL = 1 << 16  #: bytes at the end of a metrics.jsonl that are read


@dataclass(frozen=True)
class Running:
    """A cell that runs now: its name, its run folder, the steps of its config, and its start (of the clock)."""

    name: str
    folder: Path
    steps: int
    began: float


@dataclass(frozen=True)
class Status:
    """What the files of a run say. `pace`: seconds per step, acquisitions included; 0: unknown."""

    step: int = 0
    steps: int = 0
    rate: float = math.nan
    agreement: float = math.nan
    pace: float = 0.0

    @property
    def left(self) -> float | None:
        """Seconds to the last step; None before they are known."""
        return (self.steps - self.step) * self.pace if self.pace else None

    @property
    def whole(self) -> float | None:
        """Seconds of the whole run."""
        return self.steps * self.pace if self.pace else None


def status(cell: Running) -> Status:
    """The state of a running cell. A run that has logged nothing yet is at step 0."""
    lines = _tail(cell.folder / "metrics.jsonl")
    logs = [line for line in lines if line.get("kind") == "log" and isinstance(line.get("step"), int)]
    evals = [line for line in lines if line.get("kind") == "eval" and _is(line.get("agreement"))]
    agreement = float(evals[-1]["agreement"]) if evals else math.nan
    steps = _planned(cell.folder / "plan.json") or cell.steps
    if not logs:
        return Status(steps=steps, agreement=agreement)
    first, last = logs[0], logs[-1]
    if isinstance(last.get("steps"), int):  # a time limit follows the speed
        steps = last["steps"]
    pace = 0.0
    if _is(last.get("seconds")) and last["step"]:
        pace = float(last["seconds"]) / last["step"]
        if last["step"] > first["step"] and _is(first.get("seconds")):  # without the warm-up before the first line
            pace = max(0.0, (last["seconds"] - first["seconds"]) / (last["step"] - first["step"]))
    rate = float(last["rate"]) if _is(last.get("rate")) else math.nan
    return Status(last["step"], max(steps, last["step"]), rate, agreement, pace)


def _is(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _tail(path: Path) -> list[dict[str, Any]]:
    """The JSON objects in the last lines of a file; incomplete lines are skipped."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - TAIL))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return []
    found = []
    for line in text.splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            found.append(record)
    return found


def _planned(path: Path) -> int | None:
    """The steps that a time limit allows."""
    try:
        steps = json.loads(path.read_text(encoding="utf-8"))["loop"]["steps"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return steps if isinstance(steps, int) else None


def described(cell: Running, now: float) -> str:
    """One line on a running cell."""
    it = status(cell)
    if not it.step:
        return f"{cell.name}  making the first inputs, {duration(now - cell.began)} so far"
    parts = [cell.name, f"step {it.step}/{it.steps} ({100 * it.step // max(it.steps, 1)} %)"]
    if math.isfinite(it.rate):
        parts.append(f"{number(it.rate, 3)} img/s")
    if it.left is not None:
        parts.append(f"{duration(it.left)} left")
    if math.isfinite(it.agreement):
        parts.append(f"agreement {percent(it.agreement)}")
    return "  ".join(parts)


def remaining(
    running: Sequence[Running], waiting: Sequence[float | None], jobs: int, now: float, known: Sequence[float] = ()
) -> float | None:
    """Seconds until the grid is done; None while nothing is known.

    Args:
        waiting: the expected seconds of each cell that waits; None: unknown.
        known: the seconds of finished cells, which stand in for unknown ones.
    """
    states = [(cell, status(cell)) for cell in running]
    totals = [it.whole for _, it in states if it.whole is not None]
    typical = statistics.fmean(known) if known else statistics.fmean(totals) if totals else None
    left = [
        it.left if it.left is not None else None if typical is None else max(0.0, typical - (now - cell.began))
        for cell, it in states
    ] + [typical if seconds is None else seconds for seconds in waiting]
    if any(value is None for value in left):
        return None
    numbers = [value for value in left if value is not None]
    return max([math.fsum(numbers) / max(jobs, 1), *numbers], default=0.0)


class GridProgress:
    """`with GridProgress() as progress:`, then `show` as often as convenient, and `say` for lines that stay."""

    def __init__(
        self,
        *,
        every: float = 60.0,
        refresh: float = 1.0,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
        live: bool | None = None,
    ) -> None:
        self._console = console or Console(stderr=True, highlight=False)
        terminal = self._console.file.isatty() and not self._console.is_dumb_terminal
        self._draws = terminal if live is None else live
        self._wait = refresh if self._draws else every
        self._clock = clock
        self._last = clock()
        self._live: Live | None = None

    def __enter__(self) -> Self:
        if self._draws:
            self._live = Live(console=self._console, auto_refresh=False, transient=True)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def say(self, text: str) -> None:
        """A line that stays."""
        self._console.print(Text(text), soft_wrap=True)

    def show(self, running: Sequence[Running], summary: Callable[[float], str]) -> None:
        """The lines of the running cells and that of the grid, `summary(now)`, if it is time for them."""
        now = self._clock()
        if now - self._last < self._wait:
            return
        self._last = now
        lines = [*(described(cell, now) for cell in running), summary(now)]
        if self._live is not None:
            self._live.update(Group(*(Text(line, no_wrap=True, overflow="ellipsis") for line in lines)), refresh=True)
            return
        for line in lines:
            self.say(line)
