"""Live progress in a terminal, plain lines when piped; both on stderr. Values are floats, or functions called late."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ..core.watch import Watcher
from .format import duration, number

Value = float | Callable[[], float]

PERCENT = ("agreement", "accuracy", "test")


def _shown(name: str, value: float) -> str:
    if not math.isfinite(value):
        return str(value)
    percentage = name.startswith(PERCENT) and "/" not in name
    return f"{value:.2f} %" if percentage else number(value)


class Progress(Watcher):
    """`with Progress(4000, "fast: wrn40_2 -> wrn16_1") as progress: progress.update(step, loss=0.53)`.

    An update costs a clock read and a dict merge; values are read and drawn at most every `refresh` seconds in a
    terminal, and printed at most every `every` seconds when piped (always at the first and the last step).
    """

    def __init__(
        self,
        total_steps: int,
        title: str,
        *,
        every: float = 10.0,
        refresh: float = 0.25,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
        live: bool | None = None,
    ) -> None:
        self.total = total_steps
        self.title = title
        self.step: int | None = None
        self._console = console or Console(stderr=True, highlight=False)
        self._clock = clock
        terminal = self._console.file.isatty() and not self._console.is_dumb_terminal
        self._draws = terminal if live is None else live
        self._wait = refresh if self._draws else every
        self._values: dict[str, Value] = {}
        self._inner: tuple[str, int, int] | None = None
        self._marks: deque[tuple[float, int]] = deque(maxlen=120)
        self._first = (0.0, 0)
        self._began = self._last = clock()
        self._printed: int | None = None
        self._live: Live | None = None
        self._noted: list[str] = []
        self._scores: dict[str, float] = {}  # of the last evaluation

    def __enter__(self) -> Self:
        self._began = self._last = self._clock()
        if self._draws:
            self._live = Live(console=self._console, auto_refresh=False, transient=False)
            self._live.start()
            self._draw()
        else:
            self._line(self.title)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._inner = None
        if self._live is not None:
            self._draw()
            self._live.stop()
            self._live = None
        elif self.step is not None and self._printed != self.step:
            self._line(self._status())
        took = duration(self._clock() - self._began)
        if kind is not None:
            self._line(f"stopped after step {self.step or 0} of {self.total}, {took}")
        elif self.step is not None:
            self._line(f"{self.step} of {self.total} steps in {took}")

    def update(self, step: int, **values: Value) -> None:
        """Report that step `step` is done. A value stays displayed until it is given again."""
        first = self.step is None
        self.step = step
        self._values.update(values)
        self._inner = None
        now = self._clock()
        if first:
            self._first = (now, step)
            self._marks.append(self._first)
        if first or step >= self.total or now - self._last >= self._wait:
            self._show(now)

    def inner(self, what: str, done: int, total: int) -> None:
        """Long work inside one step, such as the iterations of an inversion."""
        self._inner = (what, done, total)
        now = self._clock()
        if now - self._last >= self._wait:
            self._show(now)

    def note(self, text: str) -> None:
        """A line that stays: a checkpoint, a warning."""
        self._noted.append(text)
        self._line(text)

    def rest(self, warnings: Sequence[str]) -> None:
        """The lines of a run's warnings that were not shown, as those found after its last step."""
        for text in warnings:
            if not text.endswith(tuple(self._noted)):  # after "symptom: "
                self.note(text)

    def on_start(self, step: int, steps: int) -> None:
        self.total = steps

    def on_steps(self, step: int, steps: int) -> None:
        self.total = steps

    def on_note(self, text: str) -> None:
        self.note(text)

    def on_progress(self, what: str, done: int, total: int) -> None:
        self.inner(what, done, total)

    def on_eval(self, step: int, values: Mapping[str, float]) -> None:
        self._scores = {k: v for k, v in values.items() if k in ("agreement", "test")}

    def on_warning(self, step: int, symptom: str, text: str) -> None:
        self.note(text)

    def on_log(self, step: int, values: Mapping[str, float]) -> None:
        self.update(step, **{"loss": values["loss"], "img/s": values["rate"], **self._scores})

    def rate(self) -> float | None:
        """Steps per second over the last marks; None before it is known."""
        if len(self._marks) < 2:
            return None
        (t0, a), (t1, b) = self._marks[0], self._marks[-1]
        return (b - a) / (t1 - t0) if t1 > t0 and b > a else None

    def _show(self, now: float) -> None:
        self._last = now
        if self.step is not None and self._marks[-1][1] != self.step:
            self._marks.append((now, self.step))
        if self._live is not None:
            self._draw()
            return
        self._line(self._status())
        self._printed = self.step if self._inner is None else None

    def _asked(self) -> Mapping[str, float]:
        return {name: float(v() if callable(v) else v) for name, v in self._values.items()}

    def _pace(self) -> str:
        rate = self.rate()
        if rate is None:
            return ""
        speed = f"{number(rate, 3)} steps/s" if rate >= 0.1 else f"{duration(1 / rate)} per step"
        (t0, a), (t1, b) = self._first, self._marks[-1]  # the whole run, acquisitions between steps included
        left = (self.total - b) * (t1 - t0) / (b - a)
        return f"{speed}, {duration(left)} left" if left > 0 else speed

    def _status(self) -> str:
        step = self.step or 0
        parts = [f"step {step}/{self.total} ({100 * step // max(self.total, 1)} %)"]
        if self._inner is not None:
            what, done, total = self._inner
            parts.append(f"{what} {done}/{total}")
        else:
            parts += [f"{name} {_shown(name, value)}" for name, value in self._asked().items()]
        return "  ".join([*parts, pace] if (pace := self._pace()) else parts)

    def _line(self, text: str) -> None:
        self._console.print(Text(text), soft_wrap=True)

    def _draw(self) -> None:
        if self._live is not None:
            self._live.update(self._picture(), refresh=True)

    def _picture(self) -> RenderableType:
        step = self.step or 0
        head = Table.grid(padding=(0, 2))
        head.add_row(
            Text(self.title, style="bold"),
            ProgressBar(total=max(self.total, 1), completed=step, width=28),
            Text(f"{step}/{self.total}"),
            Text(self._pace(), style="dim"),
        )
        rows: list[RenderableType] = [head]
        if self._values:
            line = Text()
            for name, value in self._asked().items():
                line.append(f"{name} ", style="dim").append(_shown(name, value)).append("   ")
            rows.append(line)
        if self._inner is not None:
            what, done, total = self._inner
            below = Table.grid(padding=(0, 2))
            bar = ProgressBar(total=max(total, 1), completed=done, width=28)
            below.add_row(Text(what, style="dim"), bar, Text(f"{done}/{total}", style="dim"))
            rows.append(below)
        return Group(*rows)
