"""Live progress of a grid: what each run's files say, a line each, redrawn in a terminal, once a minute when piped."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from dodistill.report.grid_progress import GridProgress, Running, described, remaining, status


def cell(folder: Path, name: str = "fast kdci 0", lines: list[dict[str, Any]] | None = None, tail: str = "") -> Running:
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(line) + "\n" for line in lines or [])
    if lines is not None:
        (folder / "metrics.jsonl").write_text(text + tail)
    return Running(name, folder, 1000, began=100.0)


def logs(*marks: tuple[int, float]) -> list[dict[str, Any]]:
    return [{"kind": "log", "step": step, "seconds": seconds, "rate": 640.0} for step, seconds in marks]


def test_a_line_says_step_rate_time_left_and_agreement(tmp_path: Path) -> None:
    lines = [*logs((50, 30.0), (250, 50.0)), {"kind": "eval", "step": 250, "agreement": 81.2}]
    running = cell(tmp_path, lines=lines, tail='{"kind": "log", "st')  # the last line is being written
    it = status(running)
    assert (it.step, it.pace, it.left) == (250, pytest.approx(0.1), pytest.approx(75))  # 20 s for 200 steps
    said = described(running, 160.0)
    assert said == "fast kdci 0  step 250/1000 (25 %)  640 img/s  1 min 15 s left  agreement 81.20 %"


def test_before_the_first_log_line(tmp_path: Path) -> None:
    assert described(cell(tmp_path / "a"), 145.0) == "fast kdci 0  making the first inputs, 45 s so far"
    assert "making the first inputs" in described(cell(tmp_path / "b", lines=[]), 145.0)
    assert status(cell(tmp_path / "c", lines=logs((50, 30.0)))).left == pytest.approx(950 * 0.6)


def test_only_the_end_of_a_long_file_is_read(tmp_path: Path) -> None:
    running = cell(tmp_path, lines=logs(*((k, k / 10) for k in range(1, 901))))
    assert (tmp_path / "metrics.jsonl").stat().st_size > 50_000
    (tmp_path / "metrics.jsonl").write_text("x" * 100_000 + "\n" + (tmp_path / "metrics.jsonl").read_text())
    assert (status(running).step, status(running).left) == (900, pytest.approx(10))


def test_a_time_limit_sets_the_steps(tmp_path: Path) -> None:
    running = cell(tmp_path, lines=logs((50, 5.0)))
    (tmp_path / "plan.json").write_text(json.dumps({"loop": {"steps": 200}}))
    assert status(running).steps == 200
    follows = cell(tmp_path, lines=[line | {"steps": 300} for line in logs((50, 5.0), (100, 10.0))])
    assert (status(follows).steps, status(follows).left) == (300, pytest.approx(20))


def test_the_time_of_the_whole_grid(tmp_path: Path) -> None:
    fast = cell(tmp_path / "a", lines=logs((100, 10.0), (500, 50.0)))  # 50 s left of 100 s
    slow = cell(tmp_path / "b")  # has said nothing
    assert remaining([fast], [30.0, 30.0], 1, 0) == pytest.approx(110)
    assert remaining([fast], [30.0, 30.0], 2, 0) == pytest.approx(55)
    assert remaining([fast], [None], 1, 0) == pytest.approx(150)  # as long as the one that runs
    assert remaining([fast], [None], 1, 0, [20.0]) == pytest.approx(70)
    assert remaining([slow], [], 1, 130.0, [200.0]) == pytest.approx(170)
    assert remaining([slow], [None], 1, 130.0) is None
    assert remaining([fast], [], 8, 0) == pytest.approx(50)  # no shorter than its longest cell


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize("live", [False, True])
def test_once_a_minute_when_piped_and_redrawn_in_a_terminal(live: bool, tmp_path: Path) -> None:
    clock, text = Clock(), io.StringIO()
    console = Console(file=text, force_terminal=live, width=120, highlight=False)
    cells = [cell(tmp_path / name, name, logs((50, 5.0), (100, 10.0))) for name in ("one", "two")]
    with GridProgress(console=console, clock=clock, live=live) as progress:
        for second in range(150):
            clock.now = float(second)
            progress.show(cells, lambda now: f"grid at {now:.0f}")
        progress.say("[1/2] one: 80.00 %")
    said = text.getvalue()
    assert "[1/2] one: 80.00 %" in said
    if live:
        assert said.count("grid at") > 140  # each second, over the lines of before
        assert "\x1b[" in said
    else:
        assert [line for line in said.splitlines() if line.startswith("grid")] == ["grid at 60", "grid at 120"]
        assert said.count("one  step 100/1000 (10 %)") == 2
        assert "\x1b" not in said
