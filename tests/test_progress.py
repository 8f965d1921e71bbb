"""Progress: plain lines when piped, a live display in a terminal, values asked only when shown."""

from __future__ import annotations

import io
import subprocess
import sys

import pytest
from rich.console import Console

from dodistill.report.progress import Progress


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def piped(total: int, **kwargs: float) -> tuple[Progress, Clock, io.StringIO]:
    out, clock = io.StringIO(), Clock()
    progress = Progress(total, "fast: [a] -> b", console=Console(file=out, width=40), clock=clock, **kwargs)
    return progress, clock, out


def test_piped_prints_first_every_n_seconds_and_last() -> None:
    progress, clock, out = piped(100)
    with progress:
        for step in range(1, 101):
            clock.now += 0.5
            progress.update(step, loss=1 / step, agreement=50.0, **{"match/kl": 0.25})
    lines = out.getvalue().splitlines()
    assert lines[0] == "fast: [a] -> b"
    assert lines[1] == "step 1/100 (1 %)  loss 1  agreement 50.00 %  match/kl 0.25"
    assert [line.split()[1] for line in lines[1:-1]] == ["1/100", "21/100", "41/100", "61/100", "81/100", "100/100"]
    assert "2 steps/s, 40 s left" in lines[2]  # 79 steps left at 2 per second
    assert lines[-1] == "100 of 100 steps in 50 s"
    assert "\x1b" not in out.getvalue()


def test_callables_are_asked_only_when_shown() -> None:
    progress, clock, _ = piped(1000)
    asked: list[int] = []
    with progress:
        for step in range(1, 1001):
            clock.now += 0.1
            progress.update(step, loss=lambda step=step: asked.append(step) or 0.5)
    assert len(asked) == 11


def test_values_stay_and_nan_is_said() -> None:
    progress, clock, out = piped(3)
    with progress:
        progress.update(1, agreement=88.0)
        clock.now = 20
        progress.update(2, loss=float("nan"))
    assert "step 2/3 (66 %)  agreement 88.00 %  loss nan" in out.getvalue()


def test_inner_work_speaks_before_the_first_step_and_not_too_often() -> None:
    progress, clock, out = piped(10)
    with progress:
        for i in range(1, 101):
            clock.now += 1
            progress.inner("inverting", i, 100)
        progress.note("checkpoint written [x]")
        progress.update(1, loss=1.0)
    lines = out.getvalue().splitlines()
    assert sum("inverting" in line for line in lines) == 10
    assert "step 0/10 (0 %)  inverting 10/100" in lines
    assert "checkpoint written [x]" in lines


def test_an_interrupted_run_says_where_and_lets_the_error_pass() -> None:
    progress, clock, out = piped(10)

    def run() -> None:
        with progress:
            for step in range(1, 4):
                clock.now += 1
                progress.update(step, loss=0.5)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()
    assert out.getvalue().splitlines()[-2:] == [
        "step 3/10 (30 %)  loss 0.5",
        "stopped after step 3 of 10, 3.0 s",
    ]


def test_a_resumed_run_counts_its_own_rate() -> None:
    progress, clock, _ = piped(2000)
    with progress:
        progress.update(1000)
        clock.now = 10
        progress.update(1050)
        assert progress.rate() == pytest.approx(5)


def test_live_display() -> None:
    out, clock = io.StringIO(), Clock()
    console = Console(file=out, force_terminal=True, width=100)
    with Progress(4, "title", console=console, clock=clock, live=True) as progress:
        for step in range(1, 5):
            clock.now += 1
            progress.inner("inverting", step, 9)
            progress.update(step, loss=0.125, agreement=91.5)
            progress.note(f"note {step}")
    text = out.getvalue()
    for piece in ("title", "4/4", "0.125", "91.50 %", "inverting", "note 3", "1 steps/s", "\x1b[?25h"):
        assert piece in text


def test_piped_process_keeps_stdout_clean() -> None:
    code = (
        "from dodistill.report.progress import Progress\n"
        "with Progress(2, 't') as p:\n    p.update(1, loss=0.5); p.update(2, loss=0.25)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == ""
    assert "step 2/2 (100 %)  loss 0.25" in done.stderr
    assert "\x1b" not in done.stderr
